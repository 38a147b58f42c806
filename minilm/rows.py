"""Rows of files and of datasets, read in one way whether they are kept or streamed, with the place of each.

A `Table` has rows. `read_batches` gives the cells of the columns that are asked for, checked, in batches; `map_rows`
keeps them in a file of the cache.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import datasets
import pyarrow
from datasets import ClassLabel, Dataset, DatasetInfo, Features, IterableDataset, List, Value
from datasets.table import InMemoryTable

from minilm import columnar, delimited, json_rows
from minilm.cache import open_entry
from minilm.columns import Column, check_label, check_text
from minilm.config import Data
from minilm.files import check_mark, file_content, file_kind, form, line_end, open_text, strip_line_end, text_encoding

_VERSION = 2  # of what is kept in the cache
_ROWS, _CHARACTERS = 1000, 2**20  # of a batch, at most; a single row can be longer
_COLUMNAR = ("parquet", "arrow")

Rows: TypeAlias = Iterator[tuple[int, list[Any]]]
Blank: TypeAlias = Literal["keep", "drop", "refuse"]


@dataclass(frozen=True)
class RowBatch:
    """Some rows of a table: the place of each, and the cells of each column that is asked for."""

    where: Callable[[int], str]
    """How an error message calls a place."""
    places: Sequence[int]
    cells: Sequence[Sequence[Any]]

    def __getitem__(self, part: slice) -> "RowBatch":
        return RowBatch(self.where, self.places[part], [column[part] for column in self.cells])


class Table(Protocol):
    """Rows in a fixed order, which can be read as often as one likes."""

    identity: Any
    """What tells the content, as JSON types."""
    typed: bool
    """Whether cells are numbers, texts and lists; otherwise all are texts."""

    def batches(self, columns: Sequence[Column]) -> Iterator[RowBatch]:
        """The cells of these columns."""

    def names(self, columns: Sequence[Column]) -> list[str]:
        """The names of all columns, where `columns` are asked for."""

    def class_names(self, column: Column) -> tuple[str, ...]:
        """The names of the classes that a column of labels has numbers of; none where there are no names."""


class FileTable:
    """The rows of files of one kind, one file after the other."""

    def __init__(self, files: Sequence[str], data: Data) -> None:
        self.files, self.data = tuple(files), data
        self.kind = file_kind(files[0])
        self.typed = self.kind != "delimited"
        self.delimiter = "\t" if data.delimiter == "tab" else data.delimiter
        try:
            self.contents = [file_content(file) for file in files]
        except OSError as error:
            raise ValueError(f"{error.filename}: cannot be read ({error.strerror})") from error
        # No names and no times: a copy of a file has the same rows.
        self.identity = [[*map(form, files)], self.contents, data.document, self.delimiter]

    def batches(self, columns: Sequence[Column]) -> Iterator[RowBatch]:
        unit = "row" if self.kind in _COLUMNAR else "line"
        for file, content in zip(self.files, self.contents, strict=True):
            rows = self._rows(file, columns)
            yield from _in_batches(rows, partial("{}, {} {}".format, file, unit))
            if file_content(file) != content:
                raise ValueError(f"{file}: was changed while it was read; start again")

    def _rows(self, file: str, columns: Sequence[Column]) -> Rows:
        if self.kind == "delimited":
            return delimited.read_delimited(file, columns, self._encoding, self.delimiter)
        if self.kind == "json":
            return json_rows.read_json(file, columns)
        if self.kind in _COLUMNAR:
            return columnar.read_columnar(file, columns)
        if extra := [column for column in columns if column.role != "text"]:
            raise extra[0].missing(file, ["text"])
        return _read_text(file, self._encoding, self.data.document)

    @cached_property
    def _encoding(self) -> str:
        return text_encoding(self.files)

    def names(self, columns: Sequence[Column]) -> list[str]:
        file = self.files[0]
        if self.kind == "delimited":
            return delimited.read_delimited_names(file, columns, self._encoding, self.delimiter)
        if self.kind == "json":
            return json_rows.read_json_names(file)
        return columnar.read_columnar_names(file) if self.kind in _COLUMNAR else ["text"]

    def class_names(self, column: Column) -> tuple[str, ...]:
        if self.kind not in _COLUMNAR:
            return ()
        found = {file: columnar.class_names(file, column) for file in self.files}
        first = found[self.files[0]]
        for file, names in found.items():
            if names != first:
                raise ValueError(
                    f"{file}: the classes of column {column.name!r} are {', '.join(names) or 'without names'}, and in "
                    f"{self.files[0]} {', '.join(first) or 'without names'}; write the files with the same classes"
                )
        return first


class DatasetTable:
    """The rows of a dataset of the datasets library, kept or streamed."""

    typed = True

    def __init__(self, rows: Dataset | IterableDataset, source: str, identity: Any) -> None:
        self.rows, self.source, self.identity = rows, source, identity

    def batches(self, columns: Sequence[Column]) -> Iterator[RowBatch]:
        read = self._kept if isinstance(self.rows, Dataset) else self._streamed
        return _in_batches(read(columns), lambda row: f"{self.source}, row {row}")

    def _kept(self, columns: Sequence[Column]) -> Rows:
        heads = columnar.heads_of(columns, self.rows.features.arrow_schema, self.source)
        rows = self.rows.select_columns(list(dict.fromkeys(heads))).with_format("arrow")
        parts = (batch for table in rows.iter(batch_size=_ROWS) for batch in table.to_batches())
        return columnar.cells_of(parts, columns, heads, self.source)

    def _streamed(self, columns: Sequence[Column]) -> Rows:
        numbers = itertools.count()
        for batch in self.rows.iter(batch_size=_ROWS):
            known = [[head for head in column.heads() if head in batch] for column in columns]
            for column, heads in zip(columns, known, strict=True):
                if not heads:
                    raise column.missing(self.source, list(batch))
            for cells in zip(*(batch[heads[0]] for heads in known), strict=True):
                row = next(numbers)
                named = zip(columns, known, cells, strict=True)
                yield row, [column.find({heads[0]: cell}, f"{self.source}, row {row}") for column, heads, cell in named]

    def names(self, columns: Sequence[Column]) -> list[str]:
        return list(self.rows.column_names or ())

    def class_names(self, column: Column) -> tuple[str, ...]:
        return columnar.names_of_classes(self.rows.features, column)


def _read_text(path: str, encoding: str, document: str) -> Rows:
    """The lines of a file of text, its paragraphs between lines without a visible character, or all of it."""
    newline = line_end(path)
    first, lines = 1, list[str]()
    with open_text(path, encoding, newline) as file:
        for number, line in enumerate(file, start=1):
            check_mark(path, number, line)
            text = strip_line_end(line, newline)
            if document == "line":
                yield number, [text]
            elif document == "paragraph" and not text.strip():
                if lines:
                    yield first, ["\n".join(lines)]
                    lines = []
            else:
                first = first if lines else number
                lines.append(text)
        if document == "file":
            yield 1, ["\n".join([*lines, ""]) if lines and line.endswith(newline) else "\n".join(lines)]
        elif lines:
            yield first, ["\n".join(lines)]


def _in_batches(rows: Rows, where: Callable[[int], str]) -> Iterator[RowBatch]:
    """Rows in batches that are no longer than memory is meant for."""
    places, cells, characters = list[int](), list[list[Any]](), 0
    for place, row in rows:
        places.append(place)
        cells.append(row)
        characters += sum(len(cell) for cell in row if isinstance(cell, str))
        if len(places) == _ROWS or characters >= _CHARACTERS:
            yield RowBatch(where, places, [list(column) for column in zip(*cells, strict=True)])
            places, cells, characters = [], [], 0
    if places:
        yield RowBatch(where, places, [list(column) for column in zip(*cells, strict=True)])


def read_batches(
    table: Table, columns: Sequence[Column], *, split: str = "train", blank: Blank = "drop"
) -> Iterator[dict[str, list[Any]]]:
    """The cells of `columns` in a part of the rows, checked, as lists by role.

    split: `train`, or a part of it such as `train[:5000]` or `train[10%:90%]`.
    blank: whether a row whose text has no visible character is kept, dropped or refused; a second text without one is
        refused then too.

    A column of labels means one thing in all rows of all files: whole numbers, numbers, names, or lists of them. Where
    all cells are texts, `01` is a name, and `+1` is one unless the column has decimals such as `0.5`: then all are
    numbers. Raises ValueError that names the line or row at fault.
    """
    kinds = {column.role: survey(table, column).kind for column in columns if column.role == "label"}
    for batch in _sliced(table, columns, _parts_of(table, columns, split)):
        result: dict[str, list[Any]] = {}
        for column, cells in zip(columns, batch.cells, strict=True):
            if column.role == "label":
                result["label"] = [None if cell is None else _as_kind(cell, kinds["label"]) for cell in cells]
                for place, label in zip(batch.places, result["label"], strict=True):
                    check_label(label, column, batch.where(place))
            else:
                _check_texts(column, cells, batch, blank)
                result[column.role] = list(cells)
        if blank == "drop" and not all(shown := [bool(text) and not text.isspace() for text in result["text"]]):
            result = {role: [*itertools.compress(cells, shown)] for role, cells in result.items()}
        yield result


def _check_texts(column: Column, cells: Sequence[Any], batch: RowBatch, blank: Blank) -> None:
    try:
        "".join(cells).encode()
        good = blank != "refuse" or not any(not text or text.isspace() for text in cells)
    except (TypeError, UnicodeEncodeError):
        good = False
    if not good:
        for place, cell in zip(batch.places, cells, strict=True):
            check_text(cell, column, batch.where(place), blank=blank != "refuse")


def _parts_of(table: Table, columns: Sequence[Column], split: str) -> list[tuple[int, int | None]]:
    """The parts of the rows that a split stands for, each from a row and up to another."""
    if split == "train":
        return [(0, None)]
    if plain := re.fullmatch(r"train\[(\d*):(\d*)\]", split):
        return [(int(plain[1] or 0), int(plain[2]) if plain[2] else None)]
    try:
        instruction = datasets.ReadInstruction.from_spec(split)
        parts = instruction.to_absolute({"train": survey(table, columns[0]).rows})
    except AssertionError as error:
        raise ValueError(f"the split {split!r}: {error}") from error
    return [(part.from_ or 0, part.to) for part in parts]


def _sliced(table: Table, columns: Sequence[Column], parts: list[tuple[int, int | None]]) -> Iterator[RowBatch]:
    """The rows of the parts, part after part."""
    for start, stop in parts:
        row = 0
        for batch in table.batches(columns) if stop is None or start < stop else ():
            count = len(batch.places)
            part = batch[max(0, start - row) : count if stop is None else max(0, min(count, stop - row))]
            if part.places:
                yield part
            row += count
            if stop is not None and row >= stop:
                break


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


def _as_kind(cell: Any, kind: str) -> Any:
    if kind.startswith("list of "):
        return [_as_kind(item, kind.removeprefix("list of ")) for item in cell]
    return {"int64": int, "float64": float}.get(kind, lambda cell: cell)(cell)


def _feature(kind: str, names: tuple[str, ...]) -> Any:
    """The type of a column of labels, as the datasets library has it."""
    item = kind.removeprefix("list of ") or "int64"
    feature = ClassLabel(names=list(names)) if names and item == "int64" else Value(item)
    return List(feature) if kind.startswith("list of ") else feature


def map_rows(table: Table, columns: Sequence[Column], *, split: str, blank: Blank) -> Dataset:
    """What `read_batches` gives, as a memory-mapped dataset whose columns are the roles.

    Its place in the cache and its fingerprint are decided by the content of what is read and by what is taken of it.
    """
    taken = [[column.role, column.name, column.lists_labels] for column in columns]
    content = json.dumps([_VERSION, table.identity, taken, split, blank])
    key = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
    folder = open_entry(f"rows-{key}", lambda folder: _write(folder / "rows.arrow", table, columns, split, blank))
    rows = pyarrow.ipc.open_stream(pyarrow.memory_map(str(folder / "rows.arrow"))).read_all()
    info = DatasetInfo(features=Features.from_arrow_schema(rows.schema))
    return Dataset(InMemoryTable(rows), info=info, fingerprint=key)


def _write(path: Path, table: Table, columns: Sequence[Column], split: str, blank: Blank) -> None:
    features: dict[str, Any] = {column.role: Value("string") for column in columns}
    for column in columns:
        if column.role == "label":
            features["label"] = _feature(survey(table, column).kind, table.class_names(column))
    schema = Features(features).arrow_schema
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for batch in read_batches(table, columns, split=split, blank=blank):
            writer.write_batch(pyarrow.RecordBatch.from_pydict(batch, schema=schema))
