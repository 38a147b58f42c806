"""Lines for the log about the labels, so that a user sees a wrong column or problem before training."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from minilm.data.label_column import DECIMAL_NUMBER, WHOLE_NUMBER, LabelColumn
from minilm.data.label_ids import LabelIds, format_names, normalize_name, quote_names

# Number of names that the first line lists with their counts.
_COUNTED = 10
# With at least this many classes, a warning says if most of them have a single example.
_RARE = 10
# Characters that may separate the labels of a cell.
_SEPARATORS = (",", ";", "|", "/")

LabelRows = list[list[str]]
"""The names of each row's labels."""


def summarize_classes(
    columns: Sequence[LabelColumn],
    rows: Sequence[LabelRows],
    match: LabelIds,
    problem: str,
    column: str,
    places: int | None,
    *,
    is_auto: bool,
) -> list[str]:
    """Return lines with the problem, the classes, their numbers of examples, and warnings about likely mistakes.

    `columns` and `rows` hold the training documents and then each evaluation part, or one entry if both are the same
    documents. `column` is the name of the label column. `places` is the length of multi-hot lists. `is_auto` says
    whether minilm chose the problem, and not the user.
    """
    counts = [Counter(match.ids[name] for row in part for name in row) for part in rows]
    train_counts = counts[0]
    eval_counts = sum(counts[1:], Counter[int]())
    is_one_part = len(columns) == 1
    listed = ", ".join(
        f"{name!r} ({train_counts[index]:,})"
        if is_one_part
        else f"{name!r} ({train_counts[index]:,} train, {eval_counts[index]:,} eval)"
        for index, name in enumerate(match.names[:_COUNTED])
    )
    count = len(match.names)
    more = f" and {count - _COUNTED:,} more" if count > _COUNTED else ""
    is_multi_label = problem == "multi-label"
    line = f"labels in {column!r}: {problem}, {count:,} {'labels' if is_multi_label else 'classes'}: {listed}{more}"
    if is_multi_label:
        numbers = columns[0].dtype == "int"
        form = "multi-hot lists" if places else "lists of numbers" if numbers else "lists of names"
        none = [sum(not row for row in part) for part in rows]
        unlabelled = f"{none[0]:,} documents" if is_one_part else f"{none[0]:,} train and {sum(none[1:]):,} eval"
        line += f". They are written as {form}. {unlabelled} have none"
    lines = [line]
    if match.same_as_checkpoint:
        lines.append(_describe_renamings(match))
    if is_auto and not is_multi_label and not match.same_as_checkpoint:
        lines += _find_likely_mistakes(columns[0], [row[0] for row in rows[0]], match.names)
    folded = Counter(map(normalize_name, match.names))
    if alike := [name for name in match.names if folded[normalize_name(name)] > 1]:
        lines.append(f"WARNING: {quote_names(alike)} differ only in case or spaces, but are separate labels")
    return lines


def summarize_numbers(
    columns: Sequence[LabelColumn], numbers: Sequence[NDArray[np.float32]], column: str, *, is_auto: bool
) -> list[str]:
    """Return lines with the range of a regression's numbers, and warnings about likely mistakes.

    The arguments are those of `summarize_classes`; `numbers` holds the numbers of each column.
    """
    parts = {"train": numbers[0], "eval": np.concatenate(numbers[1:])} if len(numbers) > 1 else {"eval": numbers[0]}
    ranges = "; ".join(
        f"{name} {part.min():g} to {part.max():g}, mean {part.mean(dtype=np.float64):.4g}"
        for name, part in parts.items()
    )
    lines = [f"labels in {column!r}: regression, {ranges}"]
    if names := columns[0].nonnumeric_class_names:
        lines.append(f"WARNING: the numbers stand for classes, in the order of {quote_names(names)}")
    if is_auto and all((part == np.round(part)).all() for part in numbers):
        lines.append("labels: all numbers are whole. If they are classes, pass --objective.problem single-label")
    return lines


def _describe_renamings(match: LabelIds) -> str:
    """Return a line that names the checkpoint's label for each label of the data."""
    if not match.renamings:
        return "labels: the names and ids are those of the checkpoint"
    listed = format_names([f"{ours!r} is {theirs!r}" for ours, theirs in match.renamings])
    by_number = any(normalize_name(ours) != normalize_name(theirs) for ours, theirs in match.renamings)
    if by_number and not all(f"LABEL_{ours}" == theirs for ours, theirs in match.renamings):
        return f"WARNING: labels are matched with the checkpoint's by number: {listed}"
    return f"labels: the names and ids are those of the checkpoint: {listed}"


def _find_likely_mistakes(column: LabelColumn, labels: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return lines that say what a column may hold instead of classes."""
    examples = Counter(labels)
    classes = set(names)
    lines = []
    if (
        column.dtype in ("int", "string")
        and not column.names
        and len(classes) > 2
        and all(map(WHOLE_NUMBER.fullmatch, names))
    ):
        lines.append(
            "labels: whole numbers are read as classes. To predict a number, pass --objective.problem regression"
        )
    elif column.dtype == "string" and all(DECIMAL_NUMBER.fullmatch(name.strip()) for name in names):
        lines.append(
            "WARNING: the labels are numbers written as text, and are read as classes. To predict a number, pass "
            "--objective.problem regression"
        )
    for separator in _SEPARATORS:
        joined = [name for name in names if separator in name and {p.strip() for p in name.split(separator)} <= classes]
        if joined:
            lines.append(
                f"WARNING: {joined[0]!r} is read as one class. If it lists several labels, pass "
                f"--data.label-separator '{separator}'"
            )
            break
    if lists := [name for name in names if name.strip().startswith("[") and name.strip().endswith("]")]:
        lines.append(
            f"WARNING: {lists[0]!r} is read as one class. If it is a list, write the rows as JSON lines, or write "
            "the labels with a separator between them and pass --data.label-separator"
        )
    single = sum(examples[name] == 1 for name in examples)
    if len(examples) >= _RARE and 2 * single > len(examples):
        lines.append(f"WARNING: {single:,} of the {len(examples):,} classes have a single training example")
    return lines
