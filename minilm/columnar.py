"""Files of columns, `.parquet` and `.arrow`: only the columns that are asked for are read."""

import gzip
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow
from datasets import ClassLabel, Features, LargeList, List
from pyarrow import parquet

from minilm.columns import Column
from minilm.files import DENIED, file_kind

BATCH_ROWS = 1000  # that are made into Python's objects at a time


def read_columnar(path: str, columns: Sequence[Column]) -> Iterator[tuple[int, list[Any]]]:
    """The number of each row, from 0, and its cells of `columns`; those of other columns are not read.

    Raises ValueError that names the file, for a damaged one the row group, and for a text that is not UTF-8 the row.
    """
    with _naming_damage(path), _table(path) as table:
        heads = heads_of(columns, table.schema, path)
        yield from cells_of(table.batches(list(dict.fromkeys(heads))), columns, heads, path)


def cells_of(
    batches: Iterable[Any], columns: Sequence[Column], heads: Sequence[str], source: str
) -> Iterator[tuple[int, list[Any]]]:
    """The number of each row and its cells of `columns`, which lie in the columns `heads` of Arrow's batches."""
    start = 0
    for batch in batches:
        lists = [_values(batch.column(batch.schema.get_field_index(head)), source, start) for head in heads]
        for row, cells in enumerate(zip(*lists, strict=True), start=start):
            named = zip(columns, heads, cells, strict=True)
            yield (
                row,
                [
                    cell if head == column.name else column.find({head: cell}, f"{source}, row {row}")
                    for column, head, cell in named
                ],
            )
        start += batch.num_rows


def read_columnar_names(path: str) -> list[str]:
    """The names of a file's columns."""
    with _naming_damage(path), _table(path) as table:
        return [*table.schema.names]


def class_names(path: str, column: Column) -> tuple[str, ...]:
    """The names by which the datasets library explains the numbers in a column; none where it has stored none."""
    with _naming_damage(path), _table(path) as table:
        try:
            features = Features.from_arrow_schema(table.schema)
        except Exception:  # whatever other programs write there
            return ()
    return names_of_classes(features, column)


def names_of_classes(features: Features, column: Column) -> tuple[str, ...]:
    """The names of the classes in a column of labels, or in the lists of it; none where they are not ClassLabels."""
    head = next((head for head in column.heads() if head in features), None)
    if head is None:
        return ()
    feature, rest = features[head], column.name[len(head) + 1 :].split(".")
    for key in rest if rest != [""] else []:
        while isinstance(feature, List | LargeList):
            feature = feature.feature
        feature = feature.get(key) if isinstance(feature, dict) else None
    while isinstance(feature, List | LargeList):
        feature = feature.feature
    return tuple(feature.names) if isinstance(feature, ClassLabel) else ()


def heads_of(columns: Sequence[Column], schema: Any, source: str) -> list[str]:
    """For each column that is asked for the one of the file that it is or lies in."""
    heads = []
    for column in columns:
        head = next((head for head in column.heads() if head in schema.names), None)
        if head is None:
            raise column.missing(source, schema.names)
        if schema.names.count(head) > 1:
            raise ValueError(f"{source}: {schema.names.count(head)} columns have the name {head!r}; rename all but one")
        kind = schema.field(head).type
        if column.role != "label" and head == column.name and not _can_be_text(kind):
            raise column.not_text(source, f"the type {kind}")
        heads.append(head)
    return heads


def _can_be_text(kind: Any) -> bool:
    """Whether a column of this type can hold texts, or else what a check of its rows names better."""
    types = pyarrow.types
    return not (
        types.is_temporal(kind) or types.is_decimal(kind) or types.is_binary(kind) or types.is_large_binary(kind)
    )


def _values(column: Any, source: str, start: int) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError as error:
        for row, cell in enumerate(column, start=start):
            try:
                cell.as_py()
            except UnicodeDecodeError:
                raise ValueError(f"{source}, row {row}: not UTF-8; write the file again from texts") from error
        raise


class _Parquet:
    def __init__(self, file: Any) -> None:
        self.file = parquet.ParquetFile(file)
        self.schema = self.file.schema_arrow

    def batches(self, names: list[str]) -> Iterator[Any]:
        yield from self.file.iter_batches(batch_size=BATCH_ROWS, columns=names)


class _Arrow:
    """A stream or a file of Arrow's own format."""

    def __init__(self, file: Any) -> None:
        self.file = file
        try:
            self.schema = pyarrow.ipc.open_stream(file).schema
            self.stream = True
        except pyarrow.ArrowInvalid:
            self.schema = pyarrow.ipc.open_file(file).schema
            self.stream = False

    def batches(self, names: list[str]) -> Iterator[Any]:
        fields = [self.schema.get_field_index(name) for name in names]
        options = pyarrow.ipc.IpcReadOptions(included_fields=fields)
        self.file.seek(0)
        if self.stream:
            parts: Iterator[Any] = iter(pyarrow.ipc.open_stream(self.file, options=options))
        else:
            reader = pyarrow.ipc.open_file(self.file, options=options)
            parts = (reader.get_batch(number) for number in range(reader.num_record_batches))
        for part in parts:
            for start in range(0, len(part), BATCH_ROWS):
                yield part.slice(start, BATCH_ROWS)


@contextmanager
def _table(path: str) -> Iterator[_Parquet | _Arrow]:
    kind = _Parquet if file_kind(path) == "parquet" else _Arrow
    if not path.endswith(".gz"):
        with pyarrow.memory_map(path) if kind is _Arrow else open(path, "rb") as file:
            yield kind(file)
        return
    with tempfile.TemporaryFile() as unpacked:
        with gzip.open(path) as packed:
            shutil.copyfileobj(packed, unpacked)
        unpacked.seek(0)
        yield kind(pyarrow.PythonFile(unpacked, "r"))


@contextmanager
def _naming_damage(path: str) -> Iterator[None]:
    """Make of what pyarrow raises about a file a ValueError that names it, and the row group where that is known."""
    try:
        yield
    except PermissionError as error:
        raise ValueError(f"{path}: {DENIED}") from error
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{path}: {where_damaged(path) or 'cannot be read'} ({why})") from error


def where_damaged(path: str) -> str:
    """What is wrong with a file that cannot be read: the row group, where that can be told; nothing where it can."""
    group, count = None, 0
    try:
        with _table(path) as table:
            if isinstance(table, _Arrow):
                for _ in table.batches(table.schema.names):
                    pass
            else:
                count = table.file.num_row_groups
                for group in range(count):
                    table.file.read_row_group(group)
                group = None
    except PermissionError:
        return DENIED
    except (OSError, EOFError, ValueError, pyarrow.ArrowException):
        kind = "Parquet" if file_kind(path) == "parquet" else "Arrow"
        return f"no {kind}, or cut off" if group is None else f"row group {group} of {count} is damaged"
    return ""
