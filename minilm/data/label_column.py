"""The labels of the training documents or of one evaluation part, read as names, numbers or multi-hot lists."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from datasets import ClassLabel, Dataset, List, Value
from numpy.typing import NDArray

# A whole number exactly as str() writes it, so that str(int(text)) gives the text back. "01" is a name.
WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]*")
DECIMAL_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

SECRET_LABEL = (
    "-1 stands for a label that is kept secret, as in GLUE's test splits: pass another --data.split or "
    "--data.eval-split, or remove these rows"
)


@dataclass(frozen=True, kw_only=True)
class LabelColumn:
    """The labels of one part of the documents, as the source has them."""

    part: str
    """The name of the part in errors, such as `training documents`."""
    values: list[Any]
    """One value for each row: an int, float, bool or str, or a list of them."""
    names: tuple[str, ...]
    """The names that the values stand for: those of a ClassLabel, or False and True. Otherwise empty."""
    holds_lists: bool
    """Whether each value is a list."""
    dtype: str
    """The type of a label: `int`, `float`, `bool`, `string` or `null` (only empty lists)."""
    documents: Dataset
    """The documents, whose texts errors quote."""
    suggests_problem: bool
    """Whether errors suggest another `--objective.problem`. For a trained model they do not, because its problem is
    fixed."""

    @classmethod
    def read(
        cls, documents: Dataset, part: str, separator: str | None = None, *, suggests_problem: bool = True
    ) -> "LabelColumn":
        """Read the column `label` of the documents. `separator` stands between the labels of a cell that lists several.

        Lists of strings become lists of integers if all strings are whole numbers.
        """
        feature, values = documents.features["label"], documents["label"][:]
        if separator is not None:
            feature, values = List(Value("string")), _split_cells(documents, part, separator)
        item = getattr(feature, "feature", feature)
        holds_lists = item is not feature
        dtype = re.sub(r"u?int\d+", "int", re.sub(r"float\d+|double", "float", item.dtype)).removeprefix("large_")
        names = tuple(item.names) if isinstance(item, ClassLabel) else ("False", "True") if dtype == "bool" else ()
        if holds_lists and dtype == "string" and all(WHOLE_NUMBER.fullmatch(name) for row in values for name in row):
            values, dtype = [[int(name) for name in row] for row in values], "int"
        return cls(
            part=part,
            values=values,
            names=names,
            holds_lists=holds_lists,
            dtype=dtype,
            documents=documents,
            suggests_problem=suggests_problem,
        )

    @property
    def has_class_names(self) -> bool:
        """Whether the names come from a ClassLabel."""
        return bool(self.names) and self.dtype != "bool"

    @property
    def nonnumeric_class_names(self) -> tuple[str, ...]:
        """The names of a ClassLabel; empty if each of them is a number."""
        return () if all(map(DECIMAL_NUMBER.fullmatch, self.names)) else self.names

    def refuse(self, row: int, why: str, problem: str = "") -> NoReturn:
        """Raise ValueError for the label of a row. `problem` is the `--objective.problem` that would accept it."""
        if problem and self.suggests_problem:
            why += f"; pass --objective.problem {problem} if that is what the column holds"
        text, label = self.documents[row]["text"], repr(self.values[row])
        raise ValueError(
            f"row {row} of the {self.part} ({text[:40]!r}{'…' * (len(text) > 40)}) has the label "
            f"{label[:60]}{'…' * (len(label) > 60)}: {why}"
        )

    def to_names(self) -> list[str]:
        """Return the name of each row's class. The name of a whole number is the number. Raise ValueError for lists."""
        if self.holds_lists:
            self.refuse(0, "a list is not a single label", "multi-label")
        names: dict[Any, str] = {}
        for row, value in enumerate(self.values):
            if value not in names:
                names[value] = self._find_name(row, value)
        return [names[value] for value in self.values]

    def to_name_lists(self) -> list[list[str]]:
        """Return the label names of each row. Raise ValueError for a cell without a list or with a repeated label."""
        self._check_lists()
        result = []
        for row, value in enumerate(self.values):
            names = [self._find_name(row, item) for item in value]
            if len(set(names)) < len(names):
                twice = max(names, key=names.count)
                self.refuse(
                    row,
                    f"the list holds {twice!r} twice. Write each label of a row once, or write multi-hot lists: of the "
                    "same length in every row, with a 0 or 1 for each label",
                )
            result.append(names)
        return result

    def is_multi_hot(self, model_labels: Sequence[str]) -> bool:
        """Return whether the lists hold a 0 or 1 for each label, and not the labels themselves.

        Lists of floats and booleans are multi-hot. Lists of integers are multi-hot if all of them are 0 or 1 and all
        lists have the same length of two or more. As labels, such integers would make no sense: a row would have a
        label twice, or every row would have the same two labels. There is one exception: the integers are labels if no
        list repeats one, and if a checkpoint has more or fewer labels (`model_labels`) than a list has entries.
        """
        if not self.holds_lists or self.has_class_names or self.dtype not in ("int", "float", "bool"):
            return False
        if self.dtype != "int":
            return True
        lengths = {len(value) for value in self.values}
        if len(lengths) > 1 or max(lengths) < 2 or any(item not in (0, 1) for value in self.values for item in value):
            return False
        repeats = any(len(set(value)) < len(value) for value in self.values)
        return repeats or not model_labels or lengths == {len(model_labels)}

    def most_common_length(self) -> int:
        """Return the most common length of the lists."""
        return Counter(map(len, self.values)).most_common(1)[0][0]

    def to_multi_hot(self, count: int) -> NDArray[np.float32]:
        """Return the zeros and ones, float32[E, count]. Raise ValueError for a row that holds anything else."""
        self._check_lists()
        for row, value in enumerate(self.values):
            if len(value) != count:
                self.refuse(
                    row, f"the list has {len(value)} entries, but a multi-hot list has one for each of {count} labels"
                )
            if any(item not in (0, 1) for item in value):
                self.refuse(row, "a multi-hot list holds a 0 or 1 for each label")
        return np.array(self.values, np.float32).reshape(len(self.values), count)

    def to_numbers(self) -> NDArray[np.float32]:
        """Return the number of each row, float32[E]. It may be written as text. Raise ValueError for anything else."""
        numbers = []
        for row, value in enumerate(self.values):
            is_word = isinstance(value, str) and not DECIMAL_NUMBER.fullmatch(value.strip())
            if self.holds_lists or self.dtype == "bool" or is_word:
                self.refuse(row, "a regression needs numbers, such as 3 or 4.5")
            name = self._find_name(row, value) if self.names else value
            numbers.append(float(value if self.nonnumeric_class_names else name))
        with np.errstate(over="ignore"):
            result = np.array(numbers, np.float64).astype(np.float32)
        # A finite text or float64 can become infinite: float("1e400"), or 1e39 as float32.
        if not np.isfinite(result).all():
            row = int(np.isfinite(result).argmin())
            self.refuse(row, "a regression needs finite numbers up to 3.4e38, the largest of float32")
        return result

    def _check_lists(self) -> None:
        if not self.holds_lists:
            self.refuse(
                0,
                "it is not a list of labels. To split text that lists several, pass --data.label-separator",
                "single-label",
            )

    def _find_name(self, row: int, item: Any) -> str:
        if self.names:
            if item == -1:
                self.refuse(row, SECRET_LABEL)
            if not 0 <= item < len(self.names):
                self.refuse(row, f"it is not between 0 and {len(self.names) - 1}, the ids of the column's classes")
            return self.names[int(item)]
        if isinstance(item, float):
            if not item.is_integer():
                self.refuse(row, "it is a number and not a class", "regression")
            item = int(item)
        return str(item)


def _split_cells(documents: Dataset, part: str, separator: str) -> list[list[str]]:
    """Return the labels of each cell, without spaces around them. A blank cell has no label."""
    feature = documents.features["label"]
    if isinstance(feature, ClassLabel) or getattr(feature, "dtype", "list") not in ("string", "large_string"):
        raise ValueError(
            f"data.label_separator: the label column of the {part} holds {feature}, not text to split: leave the "
            "separator out, or write the labels as text"
        )
    result = []
    for row, value in enumerate(documents["label"][:]):
        cell = "" if value is None else str(value)
        names = [name.strip() for name in cell.split(separator)] if cell.strip() else []
        if "" in names:
            raise ValueError(
                f"row {row} of the {part} has the label {cell[:60]!r}, in which a part is empty: write the missing "
                "label, or remove the separator"
            )
        result.append(names)
    return result
