"""The label column of one part of the documents: what each row holds, as names, numbers or multi-hot lists."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from datasets import ClassLabel, Dataset, List, Value
from numpy.typing import NDArray

# A whole number in the one way that Python writes it. So "01" is a name, and no number is lost by int().
WHOLE = re.compile(r"0|-?[1-9][0-9]*")
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

SECRET = (
    "-1 stands for a label that is kept secret, as in GLUE's test parts: pass another --data.split or "
    "--data.eval-split, or take these rows out"
)


@dataclass(frozen=True, kw_only=True)
class LabelColumn:
    """The labels of one part of the documents, as they are written."""

    part: str
    """What errors call the part, such as `training documents`."""
    values: list[Any]
    """One value a row: an int, float, bool or str, or a list of them."""
    names: tuple[str, ...]
    """The names that the numbers stand for (a ClassLabel's, or False and True); empty where the values are the labels
    themselves."""
    several: bool
    """Whether each value is a list."""
    dtype: str
    """What a label is written as: `int`, `float`, `bool`, `string` or `null` (only empty lists)."""
    texts: Dataset
    """The documents, which errors quote."""
    problem_is_open: bool
    """Whether another `--objective.problem` may help. A trained model allows one problem only."""

    @classmethod
    def read(
        cls, documents: Dataset, part: str, separator: str | None = None, *, problem_is_open: bool = True
    ) -> "LabelColumn":
        """Read the column `label` of the documents; `separator` stands between the labels of a cell.

        Lists of strings that are all whole numbers become integers.
        """
        feature, values = documents.features["label"], documents["label"][:]
        if separator is not None:
            feature, values = List(Value("string")), _split(documents, part, separator)
        item = getattr(feature, "feature", feature)
        several = item is not feature
        dtype = re.sub(r"u?int\d+", "int", re.sub(r"float\d+|double", "float", item.dtype)).removeprefix("large_")
        names = tuple(item.names) if isinstance(item, ClassLabel) else ("False", "True") if dtype == "bool" else ()
        if several and dtype == "string" and all(WHOLE.fullmatch(name) for row in values for name in row):
            values, dtype = [[int(name) for name in row] for row in values], "int"
        return cls(
            part=part,
            values=values,
            names=names,
            several=several,
            dtype=dtype,
            texts=documents,
            problem_is_open=problem_is_open,
        )

    @property
    def has_class_names(self) -> bool:
        """Whether the names come from a ClassLabel."""
        return bool(self.names) and self.dtype != "bool"

    @property
    def class_names_that_are_not_numbers(self) -> tuple[str, ...]:
        """The names of a ClassLabel, unless each writes a number."""
        return () if all(map(DECIMAL.fullmatch, self.names)) else self.names

    def refuse(self, row: int, why: str, problem: str = "") -> NoReturn:
        """Raise ValueError about the label of a row; `problem` is the `--objective.problem` that would take it."""
        if problem and self.problem_is_open:
            why += f"; pass --objective.problem {problem} if that is what the column holds"
        text, label = self.texts[row]["text"], repr(self.values[row])
        raise ValueError(
            f"row {row} of the {self.part} ({text[:40]!r}{'…' * (len(text) > 40)}) has the label "
            f"{label[:60]}{'…' * (len(label) > 60)}: {why}"
        )

    def class_names(self) -> list[str]:
        """The name of each row's class; a whole number is named by itself. Raises ValueError for a list."""
        if self.several:
            self.refuse(0, "a list is not a single label", "multi-label")
        known: dict[Any, str] = {}
        for row, value in enumerate(self.values):
            if value not in known:
                known[value] = self._name(row, value)
        return [known[value] for value in self.values]

    def name_lists(self) -> list[list[str]]:
        """The names of each row's labels. Raises ValueError for a single label, and for one that a row has twice."""
        self._check_several()
        result = []
        for row, value in enumerate(self.values):
            names = [self._name(row, item) for item in value]
            if len(set(names)) < len(names):
                twice = max(names, key=names.count)
                self.refuse(
                    row,
                    f"{twice!r} is there twice. A list holds the row's labels, each once, or is multi-hot: a 0 or 1 "
                    "for each label, as many in every row",
                )
            result.append(names)
        return result

    def is_multi_hot(self, known: Sequence[str]) -> bool:
        """Whether the lists hold a 0 or 1 for each label, rather than the row's labels; `known` are a checkpoint's.

        Floats and truth values are multi-hot. So are integers that are all 0 or 1 in lists of one length, two or more:
        as numbers of labels, they would repeat one in a row, or give all rows the same two. Only for a checkpoint with
        more labels than that may such rows name two of them.
        """
        if not self.several or self.has_class_names or self.dtype not in ("int", "float", "bool"):
            return False
        if self.dtype != "int":
            return True
        lengths = {len(value) for value in self.values}
        if len(lengths) > 1 or max(lengths) < 2 or any(item not in (0, 1) for value in self.values for item in value):
            return False
        repeats = any(len(set(value)) < len(value) for value in self.values)
        return repeats or not known or lengths == {len(known)}

    def usual_length(self) -> int:
        """The length that most lists have."""
        return Counter(map(len, self.values)).most_common(1)[0][0]

    def multi_hot(self, count: int) -> NDArray[np.float32]:
        """The zeros and ones, float32[E, count]. Raises ValueError for a row that holds anything else."""
        self._check_several()
        for row, value in enumerate(self.values):
            if len(value) != count:
                self.refuse(
                    row, f"it has {len(value)} entries, but multi-hot lists have one for each of {count} labels"
                )
            if any(item not in (0, 1) for item in value):
                self.refuse(row, "a multi-hot list holds a 0 or 1 for each label")
        return np.array(self.values, np.float32).reshape(len(self.values), count)

    def numbers(self) -> NDArray[np.float32]:
        """The number of each row, float32[E]; text that writes one counts. Raises ValueError for anything else."""
        numbers = []
        for row, value in enumerate(self.values):
            text = isinstance(value, str)
            if self.several or self.dtype == "bool" or (text and not DECIMAL.fullmatch(value.strip())):
                self.refuse(row, "a regression needs numbers, such as 3 or 4.5")
            name = self._name(row, value) if self.names else value
            numbers.append(float(value if self.class_names_that_are_not_numbers else name))
        with np.errstate(over="ignore"):
            result = np.array(numbers, np.float64).astype(np.float32)
        # Finite text or float64 can become infinite too: float("1e400"), or 1e39 as float32.
        if not np.isfinite(result).all():
            row = int(np.isfinite(result).argmin())
            self.refuse(row, "a regression needs finite numbers, of at most 3.4e38 since they become float32")
        return result

    def _check_several(self) -> None:
        if not self.several:
            self.refuse(
                0,
                "it is not a list of labels. --data.label-separator splits text that lists several",
                "single-label",
            )

    def _name(self, row: int, item: Any) -> str:
        if self.names:
            if item == -1:
                self.refuse(row, SECRET)
            if not 0 <= item < len(self.names):
                self.refuse(row, f"it lies outside 0..{len(self.names) - 1}, the numbers of the column's names")
            return self.names[int(item)]
        if isinstance(item, float):
            if not item.is_integer():
                self.refuse(row, "it is a number and not a class", "regression")
            item = int(item)
        return str(item)


def _split(documents: Dataset, part: str, separator: str) -> list[list[str]]:
    """The labels of each cell, without the space around them; a blank cell holds none."""
    feature = documents.features["label"]
    if isinstance(feature, ClassLabel) or getattr(feature, "dtype", "list") not in ("string", "large_string"):
        raise ValueError(
            f"data.label_separator: the label column of the {part} holds {feature}, and not text to split: leave the "
            "separator out, or write the labels as text"
        )
    result = []
    for row, value in enumerate(documents["label"][:]):
        cell = "" if value is None else str(value)
        names = [name.strip() for name in cell.split(separator)] if cell.strip() else []
        if "" in names:
            raise ValueError(
                f"row {row} of the {part} has the label {cell[:60]!r}, of which a part is empty: write it out"
            )
        result.append(names)
    return result
