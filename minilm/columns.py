"""The columns that are asked for: how each is found in a row, and what its cells may hold."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from minilm.checks import closest

_FLAGS = {"text": "--data.column", "pair": "--data.pair-column", "label": "--data.label-column"}


class RepeatedKeys(dict[str, Any]):
    """An object of JSON in which some keys stand twice, with different values."""

    repeated: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column that is asked for, by the role that it plays in a document."""

    role: Literal["text", "pair", "label"]
    name: str
    """The name of a column, or a dotted path into one: what has the whole name comes before a path."""
    lists_labels: bool = False
    """Whether a cell of text lists labels with a separator between them: a blank one then has none."""

    def heads(self) -> list[str]:
        """The columns that can hold it, the likeliest first: `a.b.c`, `a.b` and `a` for the name `a.b.c`."""
        parts = self.name.split(".")
        return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]

    def find(self, row: Mapping[str, Any], where: str) -> Any:
        """The cell of this column in a row; a list of strings that lies inside a column is one text, joined by spaces.

        Raises ValueError, which begins with `where`, for a row that does not have it.
        """
        if self.name in row and not isinstance(row, RepeatedKeys):
            return row[self.name]
        cell = self._reach(row, self.name, where)
        inside = self.name not in row
        if self.role != "label" and inside and isinstance(cell, list) and all(isinstance(item, str) for item in cell):
            return " ".join(cell)
        return cell

    def _reach(self, value: Any, path: str, where: str) -> Any:
        """What lies under the path: of a list, what lies there in each of its items."""
        if isinstance(value, list):
            return [self._reach(item, path, where) for item in value]
        known = value if isinstance(value, dict) else {}
        parts = path.split(".")
        for count in range(len(parts), 0, -1):
            head, rest = ".".join(parts[:count]), ".".join(parts[count:])
            if head in known:
                if isinstance(known, RepeatedKeys) and head in known.repeated:
                    raise ValueError(f"{where}: the key {head!r} stands twice in one object, with different values")
                return self._reach(known[head], rest, where) if rest else known[head]
        if value is None and path != self.name:
            return None
        raise self.missing(where, list(known), path)

    def missing(self, where: str, known: Sequence[str], part: str = "") -> ValueError:
        """The error about a column, or a part of its path, that is not there."""
        outer = self.name.removesuffix(part) if part else ""
        if outer and not known:
            return ValueError(
                f"{where}: no column {self.name!r}, as {outer[:-1]!r} has no columns inside; "
                f"pass another {_FLAGS[self.role]}"
            )
        return ValueError(
            f"{where}: no column {closest(self.name, [outer + name for name in known])} Pass {_FLAGS[self.role]}"
        )

    def not_text(self, where: str, what: str) -> ValueError:
        """The error about a cell that holds `what` in place of a text."""
        return ValueError(
            f"{where}: column {self.name!r} holds {what} where text is expected; "
            f"change the row, or pass another {_FLAGS[self.role]}"
        )


def check_text(cell: Any, column: Column, where: str, *, blank: bool) -> None:
    """Raise ValueError unless a cell holds a text that can be written as UTF-8, and unless `blank` a visible one."""
    if not isinstance(cell, str):
        raise column.not_text(where, type(cell).__name__)
    try:
        cell.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: column {column.name!r} holds half a surrogate pair, such as \\ud83d, which is no character"
        ) from None
    if not blank and not cell.strip():
        raise ValueError(f"{where}: column {column.name!r} holds no text; give it one or take the row out")


def check_label(value: Any, column: Column, where: str) -> None:
    """Raise ValueError unless a cell holds a label: a finite number, a name, or a list of these."""
    where = f"{where}: column {column.name!r}"
    blank = value is None or (isinstance(value, str) and not value.strip())
    if blank and column.lists_labels:
        return
    if blank:
        raise ValueError(f"{where} holds no label; give it one or take the row out")
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, bool | int | str) or (isinstance(item, float) and math.isfinite(item)):
            continue
        what = "None in a list" if item is None else repr(value)[:40]
        raise ValueError(f"{where} holds {what} where a label is expected: a number, a name, or a list of them")
