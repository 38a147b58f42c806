"""Pieces: the parts of a stream's shards, of which a host may have some and lack others.

A piece of tokenised shards has large files of tokens beside small ones, which say how long each document is. A host
that lacks the files of tokens knows all lengths, and so all windows, examples and steps, but it cannot read these
documents. A file of text is one piece, which each host has.

Axes: P processes, N pieces of a stream, I ids of its examples, K runs of ids from one piece, E examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minilm.data.array_file import ArrayFile

if TYPE_CHECKING:
    from minilm.data.corpus import Examples


class Piece(NamedTuple):
    """A piece, as this process sees it."""

    path: str
    """A file of the piece: one that this host lacks, if it lacks any."""
    present: bool
    """Whether this host has all files of the piece."""


@dataclass(frozen=True, kw_only=True)
class PieceRuns:
    """From which pieces ids come. Each run has at least one id."""

    pieces: Sequence[Piece]
    """All pieces of the stream, N."""
    stop_K: NDArray[np.int64]
    """int64[K], where each run ends in the ids."""
    piece_K: NDArray[np.int64]
    """int64[K], the number of each run's piece."""

    @property
    def starts(self) -> NDArray[np.int64]:
        """int64[K], where each run begins in the ids."""
        return np.concatenate([np.zeros(1, np.int64), self.stop_K[:-1]])

    @property
    def present(self) -> NDArray[np.bool_]:
        """bool[N], whether this host has each piece."""
        return np.array([piece.present for piece in self.pieces], np.bool_)

    def find_runs(self, starts: Any, stops: Any) -> tuple[Any, Any]:
        """Return the first and the last run of the ids from `starts` to `stops`. There must be an id."""
        return np.searchsorted(self.stop_K, starts, side="right"), np.searchsorted(self.stop_K, stops - 1, side="right")


class PresentIds:
    """The ids of a window of which this host lacks pieces (a `minilm.data.array_file.ArrayFile`).

    Raises ValueError where an id of such a piece is read.
    """

    def __init__(self, file: ArrayFile, runs: PieceRuns) -> None:
        self._file, self._runs = file, runs
        self._present_K = runs.present[runs.piece_K]
        self.dtype = file.dtype

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, part: slice) -> NDArray[Any]:
        start, stop, _ = part.indices(len(self))
        if start < stop:
            first, last = self._runs.find_runs(start, stop)
            absent = np.flatnonzero(~self._present_K[first : last + 1])
            if len(absent):
                piece = self._runs.pieces[int(self._runs.piece_K[first + absent[0]])]
                raise ValueError(f"{piece.path}: this host does not have it, and needs it here: copy it to this host")
        return self._file[part]


def find_readers(examples: "Examples", holders_PxN: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which process can read which of the examples, bool[P, E]: those that have all pieces of an example.

    holders_PxN: which process has which piece.
    """
    runs = examples.pieces
    assert runs is not None
    at_E, last_E = runs.find_runs(examples.start, examples.stop)
    readers_PxE: NDArray[np.bool_] = holders_PxN[:, runs.piece_K[at_E]]
    while (at_E < last_E).any():
        at_E = np.minimum(at_E + 1, last_E)
        readers_PxE &= holders_PxN[:, runs.piece_K[at_E]]
    return readers_PxE


def split_present(examples: "Examples") -> "list[Examples]":
    """Return the examples that this host can read, in parts of consecutive examples."""
    if examples.pieces is None or examples.pieces.present.all():
        return [examples]
    (present_E,) = find_readers(examples, examples.pieces.present[None])
    numbers = np.flatnonzero(present_E)
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return [replace(examples, start=examples.start[part], stop=examples.stop[part]) for part in parts if len(part)]
