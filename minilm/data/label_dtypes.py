"""The dtype of the cells in a column of labels: whole numbers, numbers, names, truth values, or lists of these."""

import json
import math
import re
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from typing import Any

from datasets import ClassLabel, List, Value

from minilm.data.columns import Column, check_label
from minilm.data.tables import Table

_LIST = "list of "
# Words that programs write for a missing number. In a column of names they are names.
_MISSING = re.compile(r"-?nan|na|n/a|<na>|null|none|[+-]?inf(inity)?")
_NUMBER = re.compile(r" *[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)? *")
_WHOLE = re.compile(r"[+-]?[0-9]+")
# The dtypes of cells that are text. The later of two dtypes can hold cells of both.
_TEXT_DTYPES = ("int64", "whole", "float64", "string")


@dataclass(frozen=True)
class ColumnScan:
    """The results of one pass over a column."""

    rows: int
    dtype: str
    """The dtype of the cells as labels: `int64`, `float64`, `string`, `bool`, or `list of ` and one of these."""


def scan_column(table: Table, column: Column) -> ColumnScan:
    """Count the rows of a table, and decide the dtype of the cells in a column of labels.

    The result is remembered by the table's content, because the parts of a source are read one by one. Raises
    ValueError where no dtype holds all cells.
    """
    return _scan_column(_ScanKey(json.dumps(table.identity), column, table))


@dataclass(frozen=True)
class _ScanKey:
    identity: str
    column: Column
    table: Table = field(compare=False)


@lru_cache(maxsize=16)
def _scan_column(key: _ScanKey) -> ColumnScan:
    table, column = key.table, key.column
    # A text that lists labels is not a number, however it is written.
    infer_dtype = _infer_dtype_of_value if table.typed or column.lists_labels else _infer_dtype_of_text
    rows, dtype, first, missing = 0, "", "", ""
    for batch in table.iter_batches([column]):
        rows += len(batch.places)
        for place, cell in zip(batch.places, batch.cells[0], strict=True) if column.role == "label" else ():
            if cell is None:
                continue
            cell_dtype = infer_dtype(cell)
            if dtype and cell_dtype == dtype:
                continue
            where = batch.where(place)
            holds = f"{where}: column {column.name!r} holds {cell!r:.40}"
            if not table.typed and _MISSING.fullmatch(cell.strip().lower()):
                missing = missing or holds
                continue
            if not cell_dtype:
                check_label(cell, column, where)
                raise ValueError(
                    f"{holds} where a label is expected: a number (a whole one from -2**63 to 2**63 - 1), a name, or a "
                    "list of numbers or of names"
                )
            common = _find_common_dtype(dtype, cell_dtype, typed=table.typed) if dtype else cell_dtype
            if not common:
                raise ValueError(
                    f"{holds}, {_describe(cell_dtype)}, and {first} holds {_describe(dtype)}; write all labels alike"
                )
            dtype, first = common, first or where
    dtype = "string" if dtype == "whole" else dtype
    if missing and dtype in ("int64", "float64"):
        raise ValueError(f"{missing}, and {first} holds {_describe(dtype)}; give the row a number or take it out")
    return ColumnScan(rows, dtype or "string")


def _describe(dtype: str) -> str:
    """Return a dtype of label in words, with its article."""
    one, many = {
        "int64": ("a whole number", "whole numbers"),
        "float64": ("a number", "numbers"),
        "bool": ("true or false", "truth values"),
        "string": ("a text", "texts"),
        "": ("", "labels"),
    }[dtype.removeprefix(_LIST)]
    return f"a list of {many}" if dtype.startswith(_LIST) else one


def _infer_dtype_of_text(cell: str) -> str:
    """Return the dtype of a cell of text, which is a number only if it is written as numbers are: `01` is a name.

    `whole` is a whole number that int64 writes in another way: `+1`, `-0`, or a number beyond 64 bits. It is a number
    if the column has decimals. Otherwise it is a name, because its class would be called `1`.
    """
    if not _NUMBER.fullmatch(cell) or not math.isfinite(float(cell)):
        return "string"
    digits = cell.strip(" ")
    if not _WHOLE.fullmatch(digits):
        return "float64"
    return "int64" if -(2**63) <= int(digits) < 2**63 and str(int(digits)) == digits else "whole"


def _infer_dtype_of_value(cell: Any) -> str:
    """Return the dtype of a cell that has a type; empty if the cell is not a label. An empty list is a `list of `."""
    if isinstance(cell, list):
        dtypes = {_infer_dtype_of_value(item) for item in cell}
        item = "float64" if dtypes == {"int64", "float64"} else dtypes.pop() if len(dtypes) == 1 else ""
        return _LIST + item if not cell or (item and not item.startswith(_LIST)) else ""
    if isinstance(cell, int) and not isinstance(cell, bool) and not -(2**63) <= cell < 2**63:
        return ""
    dtype_of = {bool: "bool", int: "int64", float: "float64", Decimal: "float64", str: "string"}
    return dtype_of.get(type(cell), "")


def _find_common_dtype(one: str, other: str, *, typed: bool) -> str | None:
    """Return the dtype that can hold cells of both dtypes, or None."""
    if not typed:
        return max(one, other, key=_TEXT_DTYPES.index)
    if one.startswith(_LIST) != other.startswith(_LIST):
        return None
    items = {one.removeprefix(_LIST), other.removeprefix(_LIST)} - {""}  # an empty list has no item
    if len(items) == 2 and items != {"int64", "float64"}:
        return None
    item = "float64" if len(items) == 2 else "".join(items)
    return _LIST + item if one.startswith(_LIST) else item


def convert_label(cell: Any, dtype: str) -> Any:
    """Convert a cell to the dtype of its column."""
    if dtype.startswith(_LIST):
        return [convert_label(item, dtype.removeprefix(_LIST)) for item in cell]
    return {"int64": int, "float64": float}.get(dtype, lambda cell: cell)(cell)


def make_label_feature(dtype: str, names: tuple[str, ...]) -> Any:
    """Return the type of a column of labels in the datasets library: a ClassLabel if whole numbers have names."""
    item = dtype.removeprefix(_LIST) or "int64"
    feature = ClassLabel(names=list(names)) if names and item == "int64" else Value(item)
    return List(feature) if dtype.startswith(_LIST) else feature
