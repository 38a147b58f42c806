"""Token classification: predict a tag for each word, such as an entity, a chunk or a part of speech.

Axes: N targets, C tags.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import Config, Data, TokenClassification
from minilm.data.corpus import PreparedData
from minilm.data.example import NO_TARGET, Example, Remark
from minilm.data.rows import Row, RowTable
from minilm.data.word_rows import encode_words
from minilm.data.word_tags import find_scheme, read_tags, read_words, sort_tags
from minilm.models.inference_tags import tag_texts
from minilm.models.model_config import read_model_labels
from minilm.objectives.evaluator import Evaluator
from minilm.objectives.metrics import compute_tag_figures
from minilm.objectives.objective import Objective
from minilm.utils.shell import format_command
from minilm.utils.validation import suggest_name


@dataclass(frozen=True)
class TokenClassificationObjective(Objective):
    """The tag of each word, predicted at the word's first token."""

    settings: TokenClassification
    tags: tuple[str, ...] = ()
    """The names of the tags by id, for the figures of an evaluation."""
    auto = AutoModelForTokenClassification
    pairs = False
    figures = ("precision", "recall", "f1", "accuracy")
    title = "token classifier"

    def columns(self, data: Data) -> dict[str, str]:
        return {
            "word_list": "tokens" if data.column == Data.column else data.column,
            "label": "ner_tags" if data.label_column == Data.label_column else data.label_column,
        }

    def texts(self, row: Row) -> list[str]:
        return [" ".join(read_words(row))]

    def fields(self, rows: RowTable, config: Config) -> dict[str, Any]:
        class_names = rows.class_names.get("label", ())
        found = {tag for batch in rows.iter_batches() for row in batch for tag in read_tags(row, class_names, "plain")}
        model_labels = read_model_labels(config.model.name, "TokenClassification")
        are_ids = not class_names and _are_ids(found, model_labels)
        if are_ids:
            class_names, found = model_labels, {model_labels[int(tag)] for tag in found}
        scheme = find_scheme(self.settings.scheme, class_names or found)
        if scheme == "iob1":
            # Spans of IOB1 also begin with tags that the rows may not have.
            found = {*sort_tags(found, scheme)}
        if found <= {*model_labels}:
            names = model_labels
        elif class_names:
            names = (*class_names, *sorted(found - {*class_names}))
        else:
            names = tuple(sort_tags(found, scheme))
        return {
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
            "_class_names": class_names,
            "_scheme": find_scheme(self.settings.scheme, names),
            "_are_ids": are_ids,
        }

    def examples(
        self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]
    ) -> Iterator[Example | Remark]:
        tags = [read_tags(row, fields["_class_names"], fields["_scheme"]) for row in rows]
        targets = [_find_ids(row, own, fields["label2id"]) for row, own in zip(rows, tags, strict=True)]
        longest = tokenizer.model_max_length
        encoded = [*encode_words(tokenizer, [row["word_list"] for row in rows], longest)]
        for own, sentence in zip(targets, encoded, strict=True):
            for number, part in enumerate(sentence.rows):
                yield Example(
                    ids=part.ids,
                    type_ids=part.type_ids,
                    targets=[NO_TARGET if word is None else own[word] for word in part.words],
                    # The rows of a sentence follow each other. The first one notes the number of all their targets.
                    note=0 if number else len(own) - sentence.missing,
                )
        if fields["_are_ids"]:
            names = ", ".join(f"{index} is {name}" for index, name in fields["id2label"].items())
            yield Remark(f"rows have numbers as tags, which are read as those of the model: {names}", len(rows))
        if missing := sum(sentence.missing for sentence in encoded):
            yield Remark("words have no token, so that their tags are not used", missing)
        if split := sum(len(sentence.rows) > 1 for sentence in encoded):
            yield Remark(f"rows have more than batch.max_length={longest} tokens and are split between words", split)
        if cut := sum(sentence.cut for sentence in encoded):
            yield Remark(f"words alone have more than batch.max_length={longest} tokens and lose their ends", cut)

    def evaluator(self, prepared: PreparedData, micro_tokens: int, *, padded: bool, multiple: int) -> Evaluator:
        named = replace(self, tags=tuple(prepared.fields["id2label"].values()))
        return super(TokenClassificationObjective, named).evaluator(
            prepared, micro_tokens, padded=padded, multiple=multiple
        )

    def metrics_with_notes(self, outputs: Tensor, targets: Tensor, notes: Sequence[Any]) -> Mapping[str, float]:
        counts = [count for count in notes if count]
        expected, predicted = (
            [[self.tags[index] for index in row.tolist()] for row in torch.split(ids_N, counts)]
            for ids_N in (targets, outputs.argmax(1))
        )
        spans = find_scheme(self.settings.scheme, self.tags) != "plain"
        return compute_tag_figures(expected, predicted, spans=spans)

    @property
    def card_text(self) -> str:
        return (
            "The evaluation uses sentences that training did not see. `accuracy` is the share of words with the right\n"
            "tag. If the tags mark spans (IOB2), `precision`, `recall` and `f1` count spans, as seqeval does. If not,\n"
            "they are means over the tags. `eval_loss` is the mean of -log p of the right tag of a word."
        )

    def usage(self, address: str) -> str:
        call = f'pipeline("{self.pipeline}", model="{address}", aggregation_strategy="first")'
        return f"from transformers import pipeline\n\nmodel = {call}"

    def sample(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        (spans,) = tag_texts(network, tokenizer, [text])
        return ", ".join(f"{span.text} ({span.label} {span.score:.2f})" for span in spans) or "only O"

    def command(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
        return format_command("tag", folder, "…")


def _are_ids(tags: Set[str], model_labels: Sequence[str]) -> bool:
    """Return whether the tags are numbers that can only be the ids of a checkpoint's tags."""
    numbers = all(map(str.isdecimal, tags)) and not tags & {*model_labels}
    return numbers and all(int(tag) < len(model_labels) for tag in tags)


def _find_ids(row: Row, tags: Sequence[str], ids: Mapping[str, int]) -> list[int]:
    """Return the id of the tag of each word. Raise ValueError for a tag without one."""
    for number, tag in enumerate(tags):
        if tag not in ids:
            raise ValueError(
                f"{row.where}, word {number + 1} ({row['word_list'][number]!r}): the training rows do not have the tag "
                f"{suggest_name(tag, [*ids])} Correct the tag, or give the training rows one"
            )
    return [ids[tag] for tag in tags]
