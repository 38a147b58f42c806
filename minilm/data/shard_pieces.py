"""Read shards and write a result for each of them in pieces, which are folders that are complete or not there.

Any number of processes may write into one folder, also from several hosts that share it. Each process takes a shard
that no other has locked, and continues it after the last piece that is complete.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from minilm.data.shards import START, Shard, TextBatch
from minilm.utils.atomic_files import remove_path, replace_folder
from minilm.utils.file_lock import lock_file

log = logging.getLogger("minilm")

_FACTS = "piece.json"


class PieceBuilder(Protocol):
    """Gathers the documents of a shard in memory until there are enough for a piece."""

    @property
    def size(self) -> int:
        """How much was added since the last piece, in `PieceJob.unit`."""

    def add(self, batch: TextBatch) -> None:
        """Add the next documents of the shard."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Write a piece into an empty folder, and return facts about it, as JSON types."""


@dataclass(frozen=True, kw_only=True)
class PieceJob:
    """What to write for each shard."""

    folder: Path
    """Where the pieces are."""
    shards: Sequence[Shard]
    kind: str
    """The beginning of the names of the pieces."""
    unit: str
    """What the size of a piece counts, in words."""
    piece_size: int
    """A piece ends with the batch of documents that gives it this size."""
    begin: Callable[[int, Sequence[dict[str, Any]]], PieceBuilder]
    """Returns the builder for the shard of a number. It gets the facts of the pieces that are complete."""

    def run(self, *, wait: bool = False) -> None:
        """Write each shard that no process has finished or locked. wait: also wait for those that are locked."""
        for number, shard in enumerate(self.shards):
            with lock_file(self.folder / f".file-{number:05}.lock", wait=wait) as lock:
                if lock is None:
                    continue
                pieces = self.read(number)
                if not pieces or pieces[-1]["next"] is not None:
                    for leftover in self.folder.glob(f".{self.kind}-{number:05}-*"):
                        remove_path(leftover)
                    self._write(number, shard, pieces)

    def read(self, number: int) -> list[dict[str, Any]]:
        """Return the facts of the complete pieces of a shard, in their order."""
        pieces = list[dict[str, Any]]()
        while (path := self.folder / self._name(number, len(pieces)) / _FACTS).exists():
            pieces.append(json.loads(path.read_bytes()))
        return pieces

    def _name(self, number: int, piece: int) -> str:
        return f"{self.kind}-{number:05}-{piece:05}"

    def _write(self, number: int, shard: Shard, pieces: list[dict[str, Any]]) -> None:
        """Write the pieces of a shard that follow `pieces`."""
        builder, begun, total = self.begin(number, pieces), time.perf_counter(), 0
        start = (pieces[-1]["next"][0], pieces[-1]["next"][1]) if pieces else START
        for batch in shard.read(start):
            assert isinstance(batch, TextBatch)
            if builder.size >= self.piece_size:
                total += builder.size
                rate = total / (time.perf_counter() - begun)
                pieces.append(self._write_piece(builder, self._name(number, len(pieces)), list(batch.places[0])))
                log.info(f"file {number + 1} of {len(self.shards)}: {total:,} {self.unit}, {rate:,.0f} {self.unit}/s")
            builder.add(batch)
        self._write_piece(builder, self._name(number, len(pieces)), None)

    def _write_piece(self, builder: PieceBuilder, name: str, following: list[int] | None) -> dict[str, Any]:
        """Write a piece, and return its facts. following: the place of the next piece, or None after the last."""
        with replace_folder(self.folder / name) as folder:
            facts = {"name": name, **builder.write(folder), "next": following}
            (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
        return facts
