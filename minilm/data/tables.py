"""Tables: the rows of files and of datasets, in batches. Each row comes with its line or number for error messages."""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, TypeAlias

from datasets import Dataset, IterableDataset

from minilm.config import Data
from minilm.data import (
    columnar_files,
    conll_files,
    delimited_files,
    json_files,
    mds_files,
    squad_files,
    text_files,
    webdataset_files,
)
from minilm.data.columns import Column
from minilm.data.fingerprints import fingerprint_file, fingerprint_files, is_hashed_whole
from minilm.data.hub_datasets import is_text
from minilm.data.text_decoding import LinePlaces, detect_encoding
from minilm.utils.hub import describe_loading_error
from minilm.utils.local_files import get_file_kind, get_full_ending

# A batch ends when it has this many characters or `columnar_files.BATCH_ROWS` rows. A single row can be longer.
_BATCH_CHARACTERS = 2**20
_COLUMNAR = ("parquet", "arrow")
# The kinds of files whose places are the numbers of rows.
_NUMBERED = (*_COLUMNAR, "mds", "tar")

# The encoding of more text than this is not found out before it is streamed.
_DETECTED_BYTES = 2**30

# More rows than a row group of Parquet has.
_GROUP_ROWS = 2**32

Place: TypeAlias = tuple[int, int]
"""Where a row begins in a file: its line or its number, and its first byte if reading can begin at a line. Otherwise
the second number is that of the rows before it that begin in the same line."""
NumberedRows: TypeAlias = Iterator[tuple[int, list[Any]]]
"""For each row its place, which is a line number or a row number, and its cells."""


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows of a table: the place of each row, and a list of cells for each column."""

    where: Callable[[int], str]
    """Returns the beginning of an error message about a place, such as `data.csv, line 7`."""
    file: int
    """The number of the file that the rows come from, from 0. It is 0 if the table is not made of files."""
    places: Sequence[int]
    cells: Sequence[Sequence[Any]]

    def __getitem__(self, part: slice) -> "RowBatch":
        return RowBatch(self.where, self.file, self.places[part], [column[part] for column in self.cells])


class Table(Protocol):
    """Rows in a fixed order. They can be read several times."""

    identity: Any
    """A value of JSON types. It differs between tables with different content."""

    def is_typed(self, column: Column) -> bool:
        """Return whether the cells of a column have types such as numbers and lists. Otherwise every cell is text."""

    def iter_batches(self, columns: Sequence[Column]) -> Iterator[RowBatch]:
        """Yield the cells of these columns, in batches of rows."""

    def locate(self, file: int, place: int) -> str:
        """Return the beginning of an error message about a row, such as `data.csv, line 7`."""

    def read_column_names(self, columns: Sequence[Column]) -> list[str]:
        """Return the names of all columns. `columns` helps to find the delimiter of a delimited file."""

    def read_class_names(self, column: Column) -> tuple[str, ...]:
        """Return the names of the classes in a column of labels; empty if the table stores no names."""


class RowPlaces:
    """Where the rows begin that are read from a file in which several can begin in one line."""

    def __init__(self) -> None:
        self._last: Place = (-1, 0)

    def pop(self, lines: Sequence[int]) -> list[Place]:
        """Return the places of the next rows, which begin in these lines."""
        places = list[Place]()
        for line in lines:
            self._last = (line, self._last[1] + 1 if line == self._last[0] else 0)
            places.append(self._last)
        return places


class FileTable:
    """The rows of files of one kind, one file after the other."""

    def __init__(self, files: Sequence[str], data: Data, *, streaming: bool = False) -> None:
        self.files, self.data, self.streaming = tuple(files), data, streaming
        self.kind = get_file_kind(files[0])
        self.delimiter = "\t" if data.delimiter == "tab" else data.delimiter
        try:
            self._is_hashed_whole = is_hashed_whole(files)
            self.fingerprints = fingerprint_files(files)
        except OSError as error:
            raise ValueError(f"{error.filename}: cannot be read ({error.strerror})") from error
        if self.kind == "mds":
            mds_files.check_shards(files, [source for source in (*data.sources, data.eval_source) if source])
        # Names of files are left out, because a copy of a file has the same rows.
        self.identity = [[*map(get_full_ending, files)], self.fingerprints, data.document, self.delimiter]

    def is_typed(self, column: Column) -> bool:
        return self.kind != "delimited"

    def iter_batches(self, columns: Sequence[Column]) -> Iterator[RowBatch]:
        for number, (file, fingerprint) in enumerate(zip(self.files, self.fingerprints, strict=True)):
            yield from group_into_batches(self._read_rows(file, columns), partial(self.locate, number), number)
            if fingerprint_file(file, self._is_hashed_whole) != fingerprint:
                raise ValueError(f"{file}: the file changed while it was read; start again")

    def iter_rest(
        self, number: int, columns: Sequence[Column], place: Place
    ) -> tuple[Iterator[RowBatch], LinePlaces | RowPlaces]:
        """Return the rows of file `number` from the line of a place on, and what tells the places of their lines.

        Reading begins at `place` in text, in JSON with an object per line, and in shards of MDS. In columnar files it
        begins with the group of rows that holds it. Other files are read from their beginning, and the rows before
        `place` in its line are returned too.
        """
        file, (first, byte) = self.files[number], place
        places = LinePlaces(max(1, first), byte)
        if self.kind in _COLUMNAR:
            rows, is_by_line = columnar_files.read_columnar(file, columns, first), False
        elif self.kind == "mds":
            rows, is_by_line = mds_files.read_mds(file, columns, first), False
        elif self.kind == "text":
            check_is_text(columns, file)
            texts = text_files.read_text(file, self._encoding, self.data.document, places)
            rows, is_by_line = ((line, cells * len(columns)) for line, cells in texts), True
        elif self.kind == "json" and file not in self._squad_files and json_files.has_value_per_line(file):
            rows, is_by_line = json_files.read_json(file, columns, places), True
        else:
            rows, is_by_line = itertools.dropwhile(lambda row: row[0] < first, self._read_rows(file, columns)), False
        return group_into_batches(rows, partial(self.locate, number), number), places if is_by_line else RowPlaces()

    def locate(self, file: int, place: int) -> str:
        name = self.files[file]
        word = "row" if self.kind in _NUMBERED else "question" if name in self._squad_files else "line"
        return f"{name}, {word} {place}"

    def _read_rows(self, file: str, columns: Sequence[Column]) -> NumberedRows:
        if self.kind == "delimited":
            return delimited_files.read_delimited(file, columns, self._encoding, self.delimiter)
        if file in self._squad_files:
            return squad_files.read_squad(file, columns)
        if self.kind == "json":
            return json_files.read_json(file, columns)
        if self.kind in _COLUMNAR:
            return columnar_files.read_columnar(file, columns)
        if self.kind == "conll":
            return conll_files.read_conll(file, columns, self._encoding)
        if self.kind == "mds":
            return mds_files.read_mds(file, columns)
        if self.kind == "tar":
            return webdataset_files.read_tar(file, columns)
        check_is_text(columns, file)
        texts = text_files.read_text(file, self._encoding, self.data.document)
        return ((line, cells * len(columns)) for line, cells in texts)

    @cached_property
    def _squad_files(self) -> set[str]:
        return set(filter(squad_files.is_squad, self.files)) if self.kind == "json" else set()

    @cached_property
    def _encoding(self) -> str:
        """The encoding of the text. A long stream is UTF-8, because finding the encoding out reads all of it."""
        size = sum(fingerprint["bytes"] for fingerprint in self.fingerprints)
        return "utf-8" if self.streaming and size > _DETECTED_BYTES else detect_encoding(self.files)

    def read_column_names(self, columns: Sequence[Column]) -> list[str]:
        file = self.files[0]
        if self.kind == "delimited":
            return delimited_files.read_delimited_header(file, columns, self._encoding, self.delimiter)
        if file in self._squad_files:
            return squad_files.COLUMN_NAMES
        if self.kind == "json":
            return json_files.read_json_keys(file)
        if self.kind == "conll":
            return conll_files.read_conll_column_names(file, self._encoding)
        if self.kind == "mds":
            return mds_files.read_mds_column_names(file)
        if self.kind == "tar":
            return webdataset_files.read_tar_column_names(file)
        return columnar_files.read_columnar_field_names(file) if self.kind in _COLUMNAR else ["text"]

    def read_class_names(self, column: Column) -> tuple[str, ...]:
        if self.kind not in _COLUMNAR:
            return ()
        names_of = {file: columnar_files.read_class_names(file, column) for file in self.files}
        first = names_of[self.files[0]]
        for file, names in names_of.items():
            if names != first:
                raise ValueError(
                    f"{file}: the classes of column {column.name!r} are {', '.join(names) or 'without names'}, but in "
                    f"{self.files[0]} they are {', '.join(first) or 'without names'}; write them alike"
                )
        return first


class DatasetTable:
    """The rows of a dataset of the datasets library, memory-mapped or streamed.

    is_delimited: whether the dataset consists of delimited files, whose cells are text (`is_typed`).
    """

    def __init__(
        self, rows: Dataset | IterableDataset, source: str, identity: Any, *, is_delimited: bool = False
    ) -> None:
        self.rows, self.source, self.identity, self.is_delimited = rows, source, identity, is_delimited

    def is_typed(self, column: Column) -> bool:
        return not (self.is_delimited and is_text(self.rows.info, column.name))

    @property
    def part_count(self) -> int:
        """The number of parts that can be read on their own: the files of a streamed dataset, 1 for a mapped one."""
        return 1 if isinstance(self.rows, Dataset) else self.rows.num_shards

    def iter_batches(self, columns: Sequence[Column]) -> Iterator[RowBatch]:
        where = partial(self.locate, 0)
        if isinstance(self.rows, Dataset):
            return group_into_batches(self._read_mapped(columns), where)
        return group_into_batches(self._read_stream(self.rows, columns, where), where)

    def locate(self, file: int, place: int) -> str:
        return f"{self.source}, row {place}"

    def iter_rest(self, number: int, columns: Sequence[Column], place: Place) -> tuple[Iterator[RowBatch], RowPlaces]:
        """Return the rows of part `number` from a place on.

        In a streamed dataset, reading begins with the row group of Parquet that holds the place, and in files of other
        kinds at their beginning. The number of a row is then that of its group times `_GROUP_ROWS`, plus its place in
        the group.
        """
        if isinstance(self.rows, Dataset):
            return group_into_batches(self._read_mapped(columns, place[0]), partial(self.locate, 0)), RowPlaces()
        where = partial(self._locate_in_part, number)
        return group_into_batches(self._read_part(number, columns, where, place[0]), where), RowPlaces()

    def _locate_in_part(self, number: int, place: int) -> str:
        group, row = divmod(place, _GROUP_ROWS)
        part = f", file {number + 1} of {self.part_count}" if self.part_count > 1 else ""
        return f"{self.source}{part}{f', row group {group}' if group else ''}, row {row}"

    def _read_mapped(self, columns: Sequence[Column], start: int = 0) -> NumberedRows:
        outer = columnar_files.find_outer_columns(columns, self.rows.features.arrow_schema, self.source)
        rows = self.rows.select(range(start, len(self.rows))) if start else self.rows
        rows = rows.select_columns(list(dict.fromkeys(outer))).with_format("arrow")
        parts = (batch for table in rows.iter(batch_size=columnar_files.BATCH_ROWS) for batch in table.to_batches())
        return columnar_files.read_cells(parts, columns, outer, partial(self.locate, 0), start)

    def _read_part(
        self, number: int, columns: Sequence[Column], where: Callable[[int], str], start: int
    ) -> NumberedRows:
        first, skipped = divmod(start, _GROUP_ROWS)
        with self._explain_errors():
            part = self.rows.shard(self.part_count, number).reshard()
            groups = part.num_shards
        if first and first >= groups:
            raise ValueError(f"{where(start)}: the file has fewer groups of rows than before; start again")
        for group in range(first, groups):
            rows = part.shard(groups, group)
            if group == first and skipped:
                rows = rows.skip(skipped)
            yield from self._read_stream(rows, columns, where, max(start, group * _GROUP_ROWS))

    def _read_stream(
        self, rows: IterableDataset, columns: Sequence[Column], where: Callable[[int], str], start: int = 0
    ) -> NumberedRows:
        """Yield the rows, whose numbers begin at `start`."""
        numbers = itertools.count(start)
        with self._explain_errors():
            # Without this, the library decodes all columns, such as images. A stream may not know its columns.
            if rows.column_names is not None:
                rows = rows.select_columns(list(dict.fromkeys(self._find_outer_columns(columns, rows.column_names))))
            for batch in rows.iter(batch_size=columnar_files.BATCH_ROWS):
                outer = self._find_outer_columns(columns, batch)
                for cells in zip(*(batch[name] for name in outer), strict=True):
                    row = next(numbers)
                    named = zip(columns, outer, cells, strict=True)
                    yield row, [column.get_cell({name: cell}, where(row)) for column, name, cell in named]

    def _find_outer_columns(self, columns: Sequence[Column], names: Collection[str]) -> list[str]:
        """Return for each column the name, of these, of the column that is or contains it."""
        outer = list[str]()
        for column in columns:
            name = column.find_outer(names)
            if name is None:
                raise column.missing_error(self.source, list(names))
            outer.append(name)
        return outer

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Turn an error of the libraries in the block into a ValueError in one line, as without a network."""
        try:
            yield
        except Exception as error:
            # The libraries raise errors of many types. Those of minilm name the source already.
            if isinstance(error, ValueError) and str(error).startswith(self.source):
                raise
            raise ValueError(f"data source {self.source}: {describe_loading_error(error, 'dataset')}") from error

    def read_column_names(self, columns: Sequence[Column]) -> list[str]:
        return list(self.rows.column_names or ())

    def read_class_names(self, column: Column) -> tuple[str, ...]:
        return columnar_files.find_class_names(self.rows.features, column)


def check_is_text(columns: Sequence[Column], source: str) -> None:
    """Raise ValueError for a column that plain text does not have. Its only column is `text`.

    `--data.column` may have another name, which is the name of the texts in the other sources of the run.
    """
    for column in columns:
        if column.role != "text" and column.name != "text":
            raise column.missing_error(source, ["text"])


def group_into_batches(rows: NumberedRows, where: Callable[[int], str], file: int = 0) -> Iterator[RowBatch]:
    """Yield the rows in batches of limited size, so that memory does not grow with the file."""
    places, cells, characters = list[int](), list[list[Any]](), 0
    for place, row in rows:
        places.append(place)
        cells.append(row)
        characters += sum(len(cell) for cell in row if isinstance(cell, str))
        if len(places) == columnar_files.BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield RowBatch(where, file, places, [list(column) for column in zip(*cells, strict=True)])
            places, cells, characters = [], [], 0
    if places:
        yield RowBatch(where, file, places, [list(column) for column in zip(*cells, strict=True)])
