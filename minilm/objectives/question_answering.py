"""Extractive question answering: predict where in a context the answer to a question starts and ends.

Axes: R windows, L padded length, T tokens of a context.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerBase

from minilm.config import Data, QuestionAnswering
from minilm.data.example import Example
from minilm.data.rows import Row
from minilm.data.windows import WindowedContext, encode_windows
from minilm.models.inference_answers import find_best_spans
from minilm.objectives.answer_scores import score_answer
from minilm.objectives.objective import Objective
from minilm.utils.shell import format_command


@dataclass(frozen=True)
class QuestionAnsweringObjective(Objective):
    """The start and the end of the answer in each window of the context, or the window's null place for no answer."""

    settings: QuestionAnswering
    auto = AutoModelForQuestionAnswering
    outputs = "tokens"
    pairs = True
    figures = ("exact_match", "f1")
    title = "model for question answering"

    def columns(self, data: Data) -> dict[str, str]:
        return {
            "text": "question" if data.column == Data.column else data.column,
            "pair": data.pair_column or "context",
            "label": "answers" if data.label_column == Data.label_column else data.label_column,
        }

    def examples(
        self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]
    ) -> Iterator[Example]:
        answers = [self._read_answers(row) for row in rows]
        encoded = encode_windows(
            tokenizer,
            [row["text"] for row in rows],
            [row["pair"] for row in rows],
            [row.where for row in rows],
            max_length=tokenizer.model_max_length,
            stride=self.settings.stride,
        )
        for row, own, context in zip(rows, answers, encoded, strict=True):
            tokens = _find_answer(row, own, context)
            texts = [text for text, _ in own]
            for number, window in enumerate(context.windows):
                inside = tokens is not None and window.start <= tokens[0] and tokens[1] < window.stop
                places = [window.place(token) for token in tokens] if tokens and inside else [window.null] * 2
                # The windows of a question follow each other. The first one notes what belongs to the question.
                question = {"context": row["pair"], "answers": texts} if number == 0 else {}
                offsets = context.offsets_Tx2[window.start : window.stop].tolist()
                note = {**question, "first": window.first, "null": window.null, "offsets": offsets}
                yield Example(ids=window.ids, type_ids=window.type_ids, target=places, note=note)

    def _read_answers(self, row: Row) -> list[tuple[str, int]]:
        """Return the text of each answer and the character at which it starts. Raise ValueError if it does not."""
        cell = row["label"]
        if isinstance(cell, dict) and isinstance(cell.get("text"), list) and isinstance(cell.get("answer_start"), list):
            if len(cell["text"]) != len(cell["answer_start"]):
                raise ValueError(
                    f"{row.where}: the answers have {len(cell['text'])} texts, but another number of starts"
                )
            pairs = [*zip(cell["text"], cell["answer_start"], strict=True)]
        elif isinstance(cell, list) and all(isinstance(each, dict) for each in cell):
            pairs = [(each.get("text"), each.get("answer_start")) for each in cell]
        else:
            raise ValueError(
                f"{row.where}: the answers are {repr(cell)[:60]}: write them as "
                '{"text": ["the answer"], "answer_start": [17]}, or as a list of {"text": …, "answer_start": …}'
            )
        for text, start in pairs:
            _check_answer(row, text, start)
        if not pairs and not self.settings.no_answer:
            raise ValueError(
                f"{row.where}: the question has no answer: pass --objective.no-answer if that is right, or else remove "
                "the row"
            )
        return pairs

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean of the cross entropies of the start and of the end, float32[R], for logits of R x L x 2."""
        start_R, end_R = (F.cross_entropy(outputs[..., i], targets[:, i], reduction="none") for i in range(2))
        return (start_R + end_R) / 2

    def compare_with_teacher(self, outputs: Tensor, expected: Tensor, targets: Tensor, temperature: float) -> Tensor:
        # The classes are the places of a window.
        ours, theirs = (logits_RxLx2.transpose(1, 2) for logits_RxLx2 in (outputs, expected))
        return super().compare_with_teacher(ours, theirs, targets, temperature).mean(1)

    def metrics_with_notes(self, outputs: Tensor, targets: Tensor, notes: Sequence[Any]) -> Mapping[str, float]:
        scores: list[tuple[float, float]] = []
        windows: list[tuple[Tensor, dict[str, Any]]] = []
        for logits_Lx2, note in zip(outputs, notes, strict=True):
            if "answers" in note and windows:
                scores.append(self._score_question(windows))
                windows = []
            windows.append((logits_Lx2, note))
        scores.append(self._score_question(windows))
        exact, f1 = (100 * sum(each) / len(scores) for each in zip(*scores, strict=True))
        return {"exact_match": exact, "f1": f1}

    def _score_question(self, windows: list[tuple[Tensor, dict[str, Any]]]) -> tuple[float, float]:
        """Return exact match and F1 of the likeliest answer over the windows of a question, 0 to 1."""
        question = windows[0][1]
        best_score, best_text, null_score = -float("inf"), "", float("inf")
        for logits_Lx2, note in windows:
            offsets, context = note["offsets"], question["context"]
            # Logits of different windows cannot be compared, but probabilities can.
            scores_Lx2 = logits_Lx2.log_softmax(0)
            own_Tx2 = scores_Lx2[note["first"] : note["first"] + len(offsets)]
            visible = [bool(context[start:stop].strip()) for start, stop in offsets]
            for score, first, last in find_best_spans(own_Tx2, visible, self.settings.max_answer, count=1):
                if score > best_score:
                    best_score, best_text = score, context[offsets[first][0] : offsets[last][1]]
            null_score = min(null_score, float(scores_Lx2[note["null"]].sum()))
        if self.settings.no_answer and null_score - best_score > self.settings.null_threshold:
            best_text = ""
        return score_answer(best_text, question["answers"])

    @property
    def card_text(self) -> str:
        return (
            "The evaluation uses questions that training did not see. `exact_match` and `f1` are those of SQuAD, in\n"
            "percent: the share of predicted answers that equal an annotated one, and their mean overlap in words.\n"
            "`eval_loss` is the mean loss over the windows of the contexts."
        )

    def command(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
        options = ["--no-answer"] if self.settings.no_answer else []
        return format_command("answer", folder, *options, "--question", "…", "…")


def _check_answer(row: Row, text: Any, start: Any) -> None:
    """Raise ValueError unless the answer stands in the context at the character `start`."""
    if not isinstance(text, str) or not text.strip() or not isinstance(start, int) or isinstance(start, bool):
        raise ValueError(
            f"{row.where}: an answer has the text {text!r} and the start {start!r}: give a text and a whole number"
        )
    context = row["pair"]
    if start < 0 or context[start : start + len(text)] != text:
        place = context.find(text)
        advice = f"it stands at {place}" if place >= 0 else "the context does not contain it"
        raise ValueError(
            f"{row.where}: the answer {text[:60]!r} does not stand at character {start} of the context, counted from 0 "
            f"in characters of Unicode ({advice}): correct answer_start"
        )


def _find_answer(row: Row, answers: Sequence[tuple[str, int]], context: WindowedContext) -> tuple[int, int] | None:
    """Return the positions of the first and the last token of a question's first answer; None without an answer.

    Raise ValueError if the tokenizer gives no token for it, or if no window holds all of its tokens.
    """
    if not answers:
        return None
    text, start = answers[0]
    tokens = context.find_tokens(start, start + len(text))
    if tokens is None:
        raise ValueError(f"{row.where}: the tokenizer gives no token for the answer {text[:60]!r}: remove the row")
    if not any(window.start <= tokens[0] and tokens[1] < window.stop for window in context.windows):
        raise ValueError(
            f"{row.where}: the answer has {tokens[1] - tokens[0] + 1} tokens, and every window cuts it: raise "
            "objective.stride or batch.max_length, or remove the row"
        )
    return tokens
