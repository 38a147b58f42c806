"""Tables: the rows of files and of datasets, in batches, with the place of each row for error messages."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, TypeAlias

from datasets import Dataset, IterableDataset

from minilm import columnar, delimited, json_rows
from minilm.columns import Column
from minilm.config import Data
from minilm.files import check_mark, file_content, file_kind, form, line_end, open_text, strip_line_end, text_encoding

_BATCH_CHARACTERS = 2**20  # at most, beside `columnar.BATCH_ROWS`; a single row can be longer
_COLUMNAR = ("parquet", "arrow")

Rows: TypeAlias = Iterator[tuple[int, list[Any]]]


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
        parts = (batch for table in rows.iter(batch_size=columnar.BATCH_ROWS) for batch in table.to_batches())
        return columnar.cells_of(parts, columns, heads, self.source)

    def _streamed(self, columns: Sequence[Column]) -> Rows:
        numbers = itertools.count()
        for batch in self.rows.iter(batch_size=columnar.BATCH_ROWS):
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
        if len(places) == columnar.BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield RowBatch(where, places, [list(column) for column in zip(*cells, strict=True)])
            places, cells, characters = [], [], 0
    if places:
        yield RowBatch(where, places, [list(column) for column in zip(*cells, strict=True)])
