"""Lines that say how the labels were read, for the log before training: a wrong column or reading shows there."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from minilm.label_column import DECIMAL, WHOLE, LabelColumn
from minilm.label_names import LabelIds, fold

_LISTED = 10  # names in a line of the log
_RARE = 10  # classes from which on it is said that most of them have a single example
_SEPARATORS = (",", ";", "|", "/")

Rows = list[list[str]]


def report_classes(
    columns: Sequence[LabelColumn],
    rows: Sequence[Rows],
    match: LabelIds,
    problem: str,
    column: str,
    places: int | None,
    *,
    is_auto: bool,
) -> list[str]:
    """Return the problem, the names and how many examples have each; and what looks like another reading than meant.

    `columns` and `rows` are those of the training documents and of each evaluation part, `places` the length of
    multi-hot lists. `is_auto`: the problem follows from the values.
    """
    several, count = problem == "multi-label", len(match.names)
    counts = [Counter(match.ids[name] for row in part for name in row) for part in rows]
    train, held_out = counts[0], sum(counts[1:], Counter[int]())
    evaluates = columns[0] is columns[-1]
    listed = ", ".join(
        f"{name!r} ({train[index]:,})" if evaluates else f"{name!r} ({train[index]:,} train, {held_out[index]:,} eval)"
        for index, name in enumerate(match.names[:_LISTED])
    )
    more = f" and {count - _LISTED:,} more" if count > _LISTED else ""
    line = f"labels in {column!r}: {problem}, {count:,} {'labels' if several else 'classes'}: {listed}{more}"
    if several:
        first = columns[0]
        form = "multi-hot lists" if places else "lists of numbers" if first.dtype == "int" else "lists of names"
        none = [sum(not row for row in part) for part in (rows[0], [row for part in rows[1:] for row in part])]
        line += f". They are written as {form}"
        line += (
            f". {none[0]:,} documents have none" if evaluates else f". {none[0]:,} train and {none[1]:,} eval have none"
        )
    lines = [line]
    if match.kept:
        lines.append(_report_kept(match))
    if is_auto and not several and not match.kept:
        lines += _report_doubts(columns[0], [row[0] for row in rows[0]], match.names)
    folded = Counter(map(fold, match.names))
    if alike := [name for name in match.names if folded[fold(name)] > 1]:
        lines.append(f"WARNING: {_quoted(alike)} differ in case or space alone, and are labels of their own")
    return lines


def report_numbers(
    columns: Sequence[LabelColumn], numbers: Sequence[NDArray[np.float32]], column: str, *, is_auto: bool
) -> list[str]:
    """Return the range of a regression's numbers, and what looks like another reading than meant."""
    parts = [("train", numbers[0]), ("eval", np.concatenate(numbers[1:]))][columns[0] is columns[-1] :]
    said = "; ".join(
        f"{name} {part.min():g} to {part.max():g}, mean {part.mean(dtype=np.float64):.4g}" for name, part in parts
    )
    lines = [f"labels in {column!r}: regression, {said}"]
    if names := columns[0].class_names_that_are_not_numbers:
        lines.append(f"WARNING: the numbers stand for classes, in the order of {_quoted(names)}")
    if is_auto and all((part == np.round(part)).all() for part in numbers):
        lines.append("labels: all numbers are whole. If they are classes, pass --objective.problem single-label")
    return lines


def _report_kept(match: LabelIds) -> str:
    """Say which labels of the checkpoint the data's were taken for."""
    if not match.other:
        return "labels: the names and ids are those of the checkpoint"
    pairs = [f"{ours!r} is {theirs!r}" for ours, theirs in match.other]
    listed = f"{', '.join(pairs[:_LISTED])}{', …' * (len(pairs) > _LISTED)}"
    by_number = any(fold(ours) != fold(theirs) for ours, theirs in match.other)
    if by_number and not all(f"LABEL_{ours}" == theirs for ours, theirs in match.other):
        return f"WARNING: labels are taken for the checkpoint's by number: {listed}"
    return f"labels: the names and ids are those of the checkpoint: {listed}"


def _report_doubts(column: LabelColumn, labels: Sequence[str], names: Sequence[str]) -> list[str]:
    """Say what a column of classes may be instead."""
    examples, classes, lines = Counter(labels), set(names), []
    if column.dtype in ("int", "string") and not column.names and len(classes) > 2 and all(map(WHOLE.fullmatch, names)):
        lines.append(
            "labels: whole numbers are taken as classes. To predict a number, pass --objective.problem regression"
        )
    elif column.dtype == "string" and all(DECIMAL.fullmatch(name.strip()) for name in names):
        lines.append(
            "WARNING: the labels are numbers written as text, which are taken as classes. To predict a number, pass "
            "--objective.problem regression"
        )
    for separator in _SEPARATORS:
        joined = [name for name in names if separator in name and {p.strip() for p in name.split(separator)} <= classes]
        if joined:
            lines.append(
                f"WARNING: {joined[0]!r} is a class of its own. If it lists several labels, pass "
                f"--data.label-separator '{separator}'"
            )
            break
    if lists := [name for name in names if name.strip().startswith("[") and name.strip().endswith("]")]:
        lines.append(
            f"WARNING: {lists[0]!r} is a class of its own. If it is meant as a list, write the rows as JSON lines, or "
            "the labels with a separator between them, and pass --data.label-separator"
        )
    single = sum(examples[name] == 1 for name in examples)
    if len(examples) >= _RARE and 2 * single > len(examples):
        lines.append(f"WARNING: {single:,} of the {len(examples):,} classes have a single training example")
    return lines


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_LISTED])) + (", …" if len(names) > _LISTED else "")
