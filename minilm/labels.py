"""From a column of labels to numbers: the problem, the names of the classes, and what each weighs.

Axes: E examples, C labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from minilm.checks import closest
from minilm.config import Classification
from minilm.label_column import SECRET, LabelColumn
from minilm.label_names import LabelIds, fold, list_names, match_labels
from minilm.label_report import Rows, report_classes, report_numbers


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the label column means."""

    problem: str
    """`single-label`, `multi-label` or `regression`."""
    names: tuple[str, ...]
    """The names of the C labels, by id; one name for a regression."""
    weights: NDArray[np.float32] | None = None
    """float32[C], what an example of each class counts; None: all the same."""
    kept: bool = False
    """Whether they are the labels of the checkpoint, so that its head is kept. Otherwise the head starts anew."""
    summary: tuple[str, ...] = ()
    """Lines that say how the labels were read, for people."""

    def fields(self) -> dict[str, Any]:
        """Fields of the model's configuration, as Hugging Face calls them."""
        problem = {"single-label": "single_label_classification", "multi-label": "multi_label_classification"}
        return {
            "problem_type": problem.get(self.problem, self.problem),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
        }


def read_labels(
    train: Dataset,
    parts: Mapping[str, Dataset],
    settings: Classification,
    known: Sequence[str] = (),
    column: str = "label",
    separator: str | None = None,
) -> tuple[Labels, NDArray[Any], NDArray[Any]]:
    """Return what the labels mean, those of the training examples, and those of all evaluation parts in turn.

    The arrays are int64[E] for a single label, float32[E, C] of zeros and ones for several, float32[E] for a
    regression. `known` are the labels of a checkpoint by id: where the data have its labels, its ids are kept. `parts`
    holds `train` itself where a trained model is evaluated. `separator` stands between the labels of a cell that lists
    several. The summary says what was understood, and calls the label column `column`. Raises ValueError for labels
    that do not make a problem, and for those of the evaluation that training does not see.
    """
    columns = _read_columns(train, parts, separator)
    problem = _problem_of(columns[0]) if settings.problem == "auto" else settings.problem
    settings.check_problem(problem)
    if problem == "regression":
        numbers = [part.numbers() for part in columns]
        summary = report_numbers(columns, numbers, column, is_auto=settings.problem == "auto")
        kept = len(known) == 1
        names = tuple(known) if kept else ("LABEL_0",)
        labels = Labels(problem=problem, names=names, kept=kept, summary=tuple(summary))
        return labels, numbers[0], np.concatenate(numbers[1:])
    if problem == "single-label" and len(known) < 2:
        # A model with one output does not tell classes apart.
        known = ()
    multi_hot = problem == "multi-label" and columns[0].is_multi_hot(known)
    places = columns[0].usual_length() if multi_hot else None
    if places is not None:
        rows = [_names_of_places(part.multi_hot(places)) for part in columns]
    elif problem == "multi-label":
        rows = [part.name_lists() for part in columns]
    else:
        rows = [[[name] for name in part.class_names()] for part in columns]
    _check_secret(columns, rows, known)
    match = _match(columns, rows, known, places)
    if columns[0] is not columns[-1]:
        _check_unseen(columns[1:], rows[1:], match)
    _check_variety(columns[0].part, rows[0], problem, match, known)
    summary = report_classes(columns, rows, match, problem, column, places, is_auto=settings.problem == "auto")
    labels = Labels(problem=problem, names=match.names, kept=match.kept, summary=tuple(summary))
    if problem == "multi-label":
        indicators = [_indicators(part, match) for part in rows]
        return labels, indicators[0], np.concatenate(indicators[1:])
    ids = [np.array([match.ids[name] for (name,) in part], np.int64) for part in rows]
    if settings.class_weights == "balanced":
        labels = replace(labels, weights=_balanced(ids[0], len(match.names)))
    return labels, ids[0], np.concatenate(ids[1:])


def evaluates_only(train: Dataset, parts: Mapping[str, Dataset]) -> bool:
    """Whether the documents of the evaluation are the only ones: a model that is trained already takes no others."""
    return all(part is train for part in parts.values())


def check_known(labels: Labels, known: Sequence[str]) -> None:
    """Raise ValueError unless a model whose labels are `known` was trained for these `labels`."""
    if labels.kept:
        return
    if labels.problem == "regression":
        raise ValueError(f"the model predicts {len(known)} numbers, and the data have one{describe_known(known)}")
    unknown = [name for name in labels.names if fold(name) not in map(fold, known)] or labels.names
    raise ValueError(
        f"the data have labels that the model was not trained for: {list_names([*map(repr, unknown)])}"
        f"{describe_known(known)}. Write them as the model's names, or as their numbers 0 to {len(known) - 1}"
    )


def describe_known(known: Sequence[str]) -> str:
    """The end of an error message: what a checkpoint knows, if it is a classifier."""
    return f" (the model knows {list_names(known)})" if known else ""


def _read_columns(train: Dataset, parts: Mapping[str, Dataset], separator: str | None) -> list[LabelColumn]:
    """The label columns of the training documents and of each part."""
    if evaluates_only(train, parts):
        only = LabelColumn.read(train, "documents", separator, problem_is_open=False)
        return [only] * (1 + len(parts))
    names = [f"evaluation documents {name}".rstrip() for name in parts]
    columns = [LabelColumn.read(train, "training documents", separator)]
    columns += [LabelColumn.read(part, name, separator) for part, name in zip(parts.values(), names, strict=True)]
    if columns[0].has_class_names:
        # Numbers that the evaluation documents have no names for are numbers of the training documents' names.
        columns[1:] = [
            replace(part, names=columns[0].names) if part.dtype == "int" and not part.names else part
            for part in columns[1:]
        ]
    elif columns[0].dtype != "string":
        # Where the training documents have numbers, the evaluation documents' numbers count, and not their names.
        columns[1:] = [replace(part, names=()) if part.has_class_names else part for part in columns[1:]]
    return columns


def _problem_of(column: LabelColumn) -> str:
    if column.several:
        return "multi-label"
    return "regression" if column.dtype == "float" else "single-label"


def _names_of_places(places_ExC: NDArray[np.float32]) -> Rows:
    return [[str(place) for place in row.nonzero()[0]] for row in places_ExC]


def _match(columns: Sequence[LabelColumn], rows: Sequence[Rows], known: Sequence[str], places: int | None) -> LabelIds:
    """Names and ids of the training documents' labels, and of what else a checkpoint knows in the evaluation."""
    train = {name for row in rows[0] for name in row}
    anywhere = {name for part in rows for row in part for name in row}
    match = match_labels(anywhere, columns[0].names, known, places)
    return match if match.kept else match_labels(train, columns[0].names, known, places)


def _check_secret(columns: Sequence[LabelColumn], rows: Sequence[Rows], known: Sequence[str]) -> None:
    """Raise ValueError for a part whose labels are all -1, unless that is a class of the checkpoint or in training."""
    seen = [{name for row in part for name in row} for part in rows]
    if "-1" in known or "-1" in seen[0] != {"-1"}:
        return
    for part, names in zip(columns, seen, strict=True):
        if names == {"-1"} and part.dtype == "int":
            raise ValueError(f"every label of the {part.part} is -1. {SECRET}")


def _check_unseen(columns: Sequence[LabelColumn], rows: Sequence[Rows], match: LabelIds) -> None:
    for part, labels_of_rows in zip(columns, rows, strict=True):
        for number, row in enumerate(labels_of_rows):
            if missing := next((name for name in row if name not in match.ids), None):
                what = SECRET if missing == "-1" else "Give the training documents one, or take the row out"
                part.refuse(number, f"no training document has {closest(missing, match.names)} {what}")


def _check_variety(part: str, rows: Rows, problem: str, match: LabelIds, known: Sequence[str]) -> None:
    """Raise ValueError for rows that all have the same labels, unless a checkpoint knows these labels."""
    if match.kept or len({frozenset(row) for row in rows}) > 1:
        return
    if problem == "multi-label":
        labels = list_names([*map(repr, rows[0])]) or "none"
        raise ValueError(f"all {part} have the labels {labels}: there is nothing to learn{describe_known(known)}")
    raise ValueError(
        f"all {part} have the label {rows[0][0]!r}: a classification needs two or more{describe_known(known)}"
    )


def _indicators(rows: Rows, match: LabelIds) -> NDArray[np.float32]:
    """Zeros, and ones for the labels that an example has, float32[E, C]."""
    result = np.zeros((len(rows), len(match.names)), np.float32)
    for number, row in enumerate(rows):
        result[number, [match.ids[name] for name in row]] = 1
    return result


def _balanced(labels_E: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """Return E / (C' x examples of the class), where C' classes have an example: their mean over the examples is 1."""
    examples_C = np.bincount(labels_E, minlength=count)
    present = examples_C > 0
    weights = np.zeros(count, np.float32)
    weights[present] = len(labels_E) / (present.sum() * examples_C[present])
    return weights
