"""Sequence classification: from one text or a pair of texts to a class, several labels or a number.

Axes: T tokens of the micro-batch, R its rows, N its examples (as many as the rows, except in an empty batch), C labels,
E all examples.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import Classification, Config
from minilm.data.corpus import Examples, PreparedData
from minilm.data.documents import load_documents
from minilm.data.labels import Labels, read_labels
from minilm.data.micro_batch import MicroBatch, concatenate_rows
from minilm.data.packing import Packing
from minilm.data.special_ids import encode_placeholder
from minilm.data.splits import is_one_dataset
from minilm.data.text_pairs import encode_pairs
from minilm.data.tokenizer import load_tokenizer
from minilm.models.compatibility import check_compatibility
from minilm.models.head import Head
from minilm.models.inference import classify
from minilm.models.layers import AFTER_ATTENTION, uses_gradient_checkpointing
from minilm.models.model_config import count_token_types, load_configuration
from minilm.models.temporary_changes import evaluation_mode, randomize_constant_parameters
from minilm.objectives.metrics import ClassEvaluator
from minilm.utils.shell import format_command

log = logging.getLogger("minilm")


class ClassCollator:
    """Joins rows of token ids; each row has one target, its label.

    `padded` and `multiple` are those of `minilm.data.batch_plan.Plan`.
    """

    def __init__(self, examples: Examples, *, padded: bool, multiple: int) -> None:
        assert examples.labels is not None
        self.labels, self.examples = examples.labels, examples
        self.padded, self.multiple = padded, multiple

    def rate(self, progress: float = 0.0) -> float:
        """Return 0: an example costs next to nothing in addition to its tokens."""
        return 0.0

    def __call__(
        self, rows: Sequence[NDArray[np.int64]], examples: NDArray[np.int64], epoch: int, progress: float = 0.0
    ) -> MicroBatch:
        """Return a batch of rows; `rows[i]` holds the ids of example `examples[i]`. Ignores `epoch` and `progress`."""
        ids_T, packing = concatenate_rows(rows, padded=self.padded, multiple=self.multiple)
        types_T = None
        if self.examples.type_ids is not None:
            types_T = np.concatenate(
                [self.examples.token_type_ids(int(i)) for i in examples] or [np.zeros(1, np.int64)]
            )
        return MicroBatch(
            input_ids_T=torch.from_numpy(ids_T),
            packing=packing,
            target_index_N=(packing.position_T == 0).nonzero()[: len(rows), 0],
            target_ids_N=torch.from_numpy(self.labels[examples]),
            type_ids_T=None if types_T is None else torch.from_numpy(types_T),
        )


class ClassHead(Head):
    """The losses of a sequence classifier on a packed batch.

    It takes two shortcuts where a trial shows that they do not change a logit. `padding_free` joins rows without
    padding, for models that classify a row by its first token. `short` runs only these first tokens through the part of
    the last layer that follows attention.
    """

    def __init__(self, model: PreTrainedModel, labels: Labels, *, label_smoothing: float = 0.0) -> None:
        super().__init__(model)
        self.label_smoothing = label_smoothing
        self.short = False
        self._first_R: Tensor | None = None
        self._problem = labels.problem
        weights = None if labels.weights is None else torch.from_numpy(labels.weights)
        self._weight_C = None if weights is None else weights.to(model.device)
        with evaluation_mode(model), randomize_constant_parameters(model):
            expected_RxC = self._try_padded()
            if not self.needs_equal_lengths:
                self._try_first_tokens(expected_RxC)
            self.misread_ids = self._find_misread_ids()

    @property
    def summary(self) -> str:
        if self.padding_free:
            return "classes from first tokens, without padding"
        return (
            "rows of one length at a time, since padding changes its logits"
            if self.needs_equal_lengths
            else "padded rows"
        )

    def forward(
        self,
        input_ids_T: Tensor,
        packing: Packing,
        target_index_N: Tensor,
        labels: Tensor | None = None,
        type_ids_T: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each example, float32[N], or without labels the logits, float32[N, C]."""
        logits_NxC = self.logits(input_ids_T, packing, target_index_N, type_ids_T).float()
        if labels is None:
            return logits_NxC
        return losses(logits_NxC, labels, self._problem, self._weight_C, self.label_smoothing)

    def logits(
        self, input_ids_T: Tensor, packing: Packing, target_index_N: Tensor, type_ids_T: Tensor | None = None
    ) -> Tensor:
        """Return the logits, N x C, of the first N rows of the batch, which begin at `target_index_N`."""
        if self.needs_equal_lengths:
            runs = self._run_equal_lengths(input_ids_T, packing, type_ids_T)
            return torch.cat([logits_RxC for _, logits_RxC in runs])[: len(target_index_N)]
        first_R = target_index_N if len(target_index_N) else target_index_N.new_zeros(1)
        self._first_R = first_R if self.padding_free else None
        try:
            logits_RxC: Tensor = self.model(**self._make_inputs(input_ids_T, packing, type_ids_T)).logits
        finally:
            self._first_R = None
        return logits_RxC[: len(target_index_N)]

    def _trial_logits(self, input_ids_T: Tensor, lengths: Sequence[int]) -> Tensor:
        packing = self._pack(lengths)
        return self.logits(input_ids_T, packing, (packing.position_T == 0).nonzero()[:, 0])

    def _try_first_tokens(self, expected_RxC: Tensor) -> None:
        if not self.layers:
            return
        layer = self.layers[-1]
        # The backward pass may recompute a layer; by then `_first_R` is no longer set, so a hook inside it would fail.
        for names in (None,) if uses_gradient_checkpointing(self.model) else (*AFTER_ATTENTION, None):
            try:
                handle = (
                    layer.register_forward_hook(self._reduce_output)
                    if names is None
                    else layer.get_submodule(names[0]).register_forward_pre_hook(self._reduce_inputs)
                )
            except AttributeError:
                continue
            self._try_padding_free(expected_RxC)
            if self.padding_free:
                self.short = names is not None
                return
            handle.remove()

    def _reduce_inputs(self, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        if self._first_R is None:
            return None
        return tuple(_first_tokens(hidden_1xTxH, self._first_R) for hidden_1xTxH in inputs)

    def _reduce_output(self, module: nn.Module, inputs: object, output: Any) -> Any:
        if self._first_R is None:
            return None
        if isinstance(output, tuple):
            return (_first_tokens(output[0], self._first_R), *output[1:])
        return _first_tokens(output, self._first_R)


def _first_tokens(hidden_1xTxH: Tensor, first_R: Tensor) -> Tensor:
    """Return the hidden states of the rows' first tokens, R x 1 x H."""
    return hidden_1xTxH[0].index_select(0, first_R)[:, None]


def losses(
    logits_NxC: Tensor, labels: Tensor, problem: str, weight_C: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Return the loss of each example, float32[N].

    single-label (labels int64[N]): the cross entropy, with a share `smoothing` of the target spread evenly over all
    classes (Szegedy et al. 2016, section 7), times the weight of the example's class. multi-label (labels float32[N,
    C]): the mean over labels of their binary cross entropies. regression (labels float32[N]): the squared error.
    """
    if problem == "regression":
        return F.mse_loss(logits_NxC[:, 0], labels, reduction="none")
    if problem == "multi-label":
        return F.binary_cross_entropy_with_logits(logits_NxC, labels, reduction="none").mean(1)
    nats_N = F.cross_entropy(logits_NxC, labels, reduction="none", label_smoothing=smoothing)
    return nats_N if weight_C is None else nats_N * weight_C[labels]


class Classify:
    """Sequence classification."""

    auto: Any = AutoModelForSequenceClassification
    pipeline, title = "text-classification", "text classifier"
    explained = (
        "The evaluation classifies documents that training did not see; `eval_loss` is their mean loss, and each\n"
        "figure is computed once over all of them."
    )

    def __init__(self, settings: Classification) -> None:
        self.settings = settings

    def prepare(self, config: Config) -> PreparedData:
        if config.batch.layout == "blocks":
            raise ValueError(
                f"batch.layout {config.batch.layout} joins documents, but a classification needs each alone"
            )
        for field in ("id2label", "label2id", "problem_type"):
            if field in config.model.config:
                raise ValueError(f"model.config.{field}: the labels of the data decide it; leave it out")
        data = config.data
        train, parts = load_documents(data, config.run.seed, labels=True)
        labels, train_labels, eval_labels = read_labels(
            train,
            parts,
            self.settings,
            read_model_labels(config.model.name),
            column=data.label_column,
            separator=data.label_separator,
        )
        tokenizer = load_tokenizer(config.tokens, config.model.name, train)
        count = count_token_types(config.model, self.auto)
        if count is not None and count < 2 and "token_type_ids" in tokenizer.model_input_names:
            _leave_out_types(tokenizer, count, pair="pair" in train.column_names)

        def encode(documents: Dataset, values: NDArray[Any], name: str) -> Examples:
            examples = encode_pairs(
                documents,
                tokenizer,
                values,
                max_length=config.batch.max_length,
                name=name,
                zero_types=count is None,
            )
            digest = hashlib.blake2b(examples.fingerprint.encode(), digest_size=12)
            digest.update(json.dumps([labels.problem, labels.names]).encode() + values.tobytes())
            return replace(examples, fingerprint=digest.hexdigest())

        if is_one_dataset(train, parts):
            train_examples = eval_examples = encode(train, eval_labels, "documents")
        else:
            held_out = concatenate_datasets([part.remove_columns("label") for part in parts.values()])
            train_examples = encode(train, train_labels, "training documents")
            eval_examples = encode(held_out, eval_labels, "evaluation documents")
        return PreparedData(
            tokenizer=tokenizer,
            train=train_examples,
            eval=eval_examples,
            labels=labels,
            eval_parts={name: len(part) for name, part in parts.items()},
            fields=labels.fields(),
        )

    def head(self, network: PreTrainedModel, prepared: PreparedData) -> ClassHead:
        assert prepared.labels is not None
        head = ClassHead(network, prepared.labels, label_smoothing=self.settings.label_smoothing)
        check_compatibility(head, prepared)
        return head

    def collator(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        seed: int | None,
        padded: bool,
        multiple: int,
    ) -> ClassCollator:
        return ClassCollator(examples, padded=padded, multiple=multiple)

    def evaluator(self, prepared: PreparedData, micro_tokens: int, *, padded: bool, multiple: int) -> ClassEvaluator:
        assert prepared.labels is not None
        return ClassEvaluator(
            examples=prepared.eval,
            collator=ClassCollator(prepared.eval, padded=padded, multiple=multiple),
            parts=prepared.eval_parts,
            problem=prepared.labels.problem,
            micro_tokens=micro_tokens,
        )

    def said(self, figures: dict[str, float]) -> str:
        return ", ".join(f"{name.replace('eval_', 'evaluation ')} {value:.3f}" for name, value in figures.items())

    def check(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        pass

    def sample(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        best = classify(network, tokenizer, [text])[0]
        return ", ".join(f"{label.label} ({label.score:.2f})" for label in best[:3])

    def command(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
        return format_command("classify", folder, "…")


def _leave_out_types(tokenizer: PreTrainedTokenizerBase, count: int, *, pair: bool) -> None:
    """Have the tokenizer give no token types, for a model with `count` embeddings of them (0 or 1).

    A warning says so if the tokenizer gives a type other than 0 to a text, or to a `pair` of texts.
    """
    if any(encode_placeholder(tokenizer, pair=pair).type_ids):
        log.warning(
            f"the tokenizer gives token types, but the model takes {'only one' if count else 'none'}: they are left out"
        )
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = names
    # save_pretrained writes this one.
    tokenizer.init_kwargs["model_input_names"] = names


def read_model_labels(name: str | None) -> tuple[str, ...]:
    """Return the labels, by id, of a checkpoint that is a sequence classifier; empty for any other model."""
    if name is None:
        return ()
    config = load_configuration(name)
    is_classifier = any(str(kind).endswith("ForSequenceClassification") for kind in config.architectures or ())
    # The pipelines of transformers answer with id2label. label2id may be missing, or may differ from it.
    return tuple(str(config.id2label[index]) for index in sorted(config.id2label)) if is_classifier else ()
