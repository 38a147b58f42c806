"""From a column of labels to numbers: which problem it is, what the classes are called, what each weighs.

Axes: E examples, C labels.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from numpy.typing import NDArray

from minilm.checks import closest
from minilm.config import Classification

log = logging.getLogger("minilm")


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the label column means."""

    problem: str
    """`single-label`, `multi-label` or `regression`."""
    names: tuple[str, ...]
    """Of the C labels, by id; one name for a regression."""
    weights: NDArray[np.float32] | None = None
    """float32[C], what an example of each class counts; None: all the same."""

    def fields(self) -> dict[str, Any]:
        """Fields of the model's configuration, as Hugging Face calls them."""
        problem = {"single-label": "single_label_classification", "multi-label": "multi_label_classification"}
        return {
            "problem_type": problem.get(self.problem, self.problem),
            "id2label": dict(enumerate(self.names)),
            "label2id": _numbered(self.names),
        }


def read_labels(
    train: Dataset, held_out: Dataset, settings: Classification, known: Mapping[str, int]
) -> tuple[Labels, NDArray[Any], NDArray[Any]]:
    """(what the labels mean, those of the training examples, those of the evaluation examples).

    The arrays are int64[E] for a single label, float32[E, C] of zeros and ones for several, float32[E] for a
    regression. `known` are the labels of a checkpoint that classifies already: where they cover the data's, they are
    kept with their ids. Raises ValueError for labels that do not make a problem, or that training never sees.
    """
    columns = [part["label"] for part in (train, held_out)]
    problem = _problem(columns[0][0]) if settings.problem == "auto" else settings.problem
    settings.check_problem(problem)
    if problem == "regression":
        numbers = [_numbers(column[:], part) for column, part in zip(columns, ("training", "evaluation"), strict=True)]
        return Labels(problem=problem, names=("LABEL_0",)), numbers[0], numbers[1]
    several = problem == "multi-label"
    feature = train.features["label"]
    feature = getattr(feature, "feature", feature)  # of a list, what it holds
    given = tuple(feature.names) if isinstance(feature, ClassLabel) else ()
    rows, unseen = ([_as_names(value, several, given) for value in column] for column in columns)
    ids, names = (_numbered(given), given) if given else _ids(rows, known)
    for number, row in enumerate(unseen):
        if missing := [name for name in row if name not in ids]:
            text = held_out[number]["text"][:40]
            raise ValueError(
                f"row {number} of the evaluation documents ({text!r}…) has the label {closest(missing[0], names)} "
                "No training example has it: give the training documents one, or take it out"
            )
    seen = {name for row in rows for name in row}
    if len(seen) < 2 and not several and set(names) != set(known):
        raise ValueError(f"every training document has the label {rows[0][0]!r}: a classification needs two or more")
    if several:
        return Labels(problem=problem, names=names), _indicators(rows, ids), _indicators(unseen, ids)
    arrays = [np.array([ids[row[0]] for row in part], np.int64) for part in (rows, unseen)]
    weights = _balanced(arrays[0], len(names)) if settings.class_weights == "balanced" else None
    return Labels(problem=problem, names=names, weights=weights), arrays[0], arrays[1]


def _problem(first: object) -> str:
    if isinstance(first, list):
        return "multi-label"
    return "regression" if isinstance(first, float) else "single-label"


def _numbers(values: list[object], part: str) -> NDArray[np.float32]:
    for number, value in enumerate(values):
        if not isinstance(value, int | float) or isinstance(value, bool) or not np.isfinite(value):
            raise ValueError(
                f"row {number} of the {part} documents has the label {value!r}: a regression needs numbers"
            )
    return np.array(values, np.float32)


def _as_names(value: Any, several: bool, given: tuple[str, ...]) -> list[str]:
    """The labels of one example by name: whole numbers are names too."""
    if isinstance(value, list) != several:
        wanted = "a list of labels" if several else "a single label"
        raise ValueError(f"the label {value!r} is not {wanted}: set --objective.problem to what the column holds")
    items = value if several else [value]
    if several and any(isinstance(item, float) for item in items):  # zeros and ones, one for each label
        items = [index for index, item in enumerate(items) if item]
    names = []
    for item in items:
        if isinstance(item, float) and not item.is_integer():
            raise ValueError(f"the label {item!r} is no class: pass --objective.problem regression")
        index = isinstance(item, int | float) and not isinstance(item, bool)
        if index and given and not 0 <= item < len(given):
            raise ValueError(f"the label {item!r} lies outside 0..{len(given) - 1}")
        names.append(given[int(item)] if index and given else str(int(item)) if index else str(item))
    return names


def _ids(rows: list[list[str]], known: Mapping[str, int]) -> tuple[dict[str, int], tuple[str, ...]]:
    """The id of each label as the rows have it, and the names by id.

    Both are the checkpoint's, where it knows the labels by name or by number; else words are sorted and numbers stay.
    """
    seen = {name for row in rows for name in row}
    by_id = tuple(sorted(known, key=lambda name: known[name]))
    if seen <= known.keys():
        return dict(known), by_id
    if not all(name.removeprefix("-").isdecimal() for name in seen):
        return _numbered(sorted(seen)), tuple(sorted(seen))
    count = max(map(int, seen)) + 1
    numbers = tuple(map(str, range(max(count, len(known)))))
    if known and count <= len(known) and seen <= set(numbers):
        return _numbered(numbers), by_id
    if missing := sorted(set(numbers[:count]) - seen, key=int) or sorted(seen - set(numbers), key=int):
        what = "is negative" if int(missing[0]) < 0 else "has none"
        listed = ", ".join(sorted(seen, key=int)[:10])
        raise ValueError(
            "labels that are whole numbers must run from 0 to n-1, each with a training example: "
            f"{missing[0]} {what} (there are {listed}); write them as words to have them numbered"
        )
    return _numbered(numbers[:count]), numbers[:count]


def _numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: index for index, name in enumerate(names)}


def _indicators(rows: list[list[str]], ids: Mapping[str, int]) -> NDArray[np.float32]:
    """Zeros, and ones for the labels that an example has, float32[E, C]."""
    result = np.zeros((len(rows), len(ids)), np.float32)
    for number, row in enumerate(rows):
        result[number, [ids[name] for name in row]] = 1
    return result


def _balanced(labels_E: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """E / (C' x examples of the class), C' being the classes that have one: their mean over the examples is 1."""
    examples_C = np.bincount(labels_E, minlength=count)
    present = examples_C > 0
    weights = np.zeros(count, np.float32)
    weights[present] = len(labels_E) / (present.sum() * examples_C[present])
    return weights
