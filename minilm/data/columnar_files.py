"""Columnar files, `.parquet` and `.arrow`. Only the columns that a run needs are read."""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow
from datasets import ClassLabel, Features, LargeList, List
from pyarrow import parquet

from minilm.data.columns import Column
from minilm.utils.local_files import PERMISSION_DENIED, get_file_kind, is_gzip
from minilm.utils.unpacking import unpack

# Number of rows that are converted to Python objects at a time.
BATCH_ROWS = 1000


def read_columnar(path: str, columns: Sequence[Column], start: int = 0) -> Iterator[tuple[int, list[Any]]]:
    """Yield the number of each row, counted from 0, and its cells of `columns`. Other columns are not read.

    start: the first row to yield. Groups of rows before it are not read.

    Raise ValueError that names the file, the row group if one is damaged, and the row of a text that is not UTF-8.
    """
    with _damage_as_error(path), _open(path) as table:
        outer = find_outer_columns(columns, table.schema, path)
        batches = table.batches(list(dict.fromkeys(outer)), start)
        yield from read_cells(batches, columns, outer, lambda row: f"{path}, row {row}", start)


def read_cells(
    batches: Iterable[Any],
    columns: Sequence[Column],
    outer: Sequence[str],
    locate: Callable[[int], str],
    start: int = 0,
) -> Iterator[tuple[int, list[Any]]]:
    """Yield the number of each row and its cells of `columns`.

    batches: record batches of Arrow.
    outer: for each of `columns`, the name of the column of the batches that is or contains it.
    locate: returns the beginning of an error message about the row of a number.
    start: the number of the first row.
    """
    for batch in batches:
        lists = [_to_python(batch.column(batch.schema.get_field_index(name)), locate, start) for name in outer]
        for row, cells in enumerate(zip(*lists, strict=True), start=start):
            named = zip(columns, outer, cells, strict=True)
            yield (
                row,
                [
                    cell if name == column.name else column.get_cell({name: cell}, locate(row))
                    for column, name, cell in named
                ],
            )
        start += batch.num_rows


def read_columnar_field_names(path: str) -> list[str]:
    """Return the names of a file's columns."""
    with _damage_as_error(path), _open(path) as table:
        return [*table.schema.names]


def read_class_names(path: str, column: Column) -> tuple[str, ...]:
    """Return the names of a column's classes if the datasets library stored them in the file, or else nothing."""
    with _damage_as_error(path), _open(path) as table:
        try:
            features = Features.from_arrow_schema(table.schema)
        except Exception:
            # Other programs may write anything there.
            return ()
    return find_class_names(features, column)


def find_class_names(features: Features, column: Column) -> tuple[str, ...]:
    """Return the names of the classes in a column of ClassLabels or of lists of them; empty for other columns."""
    outer = column.find_outer(features)
    if outer is None:
        return ()
    feature, rest = features[outer], column.name[len(outer) + 1 :].split(".")
    for key in rest if rest != [""] else []:
        while isinstance(feature, List | LargeList):
            feature = feature.feature
        feature = feature.get(key) if isinstance(feature, dict) else None
    while isinstance(feature, List | LargeList):
        feature = feature.feature
    return tuple(feature.names) if isinstance(feature, ClassLabel) else ()


def find_outer_columns(columns: Sequence[Column], schema: Any, source: str) -> list[str]:
    """Return for each column the name of the column of the schema that is or contains it.

    Raise ValueError for a missing column, a name that several columns have, or a type that is not text.
    """
    outer = []
    for column in columns:
        name = column.find_outer(schema.names)
        if name is None:
            raise column.missing_error(source, schema.names)
        if schema.names.count(name) > 1:
            raise ValueError(f"{source}: {schema.names.count(name)} columns have the name {name!r}; rename all but one")
        kind = schema.field(name).type
        if column.kind == "text" and name == column.name and not _can_be_text(kind):
            raise column.not_text_error(source, f"the type {kind}")
        outer.append(name)
    return outer


def _can_be_text(kind: Any) -> bool:
    """Return False for types that are certainly not text. The check of each row finds the rest."""
    types = pyarrow.types
    return not (
        types.is_temporal(kind) or types.is_decimal(kind) or types.is_binary(kind) or types.is_large_binary(kind)
    )


def _to_python(column: Any, locate: Callable[[int], str], start: int) -> list[Any]:
    """Return the values of a batch that begins at row `start`. Values of the type arrow.json are parsed.

    Raise ValueError that names a row that is not UTF-8.
    """
    decode = _find_decoder(column.type)
    try:
        return list(map(decode, column.to_pylist()) if decode else column.to_pylist())
    except UnicodeDecodeError as error:
        for row, cell in enumerate(column, start=start):
            try:
                cell.as_py()
            except UnicodeDecodeError:
                raise ValueError(f"{locate(row)}: the text is not UTF-8; write the file again") from error
        raise


@dataclass(frozen=True)
class ArrowMap:
    """A value of Arrow's type map. It is not an object of JSON, because a key can be of any type and occur twice."""

    pairs: list[tuple[Any, Any]]


def _find_decoder(kind: Any) -> Callable[[Any], Any] | None:
    """Return the function that makes the Python value of what pyarrow returns; None if the two are equal.

    The datasets library stores values of several types in one column as the type arrow.json, which is JSON text.
    """
    if isinstance(kind, pyarrow.JsonType):
        return lambda text: None if text is None else json.loads(text)
    if pyarrow.types.is_map(kind):
        return lambda pairs: None if pairs is None else ArrowMap(pairs)
    if pyarrow.types.is_struct(kind):
        fields = {field.name: decode for field in kind if (decode := _find_decoder(field.type))}
        if fields:
            return lambda row: row and row | {name: decode(row[name]) for name, decode in fields.items()}
    # All types of lists.
    elif (item := getattr(kind, "value_type", None)) and (decode := _find_decoder(item)):
        return lambda items: None if items is None else [decode(item) for item in items]
    return None


class _Parquet:
    """A Parquet file."""

    def __init__(self, file: Any) -> None:
        self.file = parquet.ParquetFile(file)
        self.schema = self.file.schema_arrow

    def batches(self, names: list[str], start: int = 0) -> Iterator[Any]:
        """Yield the rows from row `start` on."""
        metadata, group = self.file.metadata, 0
        while group < self.file.num_row_groups and start >= metadata.row_group(group).num_rows:
            start, group = start - metadata.row_group(group).num_rows, group + 1
        groups = [*range(group, self.file.num_row_groups)]
        if groups:
            yield from _skip_rows(
                self.file.iter_batches(batch_size=BATCH_ROWS, columns=names, row_groups=groups), start
            )


class _Arrow:
    """A file in the IPC format of Arrow: the stream format or the file format."""

    def __init__(self, file: Any) -> None:
        self.file = file
        try:
            self.schema = pyarrow.ipc.open_stream(file).schema
            self.stream = True
        except pyarrow.ArrowInvalid:
            self.schema = pyarrow.ipc.open_file(file).schema
            self.stream = False

    def batches(self, names: list[str], start: int = 0) -> Iterator[Any]:
        """Yield the rows from row `start` on."""
        fields = [self.schema.get_field_index(name) for name in names]
        options = pyarrow.ipc.IpcReadOptions(included_fields=fields)
        self.file.seek(0)
        if self.stream:
            parts: Iterator[Any] = iter(pyarrow.ipc.open_stream(self.file, options=options))
        else:
            reader = pyarrow.ipc.open_file(self.file, options=options)
            parts = (reader.get_batch(number) for number in range(reader.num_record_batches))
        for part in _skip_rows(parts, start):
            for first in range(0, len(part), BATCH_ROWS):
                yield part.slice(first, BATCH_ROWS)


def _skip_rows(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """Yield the record batches without their first `count` rows."""
    for batch in batches:
        if count < len(batch):
            yield batch.slice(count)
        count = max(0, count - len(batch))


@contextmanager
def _open(path: str) -> Iterator[_Parquet | _Arrow]:
    """Open a file. If its name ends in .gz, unpack it into a temporary file first."""
    kind = _Parquet if get_file_kind(path) == "parquet" else _Arrow
    if not is_gzip(path):
        with pyarrow.memory_map(path) if kind is _Arrow else open(path, "rb") as file:
            yield kind(file)
        return
    with gzip.open(path) as packed, unpack(packed, path) as unpacked:
        yield kind(pyarrow.PythonFile(unpacked, "r"))


@contextmanager
def _damage_as_error(path: str) -> Iterator[None]:
    """Turn an error of pyarrow into a ValueError that names the file, and the damaged row group if there is one."""
    try:
        yield
    except PermissionError as error:
        raise ValueError(f"{path}: {PERMISSION_DENIED}") from error
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{path}: {describe_damage(path) or 'cannot be read'} ({why})") from error


def describe_damage(path: str) -> str:
    """Return what is wrong with a file, with the number of a damaged row group; empty if the file can be read."""
    group, count = None, 0
    try:
        with _open(path) as table:
            if isinstance(table, _Arrow):
                for _ in table.batches(table.schema.names):
                    pass
            else:
                count = table.file.num_row_groups
                for group in range(count):
                    table.file.read_row_group(group)
                group = None
    except PermissionError:
        return PERMISSION_DENIED
    except (OSError, EOFError, ValueError, pyarrow.ArrowException):
        kind = "Parquet" if get_file_kind(path) == "parquet" else "Arrow"
        return f"not {kind}, or cut off" if group is None else f"row group {group} of {count} is damaged"
    return ""
