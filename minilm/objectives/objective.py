"""The base class of training objectives.

`minilm.objectives.factory` builds an objective from a configuration. docs/fork.md shows objectives of one's own.

Axes: N targets, R rows, L padded length, E examples, K rows of an example, C outputs, H hidden size.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import Config, Data, ObjectiveSettings
from minilm.data.corpus import Examples, PreparedData
from minilm.data.documents import load_row_tables
from minilm.data.example import Example, Remark
from minilm.data.memory import MemoryDocuments
from minilm.data.micro_batch import Collator
from minilm.data.packing import Packing
from minilm.data.rows import Row, RowTable
from minilm.models.compatibility import check_compatibility
from minilm.models.embedding_head import EmbeddingHead
from minilm.models.forward_checks import check_causal
from minilm.models.head import Head
from minilm.models.row_head import RowHead
from minilm.models.sparse_head import SparseHead
from minilm.objectives.evaluator import Evaluator
from minilm.objectives.example_batches import ExampleCollator, arrange_outputs
from minilm.objectives.example_evaluation import ExampleEvaluator, TargetLossEvaluator
from minilm.objectives.example_preparation import build_role_columns, find_texts, prepare_examples

# The task of each auto class, on the hub and in `transformers.pipeline`.
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}
# A logit whose exp is 0 for any temperature above 1e-8.
_LOWEST_LOGIT = -1e30
Outputs = Literal["targets", "next_tokens", "rows", "tokens", "mean", "first", "last"]
"""What the model gives the loss; see `Objective.outputs`."""


@dataclass(frozen=True, kw_only=True)
class Objective(ObjectiveSettings):
    """What a model is trained for. Subclass it, and write `examples`; the rest has defaults.

    A subclass is a frozen dataclass with a default for each of its fields. The fields are settings of a run, and flags
    such as `--objective.margin 0.5`. A run takes it as `Config(objective=MyObjective())`. It must keep no state between
    calls, because each part of a run calls it by itself.

    The sections below are in the order in which a run uses them.
    """

    auto: ClassVar[Any] = AutoModel
    """The auto class of transformers that builds and loads the models, such as `AutoModelForTokenClassification`."""
    outputs: ClassVar[Outputs] = "targets"
    """What the model gives the loss. "targets": the model's logits at each token with a target, N x C. "tokens": its
    logits at all tokens, R x L x C, with -inf after the end of a row. "next_tokens", with `AutoModelForCausalLM`: the
    logits that predict each target from the tokens before it, N x C; a target is the token's own id, and the first
    token of a row is never one. The default loss does not keep them, which saves time and memory. "rows": its logits
    for each row, R x C. "mean", "first" and "last", with `AutoModel`: the hidden states of each row as one vector,
    R x H. If examples have several rows, an output per row has the shape E x K x C."""
    couples_examples: ClassVar[bool] = False
    """Whether the loss of an example depends on the other examples of its step, as with in-batch negatives. `loss` then
    gets all examples of the step at once, over all processes, in the order of their numbers."""
    equal_rows: ClassVar[bool] = True
    """Whether all examples must have the same number of rows."""
    figures: ClassVar[tuple[str, ...]] = ()
    """The names of what `metrics` returns. `run.best_metric` can be one of them."""
    pairs: ClassVar[bool | None] = None
    """Whether a row of tokens holds two texts. If it is True or False, the tokenizer gives `token_type_ids` only to a
    model that has several token types; give them to `Example`. None leaves the tokenizer as it is."""
    version: ClassVar[int] = 1
    """Raise it when `examples` changes by code outside the folder of the class, so that the cache is not used."""
    title: ClassVar[str] = "model"
    """The kind of model in words, for the model card, such as "masked language model"."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("name", "defined_in"):
            if name in vars(cls).get("__annotations__", {}):
                raise TypeError(f"{cls.__name__}.{name}: a run records the class under this name; rename the field")

    # From rows to examples.

    def columns(self, data: Data) -> dict[str, str]:
        """Return the columns to read: the key under which `examples` finds a cell, and the column's name."""
        return {"text": data.column}

    def fields(self, rows: RowTable, config: Config) -> dict[str, Any]:
        """Return fields of the model's configuration that the training rows decide, such as `id2label`.

        A field whose name begins with _ is for `examples` alone. It is not a part of the model's configuration.
        """
        return {}

    def texts(self, row: Row) -> Iterable[str]:
        """Return the texts of a row from which a tokenizer learns, if the run trains or extends one.

        The default is every text in the row.
        """
        return find_texts(dict(row))

    def adapt_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Change the tokenizer of the run before it encodes, such as by `tokenizer.add_tokens`.

        The embedding of a checkpoint grows with the tokens, and the output folder has the changed tokenizer. So the
        method must not add again what is there.
        """

    def examples(
        self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]
    ) -> Iterable[Example | Remark]:
        """Yield the examples of some rows, in the order of the rows. A row may give any number of examples.

        What the log should say about rows, such as how many were cut, is yielded as a `minilm.Remark`.

        rows: dictionaries with the keys of `columns`. `row.where` names the place of a row, for error messages.
        tokenizer: its `model_max_length` is `batch.max_length`, so that `truncation=True` cuts there.
        fields: what `fields` returned.

        Raise ValueError for a row that cannot be used.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define `examples`")

    def prepare(self, config: Config, memory: MemoryDocuments | None = None) -> PreparedData:
        """Return the tokenizer and the examples for training and evaluation.

        A run calls this first on one process of each host, which fills the cache, and then on the others. Raises
        ValueError for settings or data that the objective cannot use.

        memory: documents from Python, to read in place of `data.source`.
        """
        return prepare_examples(self, config, memory)

    def training_texts(self, config: Config) -> Iterator[str]:
        """Yield the text of each training document, in the order of `Examples.document_bounds`.

        A row without a text in the column `data.column` counts as an empty text.
        """
        train, _ = load_row_tables(config.data, config.run.seed, build_role_columns(self, config.data))
        for row in (row for batch in train.iter_batches() for row in batch):
            text = row.get("text")
            yield text if isinstance(text, str) else ""

    # The loss.

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return a loss for each target or example, float32[N] or [E], in nats. The default is the cross entropy.

        outputs: float32, in the shape that `Objective.outputs` says.
        targets: what the examples hold: int64[N] for tokens, or int64 or float32[E, …].
        """
        return F.cross_entropy(outputs, targets, reduction="none")

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Any]:
        """Return the figures of an evaluation by their names in `figures`. `eval_loss` is the mean of `loss` otherwise.

        The arguments are those of `loss`, for all evaluation examples of all processes, on the CPU. A figure is a
        number or a scalar tensor.
        """
        return {}

    def metrics_with_notes(self, outputs: Tensor, targets: Tensor, notes: Sequence[Any]) -> Mapping[str, Any]:
        """Return the same as `metrics`, for figures that need more than numbers. Override one of the two.

        notes: the `note` of each example. They come from a file one by one, so that they never fill the memory.
        """
        return self.metrics(outputs, targets)

    def describe_examples(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Return what the ledger of a run keeps of each target or example, by name.

        The default is `loss`. An objective whose examples have one right answer adds `correct`, bool[E]. The result is
        empty if all examples have one loss together. The arguments are those of `metrics`, or of a part of the examples
        if the loss compares them.
        """
        return {"loss": self.loss(outputs, targets)}

    def compare_with_teacher(self, outputs: Tensor, expected: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return how far the model is from its teacher at each target or example, float32[N] or [E], in nats.

        The default is for logits of classes on the last axis: the Kullback-Leibler divergence of the teacher's
        distribution from the model's, both with logits divided by the temperature, times its square (Hinton et al.
        2015, section 2).

        outputs, expected: what the model and the teacher give, in the shape that `Objective.outputs` says.
        """
        # A logit of -inf fills a place after the end of a row, or a missing row. -inf - (-inf) would be NaN.
        ours, theirs = ((x.clamp(min=_LOWEST_LOGIT) / temperature).log_softmax(-1) for x in (outputs, expected))
        return temperature**2 * F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)

    # The parts of a run.

    def check(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        """Raise ValueError for a model that the objective cannot train, or a text that `sample` cannot use.

        A run calls this after it has built the model, before `head`.

        texts: `run.samples` of the configuration.
        """
        if texts and type(self).sample is Objective.sample:
            raise ValueError(f"run.samples: {type(self).__name__} has no method `sample`; leave run.samples out")
        if self.outputs == "next_tokens":
            check_causal(network, "; where the model can be made one, pass --model.config.is-decoder True")

    def head(self, network: PreTrainedModel, prepared: PreparedData) -> Head:
        """Return the module that computes the loss of each target in a micro-batch.

        A run calls this once, when the model is on its device. `forward` of the module takes `input_ids_T`, `packing`,
        `target_index_N`, `target_ids_N` and `type_ids_T` of a `MicroBatch`, and returns the losses, float32[N], in
        nats. Raise ValueError if the examples hold ids that the model cannot read.
        """

        def compute_losses(outputs: Tensor, targets: Tensor, packing: Packing) -> Tensor:
            arranged = arrange_outputs(outputs, self.outputs, packing.lengths, packing.rows_per_example)
            # A product of matrices inside the loss must not lose the precision that the outputs have.
            with torch.autocast(outputs.device.type, enabled=False):
                losses = self.loss(arranged, targets)
            if losses.shape != targets.shape[:1]:
                raise ValueError(
                    f"{type(self).__name__}.loss gave a tensor of shape {[*losses.shape]} for {len(targets)} targets: "
                    "return one loss for each, without a mean"
                )
            return losses

        head = self._build_head(network, compute_losses)
        if self.couples_examples:
            head.coupled_rows = len(prepared.train.row_lengths(0))
        check_compatibility(head, prepared)
        return head

    def _build_head(self, network: PreTrainedModel, loss: Any) -> Head:
        if self.outputs == "next_tokens" and type(self).loss is Objective.loss:
            return SparseHead(network)
        if self.outputs in ("targets", "next_tokens", "tokens"):
            return SparseHead(network, loss=loss)
        if self.outputs == "rows":
            return RowHead(network, loss=loss)
        pooling: Any = self.outputs
        return EmbeddingHead(network, pooling=pooling, loss=loss)

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
        return ExampleCollator(examples, self.outputs, padded=padded, multiple=multiple)

    def evaluator(self, prepared: PreparedData, micro_tokens: int, *, padded: bool, multiple: int) -> Evaluator:
        """Return the evaluation of `prepared.eval`. A run calls this once, before the first step.

        Raise ValueError if the examples cannot be evaluated.

        micro_tokens: the maximum number of tokens in a forward pass. The figures must not depend on it.
        padded, multiple: as in `minilm.data.batch_plan.Plan`.
        """
        collator = ExampleCollator(prepared.eval, self.outputs, padded=padded, multiple=multiple)
        if self.outputs == "next_tokens" and not self.figures:
            return TargetLossEvaluator(prepared=prepared, collator=collator, micro_tokens=micro_tokens)
        return ExampleEvaluator(
            objective=self,
            prepared=prepared,
            collator=collator,
            micro_tokens=micro_tokens,
            own_names=self.figures,
        )

    # The result.

    library: ClassVar[str] = "transformers"
    """The hub's name of the library that loads the model."""

    def extra_files(self, network: PreTrainedModel, config: Config) -> Mapping[str, str]:
        """Return the files to write beside the saved model: their text by their path in the folder.

        config: the settings of the run.
        """
        return {}

    def usage(self, address: str) -> str:
        """Return lines of Python for the model card that load the model from a folder or hub id."""
        return f'from transformers import pipeline\n\nmodel = pipeline("{self.pipeline}", model="{address}")'

    @property
    def pipeline(self) -> str:
        """The name of the task on the hub and in `transformers.pipeline`, such as "fill-mask"."""
        return _PIPELINES.get(self.auto.__name__, "feature-extraction")

    def format_figures(self, figures: dict[str, float]) -> str:
        """Return the figures of an evaluation as one line for the log."""
        return ", ".join(f"{name.replace('eval_', 'evaluation ')} {value:.3f}" for name, value in figures.items())

    @property
    def card_text(self) -> str:
        """A paragraph for the model card that says what the figures of the evaluation mean."""
        return (
            "The evaluation uses documents that training did not see; `eval_loss` is their mean loss, and each figure\n"
            "is computed once over all of them."
        )

    def sample(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        """Return the model's output for a text, for people to read.

        The main process calls this for each of `run.samples` at the end of a run, with the saved model in float32 and
        in evaluation mode.
        """
        raise NotImplementedError

    def command(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return a shell command that tries the model in `folder`. The last line of a run's log shows it."""
        return f"minilm evaluate {folder}"
