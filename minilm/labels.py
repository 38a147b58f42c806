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
    kept with their ids. Evaluation examples are read by the names of their own column where both parts have names.
    Raises ValueError for labels that do not make a problem, or that training never sees.
    """
    columns = [part["label"] for part in (train, held_out)]
    problem = _problem(columns[0][0]) if settings.problem == "auto" else settings.problem
    settings.check_problem(problem)
    if problem == "regression":
        numbers = [_numbers(column[:], part) for column, part in zip(columns, ("training", "evaluation"), strict=True)]
        return Labels(problem=problem, names=("LABEL_0",)), numbers[0], numbers[1]
    several = problem == "multi-label"
    given = _given_names(train, held_out)
    rows, unseen = (
        [_as_names(value, several, names) for value in column] for column, names in zip(columns, given, strict=True)
    )
    ids, names = _ids(rows, given[0], known)
    for number, row in enumerate(unseen):
        if missing := [name for name in row if name not in ids]:
            text = held_out[number]["text"][:40]
            raise ValueError(
                f"row {number} of the evaluation documents ({text!r}…) has the label {closest(missing[0], names)} "
                "No training example has it: give the training documents one, or take it out"
            )
    seen = {name for row in rows for name in row}
    if len(seen) < 2 and not several and set(names) != set(known):
        said = f"every training document has the label {rows[0][0]!r}: a classification needs two or more"
        raise ValueError(said + _knows(known))
    if several and len({frozenset(row) for row in rows}) < 2 and set(names) != set(known):
        said = f"every training document has the labels {', '.join(rows[0]) or 'none'}: there is nothing to learn"
        raise ValueError(f"{said} (zeros and ones, one for each label, are to be numbers with a point: 0.0 and 1.0)")
    if several:
        return Labels(problem=problem, names=names), _indicators(rows, ids), _indicators(unseen, ids)
    arrays = [np.array([ids[row[0]] for row in part], np.int64) for part in (rows, unseen)]
    weights = _balanced(arrays[0], len(names)) if settings.class_weights == "balanced" else None
    return Labels(problem=problem, names=names, weights=weights), arrays[0], arrays[1]


def check_known(labels: Labels, known: Mapping[str, int]) -> None:
    """Raise ValueError unless `labels` have the names and ids of a checkpoint whose labels are `known`.

    To one without names, whose labels are LABEL_0 and so on, they may belong by number: this is warned of.
    """
    by_id = _by_id(known)
    if labels.problem == "regression" or labels.names == by_id:
        return
    if len(labels.names) == len(by_id) and set(by_id) == {f"LABEL_{index}" for index in range(len(by_id))}:
        pairs = ", ".join(f"{ours} is {name}" for ours, name in zip(by_id[:10], labels.names, strict=False))
        log.warning(f"WARNING: the model has no names for its labels, which are taken by number: {pairs}")
        return
    unknown = ", ".join(repr(name) for name in [name for name in labels.names if name not in known][:10])
    raise ValueError(f"the data have labels that the model was not trained for: {unknown}{_knows(known)}")


def _by_id(known: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(sorted(known, key=lambda name: known[name]))


def _knows(known: Mapping[str, int]) -> str:
    """The end of an error message: what a checkpoint knows, where it classifies already."""
    listed = ", ".join(_by_id(known)[:10]) + (", …" if len(known) > 10 else "")
    return f" (the model knows {listed})" if known else ""


def _given_names(train: Dataset, held_out: Dataset) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names by which each part's column explains its numbers; numbers of training that have none stay numbers."""
    features = [part.features["label"] for part in (train, held_out)]
    features = [getattr(feature, "feature", feature) for feature in features]  # of a list, what it holds
    first, second = (tuple(each.names) if isinstance(each, ClassLabel) else () for each in features)
    return first, second if second and (first or "string" in features[0].dtype) else first


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
    if len(set(names)) < len(names):
        raise ValueError(
            f"the label {repr(value)[:40]} names {max(names, key=names.count)!r} twice: "
            "a list has the numbers or names of the row's labels, each once"
        )
    return names


def _ids(
    rows: list[list[str]], given: tuple[str, ...], known: Mapping[str, int]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The id of each label as the rows have it, and the names by id.

    Both are the checkpoint's, where it knows the labels by name or by number; else those of the names that are `given`
    with the data; else words are sorted and numbers stay.
    """
    seen = {name for row in rows for name in row}
    if set(given or seen) <= known.keys():
        return dict(known), _by_id(known)
    if given or not all(name.removeprefix("-").isdecimal() for name in seen):
        names = given or tuple(sorted(seen))
        return _numbered(names), names
    theirs, numbers = (tuple(map(str, range(count))) for count in (len(known), len(seen)))
    if seen <= set(theirs):
        return _numbered(theirs), _by_id(known)
    if strange := sorted(seen - set(numbers), key=int):
        negative = int(strange[0]) < 0
        culprit = f"{strange[0]} is negative" if negative else f"{next(n for n in numbers if n not in seen)} has none"
        listed = ", ".join(sorted(seen, key=int)[:10])
        raise ValueError(
            "labels that are whole numbers must run from 0 to n-1, each with a training example: "
            f"{culprit} (there are {listed}); write them as words to have them numbered{_knows(known)}"
        )
    return _numbered(numbers), numbers


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
