"""Multiple choice: predict which of several texts continues a text, or answers a question.

Axes: E examples, K choices.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForMultipleChoice, PreTrainedTokenizerBase

from minilm.config import Data, MultipleChoice
from minilm.data.encoding_errors import locate_encoding_errors
from minilm.data.example import Example, Remark
from minilm.data.rows import Row
from minilm.objectives.objective import Objective


@dataclass(frozen=True)
class MultipleChoiceObjective(Objective):
    """A logit for each choice: a row of tokens with the text and the choice. The right one has the largest."""

    settings: MultipleChoice
    auto = AutoModelForMultipleChoice
    outputs = "rows"
    equal_rows = False
    pairs = True
    figures = ("accuracy",)
    title = "model for multiple choice"

    def columns(self, data: Data) -> dict[str, str]:
        # SWAG's columns, or else those of questions with lists of choices.
        swag = self.settings.choices == MultipleChoice.choices
        text, pair, label = ("sent1", "sent2", "label") if swag else ("question", None, "answer")
        pair = data.pair_column or (pair if data.column == Data.column else None)
        return {
            "text": text if data.column == Data.column else data.column,
            **({} if pair is None else {"pair": pair}),
            **{f"choice{number}": name for number, name in enumerate(self.settings.choices)},
            "label": label if data.label_column == Data.label_column else data.label_column,
        }

    def examples(
        self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]
    ) -> Iterator[Example | Remark]:
        choices = [self._read_choices(row) for row in rows]
        right = [_find_right_choice(row, own) for row, own in zip(rows, choices, strict=True)]
        first = [row["text"] for row, own in zip(rows, choices, strict=True) for _ in own]
        begin = [f"{row['pair']} " if "pair" in row else "" for row in rows]
        second = [start + choice for start, own in zip(begin, choices, strict=True) for choice in own]
        with locate_encoding_errors(tokenizer, [*first, *second]):
            encoded = tokenizer(first, second, truncation=True, return_attention_mask=False)
        ids, types = iter(encoded["input_ids"]), iter(encoded.get("token_type_ids", []))
        for own, target in zip(choices, right, strict=True):
            type_ids = [next(types) for _ in own] if "token_type_ids" in encoded else None
            yield Example(rows=[next(ids) for _ in own], type_ids=type_ids, target=target)
        if cut := sum(bool(row.overflowing) for row in encoded.encodings):
            text = f"choices have more than batch.max_length={tokenizer.model_max_length} tokens and are cut"
            yield Remark(text, cut)

    def _read_choices(self, row: Row) -> list[str]:
        cells = [row[f"choice{number}"] for number in range(len(self.settings.choices))]
        choices = cells[0] if len(cells) == 1 else cells
        if not isinstance(choices, list) or len(choices) < 2:
            raise ValueError(
                f"{row.where}: the column {self.settings.choices[0]!r} holds {repr(choices)[:60]} where a list of two "
                "or more choices is expected; if each choice has a column, name all of them in --objective.choices"
            )
        for number, choice in enumerate(choices):
            if not isinstance(choice, str) or not choice.strip():
                raise ValueError(f"{row.where}: choice {number} is {choice!r} where text is expected; correct the row")
        return choices

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy of the right choice, float32[E], for logits of E x K x 1."""
        return F.cross_entropy(outputs[..., 0], targets, reduction="none")

    def compare_with_teacher(self, outputs: Tensor, expected: Tensor, targets: Tensor, temperature: float) -> Tensor:
        return super().compare_with_teacher(outputs[..., 0], expected[..., 0], targets, temperature)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Any]:
        return {"accuracy": (outputs[..., 0].argmax(1) == targets).double().mean()}

    def describe_examples(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        return {"loss": self.loss(outputs, targets), "correct": outputs[..., 0].argmax(1) == targets}

    @property
    def card_text(self) -> str:
        return (
            "The evaluation uses questions that training did not see. `accuracy` is the share with the right choice.\n"
            "`eval_loss` is the mean of -log p of the right choice."
        )


def _find_right_choice(row: Row, choices: list[str]) -> int:
    """Return the number of the right choice, which is given by its number from 0, its text or its letter from A."""
    answer = row["label"]
    numbers: set[int] = set()
    if isinstance(answer, int) and not isinstance(answer, bool):
        numbers = {answer}
    elif isinstance(answer, str):
        numbers = {number for number, choice in enumerate(choices) if choice == answer}
        # The cells of a delimited file are texts, also if they are numbers.
        numbers |= {int(answer)} if answer.isdecimal() else set()
        numbers |= {ord(answer) - ord("A")} if len(answer) == 1 and answer.isupper() else set()
    inside = [number for number in numbers if 0 <= number < len(choices)]
    if len(inside) != 1:
        why = "may be the text, the number or the letter of several choices" if inside else "is none of the choices"
        numbers_of_all = f"give the number of the right choice, from 0 to {len(choices) - 1}"
        raise ValueError(f"{row.where}: the answer {repr(answer)[:60]} {why}: {numbers_of_all}")
    return inside[0]
