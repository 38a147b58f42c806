"""Objectives as a user writes them, and rows for them."""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
)

import minilm
from minilm import (
    Batch,
    Config,
    Data,
    Example,
    Model,
    MultipleChoice,
    Optim,
    QuestionAnswering,
    SentenceEmbedding,
    TokenClassification,
    Tokens,
)
from minilm.config import ObjectiveSettings

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# MPNet's own attention code needs padding.
MODELS = {
    "packed": Model(type="bert", config={**SIZE, **NO_DROPOUT}),
    "padded": Model(type="mpnet", config={**SIZE, **NO_DROPOUT}),
}
TAGS = ("animal", "colour", "other")
WORDS = {"fox": 0, "dog": 0, "cat": 0, "red": 1, "green": 1, "blue": 1, "the": 2, "runs": 2, "and": 2, "sleeps": 2}


class Tagging(minilm.Objective):
    """A tag for each word, predicted at its first token."""

    auto = AutoModelForTokenClassification
    figures = ("accuracy",)
    title = "tagger"

    def columns(self, data: Data) -> dict[str, str]:
        return {"words": "words", "tags": "tags"}

    def fields(self, rows: Any, config: Any) -> dict[str, Any]:
        return {"id2label": dict(enumerate(TAGS)), "label2id": {tag: number for number, tag in enumerate(TAGS)}}

    def examples(self, rows: Any, tokenizer: Any, fields: Mapping[str, Any]) -> Iterator[Example]:
        encoded = tokenizer([row["words"] for row in rows], is_split_into_words=True, truncation=True)
        for number, row in enumerate(rows):
            words = encoded.word_ids(number)
            targets = [
                fields["label2id"][row["tags"][word]] if word is not None and word != before else -100
                for before, word in zip([None, *words], words, strict=False)
            ]
            yield Example(ids=encoded["input_ids"][number], targets=targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        return {"accuracy": (outputs.argmax(1) == targets).float().mean()}


class Contrastive(minilm.Objective):
    """Two texts that belong together are nearer to each other than to the other texts of the step."""

    auto = AutoModel
    outputs = "mean"
    couples_examples = True
    figures = ("accuracy",)

    def columns(self, data: Data) -> dict[str, str]:
        return {"first": "text", "second": "other"}

    def examples(self, rows: Any, tokenizer: Any, fields: Mapping[str, Any]) -> Iterator[Example]:
        for row in rows:
            yield Example(rows=tokenizer([row["first"], row["second"]], truncation=True)["input_ids"])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(_compare(outputs), torch.arange(len(outputs), device=outputs.device), reduction="none")

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        return {"accuracy": (_compare(outputs).argmax(1) == torch.arange(len(outputs))).float().mean()}


def _compare(outputs_Ex2xH: Tensor) -> Tensor:
    first, second = F.normalize(outputs_Ex2xH, dim=-1).unbind(1)
    return first @ second.T / 0.1


class Choice(minilm.Objective):
    """Which of several texts is right. The texts have different numbers of tokens, and the rows of choices."""

    auto = AutoModelForMultipleChoice
    outputs = "rows"
    equal_rows = False

    def columns(self, data: Data) -> dict[str, str]:
        return {"choices": "choices", "right": "right"}

    def examples(self, rows: Any, tokenizer: Any, fields: Mapping[str, Any]) -> Iterator[Example]:
        for row in rows:
            yield Example(rows=tokenizer(row["choices"], truncation=True)["input_ids"], target=row["right"])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs[..., 0], targets, reduction="none")


class Span(minilm.Objective):
    """The first and the last token of the first animal."""

    auto = AutoModelForQuestionAnswering
    outputs = "tokens"

    def columns(self, data: Data) -> dict[str, str]:
        return {"words": "words", "tags": "tags"}

    def examples(self, rows: Any, tokenizer: Any, fields: Mapping[str, Any]) -> Iterator[Example]:
        for row in rows:
            encoded = tokenizer(row["words"], is_split_into_words=True, truncation=True)
            words, wanted = encoded.word_ids(), row["tags"].index("animal")
            places = [place for place, word in enumerate(words) if word == wanted]
            yield Example(ids=encoded["input_ids"], target=[places[0], places[-1]])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        start, end = (F.cross_entropy(outputs[..., i], targets[:, i], reduction="none") for i in range(2))
        return (start + end) / 2


OWN = {"tags": Tagging(), "pairs": Contrastive(), "spans": Span()}
BUILT_IN: dict[str, ObjectiveSettings] = {
    "triplets": SentenceEmbedding(symmetric=True),
    "scores": SentenceEmbedding(pooling="first"),
    "cosines": SentenceEmbedding(pooling="last", score_loss="cosine"),
    "answers": QuestionAnswering(stride=10),
    "choices": MultipleChoice(choices=("choices",)),
    "names": TokenClassification(),
}
OBJECTIVES = {**OWN, **BUILT_IN}
# The columns that they read.
COLUMNS: dict[str, dict[str, Any]] = {
    "triplets": {"pair_column": "other", "negative_column": "third"},
    "scores": {"pair_column": "other", "score_column": "similarity"},
    "cosines": {"pair_column": "other", "score_column": "similarity"},
    "names": {"column": "words", "label_column": "spans"},
}


def build_config(name: str, source: str, **groups: Any) -> Config:
    """Return the configuration of a run with one of `OBJECTIVES` on rows of `write_rows`, with these groups changed."""
    config = Config(
        data=Data(source=source, eval_fraction=0.2, **COLUMNS.get(name, {})),
        tokens=Tokens(vocab_size=300),
        model=MODELS["packed"],
        objective=OBJECTIVES[name],
        batch=Batch(examples=10, max_length=48, micro_tokens=80),
        optim=Optim(lr=1e-3),
    )
    return replace(config, **groups)


def mark_spans(kinds: list[str]) -> list[str]:
    """Return tags of IOB2 for words of these kinds, in which `other` is outside of spans."""
    before = ["other", *kinds]
    return [
        "O" if kind == "other" else f"{'I' if kind == last else 'B'}-{kind}"
        for last, kind in zip(before, kinds, strict=False)
    ]


def write_rows(path: Path, count: int = 240) -> str:
    """Write rows that all these objectives can read."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            words = [*draw.choices([*WORDS], k=draw.randint(1, 30)), draw.choice(["fox", "dog", "cat"])]
            row = {
                "text": " ".join(words),
                "other": " ".join(draw.sample(words, len(words))),
                "words": words,
                "tags": [TAGS[WORDS[word]] for word in words],
                "spans": mark_spans([TAGS[WORDS[word]] for word in words]),
                "choices": [" ".join(draw.choices(words, k=draw.randint(2, 12))) for _ in range(2 + number % 3)],
                "right": number % 2,
                "third": " ".join(draw.sample(words, len(words) // 2 + 1)),
                "similarity": number / count,
                "question": f"Which animal runs? {' '.join(words[:2])}",
                "context": " ".join(words),
                "answers": {"text": [words[-1]], "answer_start": [len(" ".join(words[:-1])) + (len(words) > 1)]},
                "answer": number % 2,
            }
            file.write(json.dumps(row) + "\n")
    return str(path)
