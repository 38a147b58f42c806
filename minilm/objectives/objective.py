"""The interfaces of training objectives and their evaluation.

`minilm.objectives.factory` builds an objective from a configuration.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import Config
from minilm.data.corpus import Examples, PreparedData
from minilm.data.micro_batch import Collator
from minilm.models.head import Head


class EvaluationResult(Protocol):
    """The result of one evaluation over all processes."""

    def figures(self) -> dict[str, float]:
        """Return the figures by name. The keys are `Evaluator.names`, and `eval_loss` is one of them."""


class Evaluator(Protocol):
    """The evaluation of a model on the evaluation examples."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the figures, in their order. The loop reads them before the first step."""

    def __call__(self, accelerator: Accelerator, model: nn.Module) -> EvaluationResult:
        """Evaluate every example once.

        The loop calls this on all processes at the same step. The processes share the examples, and all of them must
        return the same figures. The model must be in evaluation mode during the call and in its previous mode after
        it.

        model: the head (`Objective.head`) after `accelerator.prepare`.
        """


class Objective(Protocol):
    """What a model is trained for.

    An implementation is constructed with its settings, such as a `minilm.config.MaskedLM`. It must keep no state
    between calls, because each part of a run constructs its own.
    """

    auto: Any
    """The auto class of transformers that builds and loads the models, such as `AutoModelForMaskedLM`."""
    pipeline: str
    """The name of the task on the hub and in `transformers.pipeline`, such as "fill-mask"."""
    title: str
    """The kind of model in words, for the model card, such as "masked language model"."""

    @property
    def card_text(self) -> str:
        """A paragraph for the model card that says what the figures of the evaluation mean."""

    def prepare(self, config: Config) -> PreparedData:
        """Return the tokenizer and the examples for training and evaluation.

        A run calls this first on one process of each host, which fills the cache, and then on the others. Raise
        ValueError for settings or data that the objective cannot use.
        """

    def check(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        """Raise ValueError for a model that the objective cannot train, or a text that `sample` cannot use.

        A run calls this after it has built the model, before `head`.

        texts: `run.samples` of the configuration.
        """

    def head(self, network: PreTrainedModel, prepared: PreparedData) -> Head:
        """Return the module that computes the loss of each target in a micro-batch.

        A run calls this once, when the model is on its device. `forward` of the module takes `input_ids_T`, `packing`,
        `target_index_N`, `target_ids_N` and `type_ids_T` of a `MicroBatch`, and returns the losses, float32[N], in
        nats. Raise ValueError if the examples hold ids that the model cannot read.
        """

    def collator(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        seed: int | None,
        padded: bool,
        multiple: int,
    ) -> Collator:
        """Return the collator, which makes a `MicroBatch` of rows of `examples`.

        Its targets must depend only on the seed, the epoch, the progress of the run and the example. They must not
        depend on the other rows of the micro-batch.

        seed: the seed of the run; None for evaluation, whose targets are the same in every run.
        padded, multiple: as in `minilm.data.batch_plan.Plan`.
        """

    def evaluator(self, prepared: PreparedData, micro_tokens: int, *, padded: bool, multiple: int) -> Evaluator:
        """Return the evaluation of `prepared.eval`. A run calls this once, before the first step.

        Raise ValueError if the examples cannot be evaluated.

        micro_tokens: the maximum number of tokens in a forward pass. The figures must not depend on it.
        padded, multiple: as in `minilm.data.batch_plan.Plan`.
        """

    def format_figures(self, figures: dict[str, float]) -> str:
        """Return the figures of an evaluation as one line for the log."""

    def sample(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        """Return the model's output for a text, for people to read.

        The main process calls this for each of `run.samples` at the end of a run, with the saved model in float32 and
        in evaluation mode.
        """

    def command(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return a shell command that tries the model in `folder`. The last line of a run's log shows it."""
