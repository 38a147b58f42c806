"""What a column of labels holds: whole numbers, numbers, names, truth values or lists of these."""

import json
import math
import re
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from typing import Any

from datasets import ClassLabel, List, Value

from minilm.columns import Column, check_label
from minilm.tables import Table


@dataclass(frozen=True)
class Survey:
    """What is known of a column after all of it was read."""

    rows: int
    kind: str
    """What its cells are as labels: `int64`, `float64`, `string`, `bool` or `list of` these."""


def survey(table: Table, column: Column) -> Survey:
    """Count the rows and, of a column of labels, decide what its cells are. Raises ValueError where they differ.

    What was found is remembered by the content of the table, as several parts of a source are read one by one.
    """
    return _survey(_Asked(json.dumps(table.identity), column, table))


@dataclass(frozen=True)
class _Asked:
    identity: str
    column: Column
    table: Table = field(compare=False)


@lru_cache(maxsize=16)
def _survey(asked: _Asked) -> Survey:
    table, column = asked.table, asked.column
    rows, kind, first, missing = 0, "", "", ""
    for batch in table.batches([column]):
        rows += len(batch.places)
        for place, cell in zip(batch.places, batch.cells[0], strict=True) if column.role == "label" else ():
            found = _kind(cell) if table.typed else "string" if column.lists_labels else _kind_of_text(cell or "")
            if cell is None or (kind and found == kind):
                continue
            where = batch.where(place)
            if not table.typed and cell.strip().lower() in _MISSING:
                missing = missing or f"{where}: column {column.name!r} holds {cell!r}"
                continue
            if not found:
                check_label(cell, column, where)
                raise ValueError(
                    f"{where}: column {column.name!r} holds {cell!r:.40} where a label is expected: a number (a "
                    "whole one from -2**63 to 2**63 - 1), a name, or a list of numbers or of names"
                )
            both = _common(kind, found, typed=table.typed) if kind else found
            if not both:
                raise ValueError(
                    f"{where}: column {column.name!r} holds {cell!r:.40}, {_said(found)}, and {first} {_said(kind)}; "
                    "write all labels alike"
                )
            kind, first = both, first or where
    kind = "string" if kind == "whole" else kind
    if missing and kind in ("int64", "float64"):
        raise ValueError(f"{missing}, and {first} {_said(kind)}; give the row a number or take it out")
    return Survey(rows, kind or "string")


def _said(kind: str) -> str:
    """A kind of label in words."""
    item = kind.removeprefix("list of ")
    said = {"int64": "a whole number", "float64": "a number", "bool": "true or false", "string": "a text"}.get(item, "")
    return f"a list of {said}s" if item != kind else said


# What programs write for a number that is not there. Among words it is a word.
_MISSING = {
    "nan",
    "-nan",
    "na",
    "n/a",
    "<na>",
    "null",
    "none",
    "inf",
    "+inf",
    "-inf",
    "infinity",
    "+infinity",
    "-infinity",
}
_NUMBER = re.compile(r" *[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)? *")
_WHOLE = re.compile(r"[+-]?[0-9]+")
# What cells of text can be. The later of two kinds holds cells of both.
_KINDS_OF_TEXT = ("int64", "whole", "float64", "string")


def _kind_of_text(cell: str) -> str:
    """What a cell of text is: a number only where it is written as numbers are, which `01` is not.

    `whole` is a whole number that int64 does not write in the same way: `+1`, `-0`, or one beyond 64 bits. It is a
    number beside decimals. Otherwise it is a name, since as a class it would be called `1`.
    """
    if not _NUMBER.fullmatch(cell) or not math.isfinite(float(cell)):
        return "string"
    digits = cell.strip(" ")
    if not _WHOLE.fullmatch(digits):
        return "float64"
    return "int64" if -(2**63) <= int(digits) < 2**63 and str(int(digits)) == digits else "whole"


def _kind(cell: Any) -> str:
    """What a cell is; nothing for what is no label."""
    if isinstance(cell, list):
        kinds = {_kind(item) for item in cell}
        item = kinds.pop() if len(kinds) == 1 else "float64" if kinds == {"int64", "float64"} else ""
        return "list of " + (item if cell else "") if item or not cell else ""
    if isinstance(cell, int) and not isinstance(cell, bool) and not -(2**63) <= cell < 2**63:
        return ""
    kinds_of = {bool: "bool", int: "int64", float: "float64", Decimal: "float64", str: "string"}
    return kinds_of.get(type(cell), "")


def _common(one: str, other: str, *, typed: bool) -> str | None:
    """The kind that holds cells of both kinds; None where there is none."""
    if not typed:
        return max(one, other, key=_KINDS_OF_TEXT.index)
    if one == other or (one.startswith("list of ") and other == "list of "):
        return one
    if other.startswith("list of ") and one == "list of ":
        return other
    kinds = {one.removeprefix("list of "), other.removeprefix("list of ")}
    alike = one.startswith("list of ") == other.startswith("list of ")
    if kinds == {"int64", "float64"} and alike:
        return one.replace("int64", "float64")
    return None


def as_kind(cell: Any, kind: str) -> Any:
    if kind.startswith("list of "):
        return [as_kind(item, kind.removeprefix("list of ")) for item in cell]
    return {"int64": int, "float64": float}.get(kind, lambda cell: cell)(cell)


def label_feature(kind: str, names: tuple[str, ...]) -> Any:
    """The type of a column of labels, as the datasets library has it."""
    item = kind.removeprefix("list of ") or "int64"
    feature = ClassLabel(names=list(names)) if names and item == "int64" else Value(item)
    return List(feature) if kind.startswith("list of ") else feature
