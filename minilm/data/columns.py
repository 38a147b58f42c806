"""The columns that a run reads: how to find a column's cell in a row, and what a cell may hold."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from minilm.utils.validation import suggest_name

_FLAGS = {"text": "--data.column", "pair": "--data.pair-column", "label": "--data.label-column"}


class DictWithRepeatedKeys(dict[str, Any]):
    """A JSON object in which a key that a run reads occurs more than once, with different values."""

    repeated: frozenset[str] = frozenset()
    """The keys that occur more than once, with different values."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column that a run reads, and its role in a document."""

    role: Literal["text", "pair", "label"]
    name: str
    """The name of a column, or a dotted path into one. If a column has the whole name, it is not read as a path."""
    lists_labels: bool = False
    """True if a cell lists labels with a separator between them. A blank cell then has no labels."""

    def outer_names(self) -> list[str]:
        """Return the columns that can hold this one, in order of preference: for `a.b`, these are `a.b` and `a`."""
        parts = self.name.split(".")
        return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]

    def get_cell(self, row: Mapping[str, Any], where: str) -> Any:
        """Return the cell of this column in a row.

        If a dotted path leads to a list of strings, they are joined by spaces to one text, except in a label column.
        Raise ValueError that begins with `where` if the row does not have the column.
        """
        if self.name in row and not isinstance(row, DictWithRepeatedKeys):
            return row[self.name]
        cell = self._follow(row, self.name, where)
        inside = self.name not in row
        if self.role != "label" and inside and isinstance(cell, list) and all(isinstance(item, str) for item in cell):
            return " ".join(cell)
        return cell

    def _follow(self, value: Any, path: str, where: str) -> Any:
        """Return the value at the end of a dotted path. A list on the way gives a list with the value of each item."""
        if isinstance(value, list):
            return [self._follow(item, path, where) for item in value]
        row = value if isinstance(value, dict) else {}
        parts = path.split(".")
        for count in range(len(parts), 0, -1):
            key, rest = ".".join(parts[:count]), ".".join(parts[count:])
            if key in row:
                if isinstance(row, DictWithRepeatedKeys) and key in row.repeated:
                    raise ValueError(
                        f"{where}: the key {key!r} stands twice in one object, with different values; remove one"
                    )
                return self._follow(row[key], rest, where) if rest else row[key]
        if value is None and path != self.name:
            return None
        raise self.missing_error(where, list(row), path)

    def missing_error(self, where: str, names: Sequence[str], part: str = "") -> ValueError:
        """Return the error for a missing column.

        names: the names of the columns that the row has.
        part: the end of the dotted path that is missing, if its beginning is in the row.
        """
        outer = self.name.removesuffix(part) if part else ""
        if outer and not names:
            return ValueError(
                f"{where}: no column {self.name!r}, because {outer[:-1]!r} has no columns inside; "
                f"pass another {_FLAGS[self.role]}"
            )
        return ValueError(
            f"{where}: no column {suggest_name(self.name, [outer + name for name in names])} Pass {_FLAGS[self.role]}"
        )

    def not_text_error(self, where: str, what: str) -> ValueError:
        """Return the error for a cell that holds `what` instead of a text."""
        return ValueError(
            f"{where}: column {self.name!r} holds {what} where text is expected; "
            f"change the row, or pass another {_FLAGS[self.role]}"
        )


def check_text(cell: Any, column: Column, where: str, *, blank: bool) -> None:
    """Raise ValueError unless a cell is a text that UTF-8 can encode. `blank` allows a text of spaces alone."""
    if not isinstance(cell, str):
        raise column.not_text_error(where, type(cell).__name__)
    try:
        cell.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: column {column.name!r} holds half a surrogate pair, such as \\ud83d, which is not a character; "
            "correct the row"
        ) from None
    if not blank and not cell.strip():
        raise ValueError(f"{where}: column {column.name!r} holds no text; fill it in, or remove the row")


def check_label(value: Any, column: Column, where: str) -> None:
    """Raise ValueError unless a cell holds a label: a finite number, a name, or a list of these."""
    where = f"{where}: column {column.name!r}"
    blank = value is None or (isinstance(value, str) and not value.strip())
    if blank and column.lists_labels:
        return
    if blank:
        raise ValueError(f"{where} holds no label; fill it in, or remove the row")
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, bool | int | str) or (isinstance(item, float) and math.isfinite(item)):
            continue
        shown = "None in a list" if item is None else repr(value)[:40]
        raise ValueError(f"{where} holds {shown} where a label is expected: a number, a name, or a list of them")
