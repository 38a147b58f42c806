"""Sequence classification: predict a class, several labels or a number from one text or a pair of texts."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import Classification, Config
from minilm.data.corpus import Examples, PreparedData
from minilm.data.document_texts import find_text_columns, fingerprint_documents, iterate_batches
from minilm.data.documents import load_documents
from minilm.data.labels import Labels, read_labels
from minilm.data.memory import MemoryDocuments
from minilm.data.splits import is_one_dataset
from minilm.data.text_pairs import encode_pairs
from minilm.data.tokenizer import load_tokenizer
from minilm.models.compatibility import check_compatibility
from minilm.models.inference import classify
from minilm.models.model_config import read_model_labels
from minilm.models.row_head import RowHead
from minilm.models.token_types import fit_token_types
from minilm.objectives.classification_loss import ClassificationLoss, compute_classification_losses
from minilm.objectives.evaluator import Evaluator
from minilm.objectives.example_batches import ExampleCollator
from minilm.objectives.example_evaluation import ExampleEvaluator
from minilm.objectives.metrics import (
    CLASSIFICATION_FIGURES,
    compute_classification_figures,
    compute_label_losses,
    find_problem,
)
from minilm.objectives.objective import Objective
from minilm.utils.shell import format_command


@dataclass(frozen=True)
class ClassificationObjective(Objective):
    """Sequence classification: a class, several labels or a number for each text or pair of texts."""

    settings: Classification
    auto = AutoModelForSequenceClassification
    outputs = "rows"
    title = "text classifier"

    def prepare(self, config: Config, memory: MemoryDocuments | None = None) -> PreparedData:
        _check_settings(config)
        data = config.data
        train, parts = load_documents(data, config.run.seed, labels=True, memory=memory)
        labels, train_labels, eval_labels = read_labels(
            train,
            parts,
            self.settings,
            read_model_labels(config.model.name),
            column=data.label_column,
            separator=data.label_separator,
        )
        tokenizer = load_tokenizer(config.tokens, config.model.name, train)
        token_types = fit_token_types(tokenizer, config.model, self.auto, pair="pair" in train.column_names)

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
            held_out = train
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
            eval_documents=fingerprint_documents(
                held_out,
                [labels.problem, labels.names, hashlib.sha256(eval_labels.tobytes()).hexdigest()],
                columns=find_text_columns(held_out),
            ),
        )

    def training_texts(self, config: Config) -> Iterator[str]:
        train, _ = load_documents(config.data, config.run.seed, labels=True)
        return chain.from_iterable(iterate_batches(train))

    def head(self, network: PreTrainedModel, prepared: PreparedData) -> RowHead:
        assert prepared.labels is not None
        smoothing = self.settings.label_smoothing
        head = RowHead(network, loss=ClassificationLoss(prepared.labels, smoothing=smoothing, device=network.device))
        check_compatibility(head, prepared)
        return head

    def evaluator(self, prepared: PreparedData, micro_tokens: int, *, padded: bool, multiple: int) -> Evaluator:
        assert prepared.labels is not None
        return ExampleEvaluator(
            objective=self,
            prepared=prepared,
            collator=ExampleCollator(prepared.eval, self.outputs, padded=padded, multiple=multiple),
            micro_tokens=micro_tokens,
            own_names=CLASSIFICATION_FIGURES[prepared.labels.problem],
        )

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Any]:
        return compute_classification_figures(outputs.double().numpy(), targets.numpy())

    def describe_examples(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        losses = torch.from_numpy(compute_label_losses(outputs.double().numpy(), targets.numpy()))
        problem = find_problem(targets.numpy())
        if problem == "regression":
            return {"loss": losses}
        right = outputs.argmax(1) == targets if problem == "single-label" else ((outputs > 0) == (targets > 0)).all(1)
        return {"loss": losses, "correct": right}

    def compare_with_teacher(self, outputs: Tensor, expected: Tensor, targets: Tensor, temperature: float) -> Tensor:
        problem = find_problem(targets.cpu().numpy()[:0])
        if problem == "single-label":
            return super().compare_with_teacher(outputs, expected, targets, temperature)
        if problem == "regression":
            return compute_classification_losses(outputs, expected[:, 0], problem)
        return compute_classification_losses(outputs, expected.sigmoid(), problem)

    def check(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        """Raise nothing: any classifier can be trained, and any text can be classified."""

    def sample(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        predictions = classify(network, tokenizer, [text])[0]
        return ", ".join(f"{each.label} ({each.score:.2f})" for each in predictions[:3])

    def command(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
        return format_command("classify", folder, "…")


def _check_settings(config: Config) -> None:
    """Raise ValueError for settings that a classifier cannot use."""
    if config.batch.layout == "blocks":
        raise ValueError(
            "batch.layout blocks joins documents, but a classifier reads each document by itself: take another layout"
        )
    for field in ("id2label", "label2id", "problem_type"):
        if field in config.model.config:
            raise ValueError(f"model.config.{field}: the labels of the data decide it; leave it out")


def _compute_fingerprint(examples: Examples, labels: Labels, values: NDArray[Any]) -> str:
    """Return a hash of the documents, the tokenizer, the names of the labels and the label of each example."""
    digest = hashlib.blake2b(examples.fingerprint.encode(), digest_size=12)
    digest.update(json.dumps([labels.problem, labels.names]).encode() + values.tobytes())
    return digest.hexdigest()
