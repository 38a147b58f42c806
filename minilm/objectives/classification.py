"""Sequence classification: predict a class, several labels or a number from one text or a pair of texts.

Axes: T tokens of the micro-batch, N its examples, C labels, E all examples.
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
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import Classification, Config
from minilm.data.corpus import Examples, PreparedData
from minilm.data.documents import load_documents
from minilm.data.labels import Labels, read_labels
from minilm.data.micro_batch import MicroBatch, concatenate_rows
from minilm.data.special_ids import encode_placeholder
from minilm.data.splits import is_one_dataset
from minilm.data.text_pairs import encode_pairs
from minilm.data.tokenizer import load_tokenizer
from minilm.models.compatibility import check_compatibility
from minilm.models.inference import classify
from minilm.models.model_config import count_token_types, load_configuration
from minilm.models.row_head import RowHead
from minilm.objectives.classification_loss import ClassificationLoss
from minilm.objectives.evaluation import ClassificationEvaluator
from minilm.utils.shell import format_command

log = logging.getLogger("minilm")


class ClassificationCollator:
    """A collator that joins rows of token ids. Each row has one target, its label, at its first token.

    examples: the examples that the rows come from, with `labels`.
    padded, multiple: as in `minilm.data.batch_plan.Plan`.
    """

    def __init__(self, examples: Examples, *, padded: bool, multiple: int) -> None:
        assert examples.labels is not None
        self.labels, self.examples = examples.labels, examples
        self.padded, self.multiple = padded, multiple

    def rate(self, progress: float = 0.0) -> float:
        """Return 0 as the share of the tokens that are targets, since one target per row costs almost nothing."""
        return 0.0

    def __call__(
        self, rows: Sequence[NDArray[np.int64]], examples: NDArray[np.int64], epoch: int, progress: float = 0.0
    ) -> MicroBatch:
        """Return a micro-batch of the rows; `rows[i]` holds the token ids of example `examples[i]`.

        Ignores `epoch` and `progress`.
        """
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


class ClassificationObjective:
    """Sequence classification (`minilm.objectives.objective.Objective`)."""

    auto: Any = AutoModelForSequenceClassification
    pipeline = "text-classification"
    title = "text classifier"
    card_text = (
        "The evaluation classifies documents that training did not see; `eval_loss` is their mean loss, and each\n"
        "figure is computed once over all of them."
    )

    def __init__(self, settings: Classification) -> None:
        self.settings = settings

    def prepare(self, config: Config) -> PreparedData:
        """Return the tokenizer, the examples and the labels, from the cache if it has them."""
        _check_settings(config)
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
        # None if the configuration of the model does not say.
        token_types = count_token_types(config.model, self.auto)
        if token_types in (0, 1) and "token_type_ids" in tokenizer.model_input_names:
            _disable_token_types(tokenizer, token_types, pair="pair" in train.column_names)

        def encode_examples(documents: Dataset, values: NDArray[Any], name: str) -> Examples:
            examples = encode_pairs(
                documents,
                tokenizer,
                values,
                max_length=config.batch.max_length,
                name=name,
                zero_types=token_types is None,
            )
            return replace(examples, fingerprint=_compute_fingerprint(examples, labels, values))

        if is_one_dataset(train, parts):
            train_examples = eval_examples = encode_examples(train, eval_labels, "documents")
        else:
            held_out = concatenate_datasets([part.remove_columns("label") for part in parts.values()])
            train_examples = encode_examples(train, train_labels, "training documents")
            eval_examples = encode_examples(held_out, eval_labels, "evaluation documents")
        return PreparedData(
            tokenizer=tokenizer,
            train=train_examples,
            eval=eval_examples,
            labels=labels,
            eval_parts={name: len(part) for name, part in parts.items()},
            fields=labels.fields(),
        )

    def head(self, network: PreTrainedModel, prepared: PreparedData) -> RowHead:
        assert prepared.labels is not None
        smoothing = self.settings.label_smoothing
        head = RowHead(network, loss=ClassificationLoss(prepared.labels, smoothing=smoothing, device=network.device))
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
    ) -> ClassificationCollator:
        return ClassificationCollator(examples, padded=padded, multiple=multiple)

    def evaluator(
        self, prepared: PreparedData, micro_tokens: int, *, padded: bool, multiple: int
    ) -> ClassificationEvaluator:
        assert prepared.labels is not None
        return ClassificationEvaluator(
            examples=prepared.eval,
            collator=ClassificationCollator(prepared.eval, padded=padded, multiple=multiple),
            parts=prepared.eval_parts,
            problem=prepared.labels.problem,
            micro_tokens=micro_tokens,
        )

    def format_figures(self, figures: dict[str, float]) -> str:
        return ", ".join(f"{name.replace('eval_', 'evaluation ')} {value:.3f}" for name, value in figures.items())

    def check(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        """Raise nothing: any classifier can be trained, and any text can be classified."""

    def sample(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        predictions = classify(network, tokenizer, [text])[0]
        return ", ".join(f"{each.label} ({each.score:.2f})" for each in predictions[:3])

    def command(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
        return format_command("classify", folder, "…")


def read_model_labels(name: str | None) -> tuple[str, ...]:
    """Return the names of the labels, by id, of a checkpoint that is a sequence classifier; () for any other model.

    name: a folder or a hub id; None for a new model.
    """
    if name is None:
        return ()
    config = load_configuration(name)
    is_classifier = any(str(kind).endswith("ForSequenceClassification") for kind in config.architectures or ())
    # The pipelines of transformers name labels by id2label. label2id may be missing, or may contradict it.
    return tuple(str(config.id2label[index]) for index in sorted(config.id2label)) if is_classifier else ()


def _check_settings(config: Config) -> None:
    """Raise ValueError for settings that a classifier cannot use."""
    if config.batch.layout == "blocks":
        raise ValueError(
            "batch.layout blocks joins documents, but a classifier reads each document by itself: take another layout"
        )
    for field in ("id2label", "label2id", "problem_type"):
        if field in config.model.config:
            raise ValueError(f"model.config.{field}: the labels of the data decide it; leave it out")


def _disable_token_types(tokenizer: PreTrainedTokenizerBase, count: int, *, pair: bool) -> None:
    """Make the tokenizer return no token types, for a model that has `count` embeddings of them (0 or 1).

    Log a warning if the tokenizer gives a type other than 0 to a text, or to a `pair` of texts.
    """
    if any(encode_placeholder(tokenizer, pair=pair).type_ids):
        log.warning(
            f"the tokenizer gives token types, but the model takes {'only one' if count else 'none'}: they are left out"
        )
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = names
    # save_pretrained writes this one.
    tokenizer.init_kwargs["model_input_names"] = names


def _compute_fingerprint(examples: Examples, labels: Labels, values: NDArray[Any]) -> str:
    """Return a hash of the documents, the tokenizer, the names of the labels and the label of each example."""
    digest = hashlib.blake2b(examples.fingerprint.encode(), digest_size=12)
    digest.update(json.dumps([labels.problem, labels.names]).encode() + values.tobytes())
    return digest.hexdigest()
