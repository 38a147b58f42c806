"""Checked rows of tables.

`read_batches` yields the cells of columns in batches. `cache_rows` stores them in the cache and memory-maps them, as a
`RowTable`.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import datasets
import pyarrow
from datasets import Dataset, DatasetInfo, Features, Value
from datasets.table import InMemoryTable

from minilm.data.columns import Column, check_label, check_text, encode_json
from minilm.data.label_dtypes import convert_label, make_label_feature, scan_column
from minilm.data.tables import RowBatch, Table
from minilm.utils.cache import open_entry

# The version of the rows in the cache. Increase it when a change to the code changes the rows of the same files.
_VERSION = 3

BlankPolicy: TypeAlias = Literal["keep", "drop", "refuse"]
"""What to do with rows without a visible character. `drop` drops a row if all its texts are blank. `refuse` raises
ValueError if one of its texts is blank. A row without a column of texts is always kept."""

# The columns of stored rows that say where a row comes from: the number of its file, and its line or row there. No
# role has these names, because they are not identifiers.
_FILE, PLACE = "file number", "line or row"


def read_batches(
    table: Table, columns: Sequence[Column], *, split: str = "train", blank: BlankPolicy = "drop"
) -> Iterator[dict[str, list[Any]]]:
    """Yield the checked cells of `columns` in batches: a dictionary with a list of cells for each role.

    Cells of the kind `json` are JSON text. Two more lists hold the places of the rows.

    split: `train`, or a part of it such as `train[:5000]` or `train[10%:90%]`.
    blank: what to do with a row whose texts have no visible character.

    All labels of a column have one type: integers, floats, names, booleans, or lists of these. In a delimited file,
    `01` is a name. `+1` is a name too, unless the column has decimals such as `0.5`: then all cells are floats. Raise
    ValueError that names the line or row at fault.
    """
    dtypes = {column.role: scan_column(table, column).dtype for column in columns if column.kind == "label"}
    texts = [column.role for column in columns if column.kind == "text"]
    for batch in _read_parts(table, columns, _find_parts(table, columns, split)):
        result: dict[str, list[Any]] = {_FILE: [batch.file] * len(batch.places), PLACE: list(batch.places)}
        for column, cells in zip(columns, batch.cells, strict=True):
            result[column.role] = _check_cells(column, cells, batch, blank, dtypes)
        if blank == "drop" and texts:
            shown = [
                any(text and not text.isspace() for text in row)
                for row in zip(*(result[role] for role in texts), strict=True)
            ]
            if not all(shown):
                result = {role: [*itertools.compress(cells, shown)] for role, cells in result.items()}
        yield result


def _check_cells(
    column: Column, cells: Sequence[Any], batch: RowBatch, blank: BlankPolicy, dtypes: Mapping[str, str]
) -> list[Any]:
    """Return the cells of a column as they are stored. Raise ValueError that names the line or row at fault.

    dtypes: the dtype of each column of labels, by its role.
    """
    if column.kind == "text":
        _check_texts(column, cells, batch, blank)
        return list(cells)
    if column.kind == "json":
        return [encode_json(cell, column, batch.where(place)) for place, cell in zip(batch.places, cells, strict=True)]
    labels = [None if cell is None else convert_label(cell, dtypes[column.role]) for cell in cells]
    for place, label in zip(batch.places, labels, strict=True):
        check_label(label, column, batch.where(place))
    return labels


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


class Row(dict[str, Any]):
    """The cells of a row by role. `where` is the beginning of an error message about it: `chats.jsonl, line 7`."""

    def __init__(self, cells: Mapping[str, Any], where: str) -> None:
        super().__init__(cells)
        self.where = where


@dataclass(frozen=True)
class _StoredRows:
    """Rows of one source, as `_write_rows` stores them."""

    source: str
    """What the settings call the source."""
    rows: Dataset
    """The columns are the roles, and those that say where a row comes from."""
    locate: Callable[[int, int], str]
    """Returns the beginning of an error message about the row of a file: `minilm.data.tables.Table.locate`."""
    class_names: Mapping[str, tuple[str, ...]]
    """The names of the classes by role, for the columns whose source stores names."""

    def describe_labels(self, column: Column) -> str:
        """Return in words the type of a column of labels, and the names of its classes if the source stores them."""
        if column.kind == "label":
            return str(self.rows.features[column.role])
        names = self.class_names.get(column.role)
        return f"class ids of {', '.join(names)}" if names else f"{column.kind} without names of classes"


@dataclass(frozen=True, eq=False)
class RowTable:
    """Rows of one or several sources, memory-mapped, in a fixed order.

    `iter_batches` can be called again and again. A cell of the kind `text` is a string. One of the kind `label` has the
    type that all labels of its column have. One of the kind `json` is the value that the source holds.
    """

    columns: tuple[Column, ...]
    parts: tuple[_StoredRows, ...]

    @classmethod
    def from_texts(cls, columns: Sequence[Column], texts: Sequence[str], source: str) -> "RowTable":
        """Return the rows of texts that are in memory, and not in the cache. In errors, they are numbered from 0."""
        cells = {column.role: texts for column in columns}
        rows = Dataset.from_dict({_FILE: [0] * len(texts), PLACE: range(len(texts)), **cells})
        return cls(tuple(columns), (_StoredRows(source, rows, lambda _, place: f"{source}, text {place}", {}),))

    def __len__(self) -> int:
        return sum(len(part.rows) for part in self.parts)

    def iter_batches(self, size: int = 1000) -> Iterator[list[Row]]:
        """Yield the rows in their order, in lists of at most `size` rows."""
        for part in self.parts:
            for batch in part.rows.with_format("arrow").iter(size):
                where = map(part.locate, batch[_FILE].to_pylist(), batch[PLACE].to_pylist())
                lists = [self._decode_cells(column, batch[column.role].to_pylist()) for column in self.columns]
                roles = [column.role for column in self.columns]
                yield [
                    Row(dict(zip(roles, cells, strict=True)), place)
                    for *cells, place in zip(*lists, where, strict=True)
                ]

    @staticmethod
    def _decode_cells(column: Column, cells: list[Any]) -> list[Any]:
        return [*map(json.loads, cells)] if column.kind == "json" else cells

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the roles and of the cells of all rows in their order. It does not depend on where they are."""
        roles = [column.role for column in self.columns]
        name = hashlib.blake2b(json.dumps([roles, *(part.rows._fingerprint for part in self.parts)]).encode())

        def build(folder: Path) -> None:
            digest = hashlib.blake2b(json.dumps(roles).encode(), digest_size=12)
            for batch in self.iter_batches():
                for row in batch:
                    digest.update(json.dumps([*row.values()]).encode() + b"\n")
            (folder / "fingerprint").write_text(digest.hexdigest(), encoding="utf-8")

        # The cells are hashed only once. The datasets library gives other rows another fingerprint.
        return (open_entry(f"fingerprint-{name.hexdigest()[:24]}", build) / "fingerprint").read_text(encoding="utf-8")

    @property
    def class_names(self) -> Mapping[str, tuple[str, ...]]:
        """The names of the classes by role, for the columns of class ids whose source stores names (ClassLabel)."""
        return self.parts[0].class_names

    @cached_property
    def dataset(self) -> Dataset:
        """The rows as a dataset whose columns are the roles. A cell of the kind `json` is JSON text there."""
        return datasets.concatenate_datasets([part.rows.remove_columns([_FILE, PLACE]) for part in self.parts])

    def select(self, indices: Sequence[int]) -> "RowTable":
        """Return the rows of these numbers, in this order. Only for rows of one source."""
        return self._replace_rows(self._single.rows.select(indices))

    def hold_out(self, count: int, seed: int) -> "tuple[RowTable, RowTable]":
        """Return (the other rows, `count` random rows). Only for rows of one source."""
        halves = self._single.rows.train_test_split(test_size=count, seed=seed)
        return self._replace_rows(halves["train"]), self._replace_rows(halves["test"])

    def join(self, others: "Sequence[RowTable]") -> "RowTable":
        """Return the rows of several tables with the same columns, one table after the other.

        Raise ValueError if the labels of two tables differ in type, or if their classes have different names.
        """
        joined = replace(self, parts=tuple(part for table in (self, *others) for part in table.parts))
        for column in self.columns:
            kinds = [part.describe_labels(column) for part in joined.parts]
            if len({*kinds}) > 1:
                dtypes = ", ".join(f"{kind} in {part.source}" for kind, part in zip(kinds, joined.parts, strict=True))
                raise ValueError(
                    f"{column.setting}: the labels of the sources differ in type: {dtypes}; write all labels alike"
                )
        return joined

    @property
    def _single(self) -> _StoredRows:
        (part,) = self.parts
        return part

    def _replace_rows(self, rows: Dataset) -> "RowTable":
        return replace(self, parts=(replace(self._single, rows=rows),))


def cache_rows(table: Table, columns: Sequence[Column], *, source: str, split: str, blank: BlankPolicy) -> RowTable:
    """Return the rows of `read_batches`, memory-mapped. `source` is what the settings call the table's source.

    The table's identity and the arguments are the key of the cache entry and the fingerprint of the dataset.
    """
    selection = [[column.role, column.name, column.kind, column.lists_labels] for column in columns]
    content = json.dumps([_VERSION, table.identity, selection, split, blank])
    key = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
    folder = open_entry(f"rows-{key}", lambda folder: _write_rows(folder / "rows.arrow", table, columns, split, blank))
    stored = pyarrow.ipc.open_stream(pyarrow.memory_map(str(folder / "rows.arrow"))).read_all()
    info = DatasetInfo(features=Features.from_arrow_schema(stored.schema))
    rows = Dataset(InMemoryTable(stored), info=info, fingerprint=key)
    names = {column.role: table.read_class_names(column) for column in columns if column.kind != "text"}
    named = {role: of_role for role, of_role in names.items() if of_role}
    return RowTable(tuple(columns), (_StoredRows(source, rows, table.locate, named),))


def _write_rows(path: Path, table: Table, columns: Sequence[Column], split: str, blank: BlankPolicy) -> None:
    """Write the rows of `read_batches` to a file in the stream format of Arrow."""
    features: dict[str, Any] = {_FILE: Value("int32"), PLACE: Value("int64")}
    features |= {column.role: Value("string") for column in columns}
    for column in columns:
        if column.kind == "label":
            features[column.role] = make_label_feature(scan_column(table, column).dtype, table.read_class_names(column))
    schema = Features(features).arrow_schema
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for batch in read_batches(table, columns, split=split, blank=blank):
            writer.write_batch(pyarrow.RecordBatch.from_pydict(batch, schema=schema))
