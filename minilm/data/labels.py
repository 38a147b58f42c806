"""The labels of a classifier: the problem, the names of the classes, their weights, and the labels as numbers.

Axes: E examples, C labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from minilm.config import Classification
from minilm.data.label_column import SECRET_LABEL, LabelColumn
from minilm.data.label_ids import LabelIds, format_names, match_labels, normalize_name, quote_names
from minilm.data.label_summary import LabelRows, summarize_classes, summarize_numbers
from minilm.data.splits import is_one_dataset
from minilm.utils.validation import suggest_name

# The `problem_type` of a Hugging Face configuration for each problem.
PROBLEM_TYPES = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The meaning of the label column."""

    problem: str
    """`single-label`, `multi-label` or `regression`."""
    names: tuple[str, ...]
    """The names of the C labels, by id; one name for a regression."""
    weights: NDArray[np.float32] | None = None
    """float32[C]: the weight of an example of each class. None: all weights are 1."""
    same_as_checkpoint: bool = False
    """Whether they are the labels of the checkpoint. If so, its head is used. If not, the head starts at random."""
    summary: tuple[str, ...] = ()
    """Lines for the log about the labels."""

    def fields(self) -> dict[str, Any]:
        """Return the fields of a Hugging Face configuration that describe the labels."""
        return {
            "problem_type": PROBLEM_TYPES[self.problem],
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
        }


def read_labels(
    train: Dataset,
    parts: Mapping[str, Dataset],
    settings: Classification,
    model_labels: Sequence[str] = (),
    column: str = "label",
    separator: str | None = None,
) -> tuple[Labels, NDArray[Any], NDArray[Any]]:
    """Return (labels, the labels of the training examples, the labels of the evaluation examples).

    The arrays are int64[E] for a single label, float32[E, C] of zeros and ones for several labels, and float32[E] for a
    regression. The evaluation examples are those of all parts, one part after the other.

    parts: the evaluation documents by name. They may be `train` itself.
    model_labels: the labels of a checkpoint by id. Its ids are used if the data have its labels.
    column: the name of the label column in the summary.
    separator: the text between the labels of a cell that lists several.

    Raise ValueError for labels that do not fit the problem, and for evaluation labels that no training example has.
    """
    columns = _read_columns(train, parts, separator)
    is_auto = settings.problem == "auto"
    problem = _find_problem(columns[0]) if is_auto else settings.problem
    settings.check_problem(problem)
    if problem == "regression":
        labels, arrays = _read_numbers(columns, model_labels, column, is_auto=is_auto)
    else:
        labels, arrays = _read_classes(columns, problem, model_labels, column, is_auto=is_auto)
    if settings.class_weights == "balanced":
        labels = replace(labels, weights=_balance_weights(arrays[0], len(labels.names)))
    return labels, arrays[0], np.concatenate(arrays[1:] or arrays)


def _read_numbers(
    columns: Sequence[LabelColumn], model_labels: Sequence[str], column: str, *, is_auto: bool
) -> tuple[Labels, list[NDArray[Any]]]:
    """Return the labels of a regression, and the numbers of each column, float32[E]."""
    numbers = [part.to_numbers() for part in columns]
    summary = summarize_numbers(columns, numbers, column, is_auto=is_auto)
    same_as_checkpoint = len(model_labels) == 1
    names = tuple(model_labels) if same_as_checkpoint else ("LABEL_0",)
    labels = Labels(problem="regression", names=names, same_as_checkpoint=same_as_checkpoint, summary=tuple(summary))
    return labels, [*numbers]


def _read_classes(
    columns: Sequence[LabelColumn], problem: str, model_labels: Sequence[str], column: str, *, is_auto: bool
) -> tuple[Labels, list[NDArray[Any]]]:
    """Return the labels of a classification, and the array of each column: int64[E] or float32[E, C]."""
    if problem == "single-label" and len(model_labels) < 2:
        # A model with one output has no classes.
        model_labels = ()
    is_multi_hot = problem == "multi-label" and columns[0].is_multi_hot(model_labels)
    places = columns[0].most_common_length() if is_multi_hot else None
    if places is not None:
        rows = [_name_places(part.to_multi_hot(places)) for part in columns]
    elif problem == "multi-label":
        rows = [part.to_name_lists() for part in columns]
    else:
        rows = [[[name] for name in part.to_names()] for part in columns]
    _check_secret_labels(columns, rows, model_labels)
    match = _match_with_checkpoint(columns, rows, model_labels, places)
    _check_evaluation_labels(columns[1:], rows[1:], match)
    _check_variety(columns[0].part, rows[0], problem, match, model_labels)
    summary = summarize_classes(columns, rows, match, problem, column, places, is_auto=is_auto)
    labels = Labels(
        problem=problem, names=match.names, same_as_checkpoint=match.same_as_checkpoint, summary=tuple(summary)
    )
    if problem == "multi-label":
        return labels, [_build_indicators(part, match) for part in rows]
    return labels, [np.array([match.ids[name] for (name,) in part], np.int64) for part in rows]


def check_model_labels(labels: Labels, model_labels: Sequence[str]) -> None:
    """Raise ValueError if the labels are not those that a model was trained for, `model_labels`."""
    if labels.same_as_checkpoint:
        return
    if labels.problem == "regression":
        raise ValueError(
            f"the model predicts {len(model_labels)} numbers, but the data have one{_end_with_labels(model_labels)}"
        )
    model_names = set(map(normalize_name, model_labels))
    unknown = [name for name in labels.names if normalize_name(name) not in model_names] or labels.names
    raise ValueError(
        f"the data have labels that the model was not trained for: {quote_names(unknown)}"
        f"{_end_with_labels(model_labels)}. Write them as the model's names, or as their numbers 0 to "
        f"{len(model_labels) - 1}"
    )


def _end_with_labels(model_labels: Sequence[str]) -> str:
    """Return the end of an error message, which lists a checkpoint's labels; empty without a checkpoint."""
    return f" (the model knows {format_names(model_labels)})" if model_labels else ""


def _read_columns(train: Dataset, parts: Mapping[str, Dataset], separator: str | None) -> list[LabelColumn]:
    """Return the label columns of the training documents and of each part; one column if all are the same documents."""
    if is_one_dataset(train, parts):
        return [LabelColumn.read(train, "documents", separator, suggests_problem=False)]
    names = [f"evaluation documents {name}".rstrip() for name in parts]
    columns = [LabelColumn.read(train, "training documents", separator)]
    columns += [LabelColumn.read(part, name, separator) for part, name in zip(parts.values(), names, strict=True)]
    if columns[0].has_class_names:
        # If the evaluation documents have numbers without names, the training documents' names apply to them.
        columns[1:] = [
            replace(part, names=columns[0].names) if part.dtype == "int" and not part.names else part
            for part in columns[1:]
        ]
    elif columns[0].dtype != "string":
        # If the training documents have numbers without names, the evaluation documents' names are ignored.
        columns[1:] = [replace(part, names=()) if part.has_class_names else part for part in columns[1:]]
    return columns


def _find_problem(column: LabelColumn) -> str:
    if column.holds_lists:
        return "multi-label"
    return "regression" if column.dtype == "float" else "single-label"


def _name_places(places_ExC: NDArray[np.float32]) -> LabelRows:
    """Return the names of each row's labels, where the name of a label is its place in the multi-hot list."""
    return [[str(place) for place in row.nonzero()[0]] for row in places_ExC]


def _match_with_checkpoint(
    columns: Sequence[LabelColumn], rows: Sequence[LabelRows], model_labels: Sequence[str], places: int | None
) -> LabelIds:
    """Return a checkpoint's names and ids if they fit all documents, or else ids for the training labels."""
    train = {name for row in rows[0] for name in row}
    anywhere = {name for part in rows for row in part for name in row}
    match = match_labels(anywhere, columns[0].names, model_labels, places)
    return match if match.same_as_checkpoint else match_labels(train, columns[0].names, model_labels, places)


def _check_secret_labels(
    columns: Sequence[LabelColumn], rows: Sequence[LabelRows], model_labels: Sequence[str]
) -> None:
    """Raise ValueError if all labels of a part are -1, unless -1 is a class of the checkpoint or of training."""
    names_by_part = [{name for row in part for name in row} for part in rows]
    train_names = names_by_part[0]
    if "-1" in model_labels or ("-1" in train_names and len(train_names) > 1):
        return
    for part, names in zip(columns, names_by_part, strict=True):
        if names == {"-1"} and part.dtype == "int":
            raise ValueError(f"every label of the {part.part} is -1. {SECRET_LABEL}")


def _check_evaluation_labels(columns: Sequence[LabelColumn], rows: Sequence[LabelRows], match: LabelIds) -> None:
    """Raise ValueError for the first evaluation label that has no id."""
    for part, labels_of_rows in zip(columns, rows, strict=True):
        for number, row in enumerate(labels_of_rows):
            if missing := next((name for name in row if name not in match.ids), None):
                advice = SECRET_LABEL if missing == "-1" else "Give the training documents one, or remove the row"
                part.refuse(number, f"no training document has {suggest_name(missing, match.names)} {advice}")


def _check_variety(part: str, rows: LabelRows, problem: str, match: LabelIds, model_labels: Sequence[str]) -> None:
    """Raise ValueError if all rows have the same labels, unless the labels are those of a checkpoint."""
    if match.same_as_checkpoint or len({frozenset(row) for row in rows}) > 1:
        return
    end = _end_with_labels(model_labels)
    if problem == "multi-label":
        raise ValueError(f"all {part} have the labels {quote_names(rows[0]) or 'none'}: there is nothing to learn{end}")
    raise ValueError(f"all {part} have the label {rows[0][0]!r}: a classification needs two or more{end}")


def _build_indicators(rows: LabelRows, match: LabelIds) -> NDArray[np.float32]:
    """Return an array float32[E, C] with a one for each label of an example and zeros elsewhere."""
    result = np.zeros((len(rows), len(match.names)), np.float32)
    for number, row in enumerate(rows):
        result[number, [match.ids[name] for name in row]] = 1
    return result


def _balance_weights(labels_E: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """Return a weight for each of `count` classes, inversely proportional to its number of examples.

    The weight is E / (C' x examples of the class), where C' classes have examples; its mean over all examples is 1.
    """
    examples_C = np.bincount(labels_E, minlength=count)
    present = examples_C > 0
    weights = np.zeros(count, np.float32)
    weights[present] = len(labels_E) / (present.sum() * examples_C[present])
    return weights
