"""The columns that a run reads: how to find a column's cell in a row, and what a cell may hold."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from minilm.utils.validation import suggest_name

# The flags that name the columns of the usual roles.
_FLAGS = {
    "text": "--data.column",
    "pair": "--data.pair-column",
    "negative": "--data.negative-column",
    "label": "--data.label-column",
    "score": "--data.score-column",
    "messages": "--data.column",
    "word_list": "--data.column",
}
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class DictWithRepeatedKeys(dict[str, Any]):
    """A JSON object in which a key that a run reads occurs more than once, with different values."""

    repeated: frozenset[str] = frozenset()
    """The keys that occur more than once, with different values."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column that a run reads, and its role in a document."""

    role: str
    """The key of the cell in a row that is read. It is an identifier of Python."""
    name: str
    """The name of a column, or a dotted path into one. If a column has the whole name, it is not read as a path."""
    kind: Literal["text", "label", "json"] = "text"
    """What a cell holds: a text; a number, a name, or a list of these; or any value that JSON can hold."""
    lists_labels: bool = False
    """True if a cell lists labels with a separator between them. A blank cell then has no labels."""

    @property
    def setting(self) -> str:
        """What errors about the whole column begin with: the setting that names it, if there is one."""
        flag = _FLAGS.get(self.role)
        return flag.removeprefix("--").replace("-", "_") if flag else f"column {self.name!r}"

    def outer_names(self) -> list[str]:
        """Return the columns that can hold this one, in order of preference: for `a.b`, these are `a.b` and `a`."""
        parts = self.name.split(".")
        return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]

    def find_outer(self, names: Collection[str]) -> str | None:
        """Return the name, of these, of the column that is or contains this one, or None if there is none."""
        return next((name for name in self.outer_names() if name in names), None)

    def get_cell(self, row: Mapping[str, Any], where: str) -> Any:
        """Return the cell of this column in a row.

        If a dotted path of a column of texts leads to a list of strings, they are joined by spaces to one text.
        Raise ValueError that begins with `where` if the row does not have the column.
        """
        if self.name in row and not isinstance(row, DictWithRepeatedKeys):
            return row[self.name]
        cell = self._follow(row, self.name, where)
        inside = self.name not in row
        if self.kind == "text" and inside and isinstance(cell, list) and all(isinstance(item, str) for item in cell):
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
                    raise _repeated_key_error(key, where)
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
        flag = _FLAGS.get(self.role)
        if outer and not names:
            advice = f"; pass another {flag}" if flag else ""
            return ValueError(f"{where}: no column {self.name!r}, because {outer[:-1]!r} has no columns inside{advice}")
        advice = f" Pass {flag}" if flag else ""
        return ValueError(f"{where}: no column {suggest_name(self.name, [outer + name for name in names])}{advice}")

    def not_text_error(self, where: str, what: str) -> ValueError:
        """Return the error for a cell that holds `what` instead of a text."""
        advice = f", or pass another {_FLAGS[self.role]}" if self.role in _FLAGS else ""
        return ValueError(f"{where}: column {self.name!r} holds {what} where text is expected; change the row{advice}")


def _repeated_key_error(key: str, where: str) -> ValueError:
    return ValueError(f"{where}: the key {key!r} stands twice in one object, with different values; remove one")


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


def encode_json(cell: Any, column: Column, where: str) -> str:
    """Return a cell as JSON text, from which `json.loads` makes an equal value.

    Raise ValueError if it holds what JSON cannot hold, such as bytes, a date or NaN, or half a surrogate pair.
    """
    try:
        text = _JSON.encode(cell)
        text.encode()
    except RecursionError:
        raise ValueError(
            f"{where}: the lists and objects of column {column.name!r} are nested too deeply; flatten them"
        ) from None
    except (TypeError, ValueError):
        raise ValueError(f"{where}: column {column.name!r} holds {_describe_no_json(cell)}; change the row") from None
    return text


def _describe_no_json(value: Any) -> str:
    """Return in words what a value holds that JSON cannot hold. Empty if there is nothing of that kind."""
    if isinstance(value, dict | list):
        items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return next(filter(None, map(_describe_no_json, items)), "")
    if isinstance(value, float):
        return "" if math.isfinite(value) else f"{value}, which is not a finite number that float64 can hold"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return "half a surrogate pair, such as \\ud83d, which is not a character"
        return ""
    return "" if isinstance(value, int | None) else f"{type(value).__name__}, which JSON cannot hold"


def check_keys(cell: Any, where: str) -> None:
    """Raise ValueError if an object inside a cell has a key twice, with different values."""
    if isinstance(cell, DictWithRepeatedKeys) and cell.repeated:
        raise _repeated_key_error(sorted(cell.repeated)[0], where)
    for item in cell.values() if isinstance(cell, dict) else cell if isinstance(cell, list) else ():
        check_keys(item, where)
