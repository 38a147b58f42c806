"""Filters of `minilm tokenize`: they remove documents by their length, and copies of documents before them.

Whether a document is a copy depends on all documents, so the filters look at the whole source before the first token
is written. A survey writes for each source file the lengths and hashes of its documents. Then one process writes for
each file which documents stay. The first of several copies stays, in the order of the sources. A decision depends
only on the documents before, so it does not change when documents are added at the end.
"""

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from minilm.data.near_duplicates import BandHasher, choose_bands, find_near_copies
from minilm.data.shard_pieces import PieceJob
from minilm.data.shards import Shard, TextBatch
from minilm.utils.atomic_files import remove_path, write_atomically
from minilm.utils.file_lock import lock_file
from minilm.utils.validation import check

# The verdicts, and the words for the documents that have them.
KEPT, _EXACT, _NEAR, _TOO_SHORT, _TOO_LONG = range(5)
_WORDS = {_EXACT: "exact copies", _NEAR: "near-copies", _TOO_SHORT: "too short", _TOO_LONG: "too long"}
# The documents of a piece of the survey. It limits the memory, and the work that is lost in an interruption.
_PIECE_DOCUMENTS = 2**18


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which documents to remove."""

    min_characters: int = 0
    """Remove documents with fewer characters than this."""
    max_characters: int | None = None
    """Remove documents with more characters than this. None means no limit."""
    deduplicate: Literal["exact", "near"] | None = None
    """Remove copies of documents before them. exact: documents with the same text, by a hash of 64 bits. near: also
    near-copies (`minilm.data.near_duplicates`), which needs datasketch."""
    threshold: float = 0.75
    """The Jaccard similarity from which on documents are near-copies."""
    ngram_size: int = 5
    """The words of an n-gram, for near-copies."""
    num_perm: int = 112
    """The largest number of MinHash values of a document, for near-copies."""

    def __post_init__(self) -> None:
        check(
            self.max_characters is None or self.max_characters >= self.min_characters,
            f"--max-characters {self.max_characters} is less than --min-characters {self.min_characters}, so that no "
            "document stays",
        )
        check(0 < self.threshold < 1, f"--threshold must lie between 0 and 1, not {self.threshold}")
        if self.deduplicate == "near":
            installed = importlib.util.find_spec("datasketch") is not None
            check(installed, "--deduplicate near needs datasketch, which is not installed: pip install 'datasketch>=2'")

    @cached_property
    def hasher(self) -> BandHasher | None:
        """What hashes the bands of documents; None if near-copies stay."""
        if self.deduplicate != "near":
            return None
        bands, rows = choose_bands(self.threshold, self.num_perm)
        return BandHasher(bands=bands, rows=rows, ngram_size=self.ngram_size)

    def describe(self) -> dict[str, Any]:
        """Return what decides the verdicts, as JSON types."""
        lengths = {"min_characters": self.min_characters, "max_characters": self.max_characters}
        settings = {**lengths, "deduplicate": self.deduplicate}
        return {**settings, **self.hasher.describe()} if self.hasher else settings

    @property
    def verdicts(self) -> list[int]:
        """The verdicts that these filters can give, without `KEPT`."""
        given = {
            _EXACT: self.deduplicate is not None,
            _NEAR: self.deduplicate == "near",
            _TOO_SHORT: self.min_characters > 0,
            _TOO_LONG: self.max_characters is not None,
        }
        return [verdict for verdict, is_given in given.items() if is_given]

    def judge_lengths(self, texts: Sequence[str]) -> NDArray[np.uint8]:
        """Return the verdict on the length of each text, uint8."""
        sizes = np.fromiter(map(len, texts), np.int64, len(texts))
        verdicts = np.where(sizes < self.min_characters, _TOO_SHORT, KEPT)
        if self.max_characters is not None:
            verdicts[sizes > self.max_characters] = _TOO_LONG
        return verdicts.astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class FilterJob:
    """The filters of a folder of tokens."""

    folder: Path
    shards: Sequence[Shard]
    filters: Filters

    def run(self) -> None:
        """Write the verdicts on all documents, with all processes that do the same. Do nothing if they are there.

        Raises ValueError if no document stays.
        """
        if self._is_decided():
            return
        # First the files that no process has, then those whose process may have been killed.
        self._survey.run()
        self._survey.run(wait=True)
        with lock_file(self.folder / ".filter.lock", wait=True):
            if not self._is_decided():
                self._decide()

    def read(self, number: int) -> NDArray[np.uint8]:
        """Return the verdict on each document of a source file, uint8."""
        verdicts: NDArray[np.uint8] = np.load(self._path(number))
        return verdicts

    def count(self) -> dict[str, int]:
        """Return how many documents there were, and how many each filter has removed."""
        counts = np.zeros(256, np.int64)
        for number in range(len(self.shards)):
            counts += np.bincount(self.read(number), minlength=256)
        removed = {_WORDS[verdict]: int(counts[verdict]) for verdict in self.filters.verdicts}
        return {"documents": int(counts.sum()), **removed}

    def remove_survey(self) -> None:
        """Remove what is needed no more when all files have been tokenised."""
        for path in self.folder.glob(f"{self._survey.kind}-*"):
            remove_path(path)

    @property
    def _survey(self) -> PieceJob:
        return PieceJob(
            folder=self.folder,
            shards=self.shards,
            kind="survey",
            unit="documents",
            piece_size=_PIECE_DOCUMENTS,
            begin=lambda number, pieces: _Survey(self.filters),
        )

    def _path(self, number: int) -> Path:
        return self.folder / f"filter-{number:05}.npy"

    def _is_decided(self) -> bool:
        return all(self._path(number).exists() for number in range(len(self.shards)))

    def _decide(self) -> None:
        """Write the verdicts from the pieces of the survey."""
        pieces = [[self.folder / piece["name"] for piece in self._survey.read(n)] for n in range(len(self.shards))]
        folders = [folder for file in pieces for folder in file]
        verdicts_N = np.concatenate([np.load(folder / "lengths.npy") for folder in folders])
        if self.filters.deduplicate:
            left_L = np.flatnonzero(verdicts_N == KEPT)
            hashes_N = np.concatenate([np.load(folder / "hashes.npy") for folder in folders])
            verdicts_N[left_L[find_exact_copies(hashes_N[left_L])]] = _EXACT
        if self.filters.hasher:
            left_L = np.flatnonzero(verdicts_N == KEPT)
            files = [np.load(folder / "bands.npy", mmap_mode="r") for folder in folders]
            bands = (
                np.concatenate([file[band] for file in files])[left_L] for band in range(self.filters.hasher.bands)
            )
            verdicts_N[left_L[find_near_copies(bands)]] = _NEAR
        if len(verdicts_N) and not (verdicts_N == KEPT).any():
            raise ValueError(
                f"{self.folder}: the filters remove all {len(verdicts_N):,} documents; change --min-characters or "
                "--max-characters"
            )
        at = 0
        for number, file in enumerate(pieces):
            count = sum(len(np.load(folder / "lengths.npy", mmap_mode="r")) for folder in file)
            content = io.BytesIO()
            np.save(content, verdicts_N[at : at + count])
            write_atomically(self._path(number), content.getvalue())
            at += count


def format_removed(counts: dict[str, int]) -> str:
    """Return in a line what `FilterJob.count` has counted."""
    documents, *removed = counts.values()
    parts = [f"{count:,} {words}" for words, count in counts.items() if words != "documents"]
    return f"removed {sum(removed):,} of {documents:,} documents: {', '.join(parts)}"


def find_exact_copies(hashes_N: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return for each document whether one before it has the same hash, bool[N]."""
    _, first = np.unique(hashes_N, return_index=True)
    is_copy_N = np.ones(len(hashes_N), np.bool_)
    is_copy_N[first] = False
    return is_copy_N


class _Survey:
    """What the filters must know of the documents of a file (a `minilm.data.shard_pieces.PieceBuilder`)."""

    def __init__(self, filters: Filters) -> None:
        self._filters = filters
        self._begin_piece()

    def _begin_piece(self) -> None:
        self._lengths, self._hashes = [np.zeros(0, np.uint8)], [np.zeros(0, np.uint64)]
        self._bands = list[NDArray[np.uint64]]()
        self.size = 0

    def add(self, batch: TextBatch) -> None:
        self._lengths.append(self._filters.judge_lengths(batch.texts))
        self._hashes.append(batch.hashes())
        if self._filters.hasher:
            self._bands.append(self._filters.hasher.hash(batch.texts))
        self.size += len(batch.texts)

    def write(self, folder: Path) -> dict[str, Any]:
        np.save(folder / "lengths.npy", np.concatenate(self._lengths))
        np.save(folder / "hashes.npy", np.concatenate(self._hashes))
        if self._filters.hasher:
            empty_Bx0 = self._filters.hasher.hash([])
            np.save(folder / "bands.npy", np.concatenate([empty_Bx0, *self._bands], axis=1))
        self._begin_piece()
        return {}
