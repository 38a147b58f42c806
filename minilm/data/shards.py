"""Shards: the parts of sources that a stream reads in a random order, and from any place on.

A shard is a file, also one of a dataset on the hub, or a whole saved dataset. A place in it says where a document
begins (`minilm.data.tables.Place`).
"""

import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from minilm.config import Data
from minilm.data.columns import Column
from minilm.data.held_out import hash_texts
from minilm.data.rows import PLACE, read_batches
from minilm.data.sources import build_columns, open_table, quiet_datasets
from minilm.data.stream_pieces import Piece
from minilm.data.tables import DatasetTable, FileTable, Place, RowBatch
from minilm.data.text_encoder import EncodedTexts, TextEncoder
from minilm.data.token_shards import TokenFolder, is_tokenized
from minilm.utils.local_files import find_local_files, is_local_path

START: Place = (0, 0)
"""The beginning of a shard."""


class DocumentBatch(Protocol):
    """Consecutive documents of a shard."""

    @property
    def places(self) -> Sequence[Place]:
        """Where each document begins."""

    @property
    def piece(self) -> int:
        """The number of the documents' piece in `Shard.pieces`."""

    def hashes(self) -> NDArray[np.uint64]:
        """Return the hash of each text (`minilm.data.held_out.hash_texts`)."""

    def select(self, chosen: NDArray[np.bool_]) -> "DocumentBatch":
        """Return the documents for which `chosen` is True."""

    def encode(self, encoder: TextEncoder) -> EncodedTexts:
        """Return the ids of the documents."""


class Shard(Protocol):
    """Documents in a fixed order. Documents without a visible character are left out."""

    @property
    def stamp(self) -> Any:
        """Tells whether the documents have changed since the shard was opened. JSON types."""

    @property
    def pieces(self) -> Sequence[Piece]:
        """The pieces of the shard, in their order."""

    def read(self, start: Place) -> Iterator[DocumentBatch]:
        """Yield the documents from a place on, in batches that are not empty."""


@dataclass(frozen=True)
class TextBatch:
    """Documents as texts (a `DocumentBatch`)."""

    places: Sequence[Place]
    texts: Sequence[str]
    piece = 0

    def hashes(self) -> NDArray[np.uint64]:
        return hash_texts(self.texts)

    def select(self, chosen: NDArray[np.bool_]) -> "TextBatch":
        kept = np.flatnonzero(chosen).tolist()
        return TextBatch([self.places[i] for i in kept], [self.texts[i] for i in kept])

    def encode(self, encoder: TextEncoder) -> EncodedTexts:
        return encoder.encode(self.texts)


@dataclass(frozen=True)
class TextShard:
    """The texts of one file, or of a saved dataset (a `Shard`)."""

    table: FileTable | DatasetTable
    number: int
    """The number of the file in the table, or of the part of a dataset."""
    column: Column
    stamp: tuple[int, int] | None
    """The size and the time of change of the file when the run began; None for a dataset."""
    pieces = (Piece("", present=True),)

    def read(self, start: Place) -> Iterator[TextBatch]:
        self._check_unchanged()
        with quiet_datasets():
            rows, lines = self.table.iter_rest(self.number, [self.column], start)
            for batch in read_batches(_Rest(self.table, rows), [self.column]):
                places = lines.pop(batch[PLACE])
                # Other documents may begin before `start` in its line.
                first = bisect_left(places, start)
                if first < len(places):
                    yield TextBatch(places[first:], batch["text"][first:])
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        """Raise ValueError if the file is not the one with which the run began."""
        if isinstance(self.table, FileTable):
            path = self.table.files[self.number]
            if _stamp(path) != self.stamp:
                raise ValueError(f"{path}: the file changed during the run; put the old file back and resume")


class _Rest:
    """The rows of a shard from a place on (a `minilm.data.tables.Table` that can be read once)."""

    def __init__(self, table: FileTable | DatasetTable, rows: Iterator[RowBatch]) -> None:
        self._table, self._rows, self.identity = table, rows, table.identity

    def is_typed(self, column: Column) -> bool:
        return self._table.is_typed(column)

    def iter_batches(self, columns: Sequence[Column]) -> Iterator[RowBatch]:
        return self._rows

    def locate(self, file: int, place: int) -> str:
        return self._table.locate(file, place)

    def read_column_names(self, columns: Sequence[Column]) -> list[str]:
        return self._table.read_column_names(columns)

    def read_class_names(self, column: Column) -> tuple[str, ...]:
        return ()


def _stamp(path: str) -> tuple[int, int] | None:
    """Return the size and the time of change of a file, or None if it is gone."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns


@dataclass(frozen=True)
class Pool:
    """The shards of a stream that are read together."""

    shards: Sequence[Shard]
    share: float
    """The share of each window's tokens that comes from the pool."""


def open_pools(data: Data, revisions: Mapping[str, str], *, weighted: bool) -> tuple[Pool, ...] | None:
    """Return the pools of the training documents, or None for documents that can only be read in their order.

    revisions: the commit of each source that is a dataset on the hub.
    weighted: whether each source is a pool with the share that `data.weights` gives it. Otherwise there is one pool.
    """
    shards = [open_shards(data, source, revisions.get(source)) for source in data.sources]
    if not all(shards):
        return None
    if not weighted:
        return (Pool([shard for part in shards for shard in part], 1.0),)
    total = sum(data.weights)
    return tuple(Pool(part, weight / total) for part, weight in zip(shards, data.weights, strict=True))


def open_shards(data: Data, source: str, revision: str | None = None) -> Sequence[Shard]:
    """Return the shards of `data.split` of a source; empty for a part of files or of a dataset on the hub.

    revision: the commit of a dataset on the hub.
    """
    if is_tokenized(source):
        return TokenFolder.open(source).shards
    files = find_local_files(source)
    is_remote = not files and not is_local_path(source)
    if "[" in data.split and (files or is_remote):
        return ()
    (column,) = build_columns(data)[:1]
    with quiet_datasets():
        table, _ = open_table(data, source, data.split, [column], streaming=True, revision=revision)
    if isinstance(table, FileTable):
        return [TextShard(table, number, column, _stamp(file)) for number, file in enumerate(table.files)]
    assert isinstance(table, DatasetTable)
    return [TextShard(table, number, column, None) for number in range(table.part_count)]
