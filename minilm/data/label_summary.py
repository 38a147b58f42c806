"""Lines for the log that say how the labels were read, so that a wrong column or problem shows before training."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from minilm.data.label_column import DECIMAL_NUMBER, WHOLE_NUMBER, LabelColumn
from minilm.data.label_ids import LabelIds, format_names, normalize_name, quote_names

# Number of names, each with its counts, in the first line.
_COUNTED = 10
# Number of classes from which a warning says that most of them have a single example.
_RARE = 10
_SEPARATORS = (",", ";", "|", "/")

LabelRows = list[list[str]]


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
    """Return lines with the problem, the names, the number of examples of each, and what may have been misread.

    `columns` and `rows` hold the training documents and then each evaluation part, or one entry where both are the
    same documents. `places` is the length of multi-hot lists. `is_auto`: minilm chose the problem by the values.
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
        lines.append(_report_kept(match))
    if is_auto and not is_multi_label and not match.same_as_checkpoint:
        lines += _report_doubts(columns[0], [row[0] for row in rows[0]], match.names)
    folded = Counter(map(normalize_name, match.names))
    if alike := [name for name in match.names if folded[normalize_name(name)] > 1]:
        lines.append(f"WARNING: {quote_names(alike)} differ in case or space alone, and are separate labels")
    return lines


def summarize_numbers(
    columns: Sequence[LabelColumn], numbers: Sequence[NDArray[np.float32]], column: str, *, is_auto: bool
) -> list[str]:
    """Return lines with the range of a regression's numbers, and what may have been misread.

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


def _report_kept(match: LabelIds) -> str:
    """Return a line that says which label of the checkpoint each label of the data is."""
    if not match.renamings:
        return "labels: the names and ids are those of the checkpoint"
    listed = format_names([f"{ours!r} is {theirs!r}" for ours, theirs in match.renamings])
    by_number = any(normalize_name(ours) != normalize_name(theirs) for ours, theirs in match.renamings)
    if by_number and not all(f"LABEL_{ours}" == theirs for ours, theirs in match.renamings):
        return f"WARNING: labels are taken for the checkpoint's by number: {listed}"
    return f"labels: the names and ids are those of the checkpoint: {listed}"


def _report_doubts(column: LabelColumn, labels: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return lines that say what a column of classes may hold instead of classes."""
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
            "labels: whole numbers are taken as classes. To predict a number, pass --objective.problem regression"
        )
    elif column.dtype == "string" and all(DECIMAL_NUMBER.fullmatch(name.strip()) for name in names):
        lines.append(
            "WARNING: the labels are numbers written as text, which are taken as classes. To predict a number, pass "
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
            f"WARNING: {lists[0]!r} is read as one class. If it is meant as a list, write the rows as JSON lines, or "
            "the labels with a separator between them, and pass --data.label-separator"
        )
    single = sum(examples[name] == 1 for name in examples)
    if len(examples) >= _RARE and 2 * single > len(examples):
        lines.append(f"WARNING: {single:,} of the {len(examples):,} classes have a single training example")
    return lines
