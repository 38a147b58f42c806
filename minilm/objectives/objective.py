"""The objectives by the settings that ask for them. What one has that another has not is in its own module."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import CausalLM, Classification, Config, MaskedLM
from minilm.data.corpus import Examples, PreparedData
from minilm.data.micro_batch import Collator
from minilm.models.builtin_loss import check_builtin_loss
from minilm.models.head import Head
from minilm.models.loading import check_model, load_model
from minilm.models.lora import check_peft_installed
from minilm.objectives.causal_lm import Causal
from minilm.objectives.classification import Classify
from minilm.objectives.masked_lm import Masked
from minilm.utils.cache import explain_cache_errors


class Figures(Protocol):
    """What an evaluation found."""

    def figures(self) -> dict[str, float]:
        """By name, `eval_loss` among them."""


class Evaluator(Protocol):
    """The evaluation of a model on examples that training does not see."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of its figures."""

    def __call__(self, accelerator: Accelerator, model: nn.Module) -> Figures:
        """Evaluate every example once, shared among the processes, all of which return the same."""


class Objective(Protocol):
    """All that differs from one objective to the next."""

    auto: Any
    """The class of transformers that builds and loads its models."""
    pipeline: str
    """Its name on the hub and in `transformers.pipeline`."""
    title: str
    """What its models are called."""

    @property
    def explained(self) -> str:
        """What the figures of its evaluation mean, for the model card."""

    def prepare(self, config: Config) -> PreparedData:
        """The tokenizer and the examples that the configuration asks for, from the cache where it has them."""

    def head(self, network: PreTrainedModel, prepared: PreparedData) -> Head:
        """The module that gives the losses of a batch's targets."""

    def collator(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        seed: int | None,
        padded: bool,
        multiple: int,
    ) -> Collator:
        """The collator of training, or with `seed=None` that of evaluation, which is the same in every run."""

    def evaluator(self, prepared: PreparedData, micro_tokens: int, *, padded: bool, multiple: int) -> Evaluator:
        """The evaluation; `micro_tokens` bounds a forward pass and changes no figure."""

    def said(self, figures: dict[str, float]) -> str:
        """The figures of an evaluation in words."""

    def check(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        """Raise ValueError for a model that it cannot train, and for a text that `sample` cannot take."""

    def sample(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        """What the model makes of a text, for people to read."""

    def command(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
        """A command that tries the model in `folder`."""


_OBJECTIVES: dict[type, Callable[[Any], Objective]] = {
    MaskedLM: Masked,
    CausalLM: Causal,
    Classification: Classify,
}


def objective_of(settings: MaskedLM | CausalLM | Classification) -> Objective:
    """The objective that `config.objective` asks for."""
    return _OBJECTIVES[type(settings)](settings)


def prepare(config: Config) -> PreparedData:
    """The tokenizer and the examples of a run."""
    objective = objective_of(config.objective)
    check_peft_installed(config.model)  # before the work
    check_model(config.model, max_length=config.batch.max_length, auto=objective.auto)
    with explain_cache_errors():
        return objective.prepare(config)


def build(config: Config, prepared: PreparedData, *, trained: bool = True) -> PreTrainedModel:
    """The model of a run, loaded or new; ValueError for one that cannot be `trained` as it asks to be."""
    network = load_model(
        config.model,
        prepared.tokenizer,
        max_length=config.batch.max_length,
        seed=config.run.seed,
        auto=objective_of(config.objective).auto,
        fields=prepared.fields,
        added=config.tokens.extend,
        new_labels=prepared.labels is not None and not prepared.labels.same_as_checkpoint,
    )
    if prepared.labels is None:
        check_builtin_loss(network, trained=trained)
    return network
