"""The dtype of a column of labels, inferred from all its cells."""

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
# Words that programs write for a missing number. In a column of names, they are names.
_MISSING = re.compile(r"-?nan|na|n/a|<na>|null|none|[+-]?inf(inity)?")
_NUMBER = re.compile(r" *[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)? *")
_WHOLE = re.compile(r"[+-]?[0-9]+")
# The dtypes of cells that are text. Of two dtypes, the later one can hold the cells of both.
_TEXT_DTYPES = ("int64", "whole", "float64", "string")


@dataclass(frozen=True)
class ColumnScan:
    """The number of rows and the dtype of a column."""

    rows: int
    dtype: str
    """`int64`, `float64`, `string`, `bool`, or `list of ` and one of these."""


def scan_column(table: Table, column: Column) -> ColumnScan:
    """Count the rows of a table, and infer the dtype of a column of labels from all its cells.

    The result is cached by the table's identity, because a run reads several splits of a source. Raise ValueError that
    names a row if no dtype can hold all cells.
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
    # If a text lists labels, it is not a number, even if it looks like one.
    typed = table.is_typed(column)
    infer_dtype = _infer_dtype_of_value if typed or column.lists_labels else _infer_dtype_of_text
    rows, dtype, first, missing = 0, "", "", ""
    for batch in table.iter_batches([column]):
        rows += len(batch.places)
        for place, cell in zip(batch.places, batch.cells[0], strict=True) if column.kind == "label" else ():
            if cell is None:
                continue
            cell_dtype = infer_dtype(cell)
            if dtype and cell_dtype == dtype:
                continue
            where = batch.where(place)
            holds = f"{where}: column {column.name!r} holds {cell!r:.40}"
            if not typed and _MISSING.fullmatch(cell.strip().lower()):
                missing = missing or holds
                continue
            if not cell_dtype:
                check_label(cell, column, where)
                raise ValueError(
                    f"{holds} where a label is expected: a number (a whole one from -2**63 to 2**63 - 1), a name, or a "
                    "list of numbers or of names"
                )
            common = _find_common_dtype(dtype, cell_dtype, typed=typed) if dtype else cell_dtype
            if not common:
                raise ValueError(
                    f"{holds}, {_describe_dtype(cell_dtype)}, but {first} holds {_describe_dtype(dtype)}; "
                    "write all labels alike"
                )
            dtype, first = common, first or where
    dtype = "string" if dtype == "whole" else dtype
    if missing and dtype in ("int64", "float64"):
        raise ValueError(f"{missing}, but {first} holds {_describe_dtype(dtype)}; fill in a number, or remove the row")
    return ColumnScan(rows, dtype or "string")


def _describe_dtype(dtype: str) -> str:
    """Return the words for a label of this dtype, such as `a list of numbers`."""
    one, many = {
        "int64": ("a whole number", "whole numbers"),
        "float64": ("a number", "numbers"),
        "bool": ("true or false", "truth values"),
        "string": ("a text", "texts"),
        "": ("", "labels"),
    }[dtype.removeprefix(_LIST)]
    return f"a list of {many}" if dtype.startswith(_LIST) else one


def _infer_dtype_of_text(cell: str) -> str:
    """Return the dtype of a cell of text. Only a number in usual notation is a number: `01` is a name.

    `whole` stands for a whole number that would change if it were stored as int64: `+1`, `-0`, or a number beyond 64
    bits. If the column has decimals, it is a number. Otherwise it is a name, so that the class `+1` keeps its name.
    """
    if not _NUMBER.fullmatch(cell) or not math.isfinite(float(cell)):
        return "string"
    digits = cell.strip(" ")
    if not _WHOLE.fullmatch(digits):
        return "float64"
    return "int64" if -(2**63) <= int(digits) < 2**63 and str(int(digits)) == digits else "whole"


def _infer_dtype_of_value(cell: Any) -> str:
    """Return the dtype of a typed cell; empty if the cell is not a label. The dtype of an empty list is `list of `."""
    if isinstance(cell, list):
        dtypes = {_infer_dtype_of_value(item) for item in cell}
        item = "float64" if dtypes == {"int64", "float64"} else dtypes.pop() if len(dtypes) == 1 else ""
        return _LIST + item if not cell or (item and not item.startswith(_LIST)) else ""
    if isinstance(cell, int) and not isinstance(cell, bool) and not -(2**63) <= cell < 2**63:
        return ""
    dtype_of = {bool: "bool", int: "int64", float: "float64", Decimal: "float64", str: "string"}
    return dtype_of.get(type(cell), "")


def _find_common_dtype(one: str, other: str, *, typed: bool) -> str | None:
    """Return the dtype that can hold the cells of both dtypes, or None."""
    if not typed:
        return max(one, other, key=_TEXT_DTYPES.index)
    if one.startswith(_LIST) != other.startswith(_LIST):
        return None
    # An empty list has no dtype of items.
    items = {one.removeprefix(_LIST), other.removeprefix(_LIST)} - {""}
    if len(items) == 2 and items != {"int64", "float64"}:
        return None
    item = "float64" if len(items) == 2 else "".join(items)
    return _LIST + item if one.startswith(_LIST) else item


def convert_label(cell: Any, dtype: str) -> Any:
    """Convert a cell of a column of labels to the dtype of the column."""
    if dtype.startswith(_LIST):
        return [convert_label(item, dtype.removeprefix(_LIST)) for item in cell]
    return {"int64": int, "float64": float}.get(dtype, lambda cell: cell)(cell)


def make_label_feature(dtype: str, names: tuple[str, ...]) -> Any:
    """Return the datasets feature of a column of labels: a ClassLabel if whole numbers have names."""
    item = dtype.removeprefix(_LIST) or "int64"
    feature = ClassLabel(names=list(names)) if names and item == "int64" else Value(item)
    return List(feature) if dtype.startswith(_LIST) else feature
