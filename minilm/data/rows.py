"""Checked rows of a table.

`read_batches` yields the cells of columns in batches. `cache_rows` stores them in the cache and memory-maps them.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import datasets
import pyarrow
from datasets import Dataset, DatasetInfo, Features, Value
from datasets.table import InMemoryTable

from minilm.data.columns import Column, check_label, check_text
from minilm.data.label_dtypes import convert_label, make_label_feature, scan_column
from minilm.data.tables import RowBatch, Table
from minilm.utils.cache import open_entry

# The version of the rows in the cache. Increase it when a change to the code changes the rows of the same files.
_VERSION = 2

BlankPolicy: TypeAlias = Literal["keep", "drop", "refuse"]
"""What to do with a row whose text has no visible character. `refuse` raises ValueError."""


def read_batches(
    table: Table, columns: Sequence[Column], *, split: str = "train", blank: BlankPolicy = "drop"
) -> Iterator[dict[str, list[Any]]]:
    """Yield the checked cells of `columns` in batches: a dictionary with a list of cells for each role.

    split: `train`, or a part of it such as `train[:5000]` or `train[10%:90%]`.
    blank: what to do with a row whose text has no visible character. For the second text, `drop` means `keep`.

    All labels of a column have one type: integers, floats, names, booleans, or lists of these. In a delimited file,
    `01` is a name. `+1` is a name too, unless the column has decimals such as `0.5`: then all cells are floats. Raise
    ValueError that names the line or row at fault.
    """
    dtypes = {column.role: scan_column(table, column).dtype for column in columns if column.role == "label"}
    for batch in _read_parts(table, columns, _find_parts(table, columns, split)):
        result: dict[str, list[Any]] = {}
        for column, cells in zip(columns, batch.cells, strict=True):
            if column.role == "label":
                result["label"] = [None if cell is None else convert_label(cell, dtypes["label"]) for cell in cells]
                for place, label in zip(batch.places, result["label"], strict=True):
                    check_label(label, column, batch.where(place))
            else:
                _check_texts(column, cells, batch, blank)
                result[column.role] = list(cells)
        if blank == "drop" and not all(shown := [bool(text) and not text.isspace() for text in result["text"]]):
            result = {role: [*itertools.compress(cells, shown)] for role, cells in result.items()}
        yield result


def _check_texts(column: Column, cells: Sequence[Any], batch: RowBatch, blank: BlankPolicy) -> None:
    """Check all cells at once. Only if that fails, check one by one, which is slower but names the row."""
    try:
        "".join(cells).encode()
        good = blank != "refuse" or not any(not text or text.isspace() for text in cells)
    except (TypeError, UnicodeEncodeError):
        good = False
    if not good:
        for place, cell in zip(batch.places, cells, strict=True):
            check_text(cell, column, batch.where(place), blank=blank != "refuse")


def _find_parts(table: Table, columns: Sequence[Column], split: str) -> list[tuple[int, int | None]]:
    """Return the parts of the rows in a split, each as (first row, row after the last); None stands for the end."""
    if split == "train":
        return [(0, None)]
    if plain := re.fullmatch(r"train\[(\d*):(\d*)\]", split):
        return [(int(plain[1] or 0), int(plain[2]) if plain[2] else None)]
    try:
        instruction = datasets.ReadInstruction.from_spec(split)
        parts = instruction.to_absolute({"train": scan_column(table, columns[0]).rows})
    except AssertionError as error:
        raise ValueError(f"the split {split!r}: {error}") from error
    return [(part.from_ or 0, part.to) for part in parts]


def _read_parts(table: Table, columns: Sequence[Column], parts: list[tuple[int, int | None]]) -> Iterator[RowBatch]:
    """Yield the rows of the parts, one part after the other."""
    for start, stop in parts:
        row = 0
        for batch in table.iter_batches(columns) if stop is None or start < stop else ():
            count = len(batch.places)
            part = batch[max(0, start - row) : count if stop is None else max(0, min(count, stop - row))]
            if part.places:
                yield part
            row += count
            if stop is not None and row >= stop:
                break


def cache_rows(table: Table, columns: Sequence[Column], *, split: str, blank: BlankPolicy) -> Dataset:
    """Return the rows of `read_batches` as a memory-mapped dataset. Its columns are named by the roles.

    The table's identity and the arguments are the key of the cache entry and the fingerprint of the dataset.
    """
    selection = [[column.role, column.name, column.lists_labels] for column in columns]
    content = json.dumps([_VERSION, table.identity, selection, split, blank])
    key = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
    folder = open_entry(f"rows-{key}", lambda folder: _write_rows(folder / "rows.arrow", table, columns, split, blank))
    rows = pyarrow.ipc.open_stream(pyarrow.memory_map(str(folder / "rows.arrow"))).read_all()
    info = DatasetInfo(features=Features.from_arrow_schema(rows.schema))
    return Dataset(InMemoryTable(rows), info=info, fingerprint=key)


def _write_rows(path: Path, table: Table, columns: Sequence[Column], split: str, blank: BlankPolicy) -> None:
    """Write the rows of `read_batches` to a file in the stream format of Arrow."""
    features: dict[str, Any] = {column.role: Value("string") for column in columns}
    for column in columns:
        if column.role == "label":
            features["label"] = make_label_feature(scan_column(table, column).dtype, table.read_class_names(column))
    schema = Features(features).arrow_schema
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for batch in read_batches(table, columns, split=split, blank=blank):
            writer.write_batch(pyarrow.RecordBatch.from_pydict(batch, schema=schema))
