"""Windows: the parts into which a stream of documents is cut, so that a run can train on one while it reads the next.

A window holds consecutive documents of the stream, at least `StreamWindows.tokens` tokens of them unless the stream
ends before. Each pass over the stream takes its shards in another order, which depends only on the seed. A window is a
pure function of the stream, the seed and its number. Where each window begins is known once the one before it has been
encoded. An index keeps these places (`minilm.data.window_index`), so that a resumed run opens its window at once.

The files of a window are an entry of the cache, in the form of a corpus (`minilm.data.corpus`). If this host lacks
pieces (`minilm.data.stream_pieces`), zeros take the place of their ids, and no process of the host reads them.

A window is encoded by the process that needs it first, or ahead of time by a process of its own
(`minilm.data.window_encoder`). Of all processes that share a cache, one holds the lock of the stream and encodes. The
others wait for it, and encode the window themselves if it was killed.
"""

import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from minilm.config import Data
from minilm.data.array_file import ArrayFile, create_array_file
from minilm.data.batch_plan import Plan
from minilm.data.corpus import ExampleForm, Examples, open_examples
from minilm.data.held_out import is_held_out
from minilm.data.shards import START, DocumentBatch, Pool
from minilm.data.special_token_counter import read_special_tokens
from minilm.data.stream_pieces import Piece, PieceRuns, PresentIds
from minilm.data.text_encoder import EncodedTexts, TextEncoder
from minilm.data.token_shards import describe_backend
from minilm.data.window_index import PoolPlace, WindowIndex, WindowStart
from minilm.utils.atomic_files import remove_path
from minilm.utils.cache import explain_cache_errors, find_entry, get_cache_folder, open_entry
from minilm.utils.file_lock import lock_file

log = logging.getLogger("minilm")

# The version of the windows in the cache. Increase it when a change to the code changes a window of the same stream.
_VERSION = 4
# The windows that stay in the cache: the one before the current one, since loader workers may still read it, the
# current one, and the next one.
_KEPT_WINDOWS = 3
# The tokens of the sample that stands for the stream where a run checks its documents before the first step.
_SAMPLE_TOKENS = 2**20
# The third number of the seeds of the orders of shards. It keeps them apart from the seeds of the orders of examples.
_SHARD_ORDER = 2**33


class EncodingCancelledError(Exception):
    """The run for which a window was encoded ahead of time is gone."""


@dataclass(frozen=True, kw_only=True)
class StreamWindows:
    """A stream of documents in windows."""

    data: Data
    """Names the documents, which are the training documents of `minilm.data.streaming.stream_documents`."""
    revisions: Mapping[str, str]
    """The commit of each source that is a dataset on the hub."""
    pools: tuple[Pool, ...]
    """The documents, as `minilm.data.shards.open_pools` returns them."""
    identity: str
    """Differs between streams with different documents, and between orders of their shards."""
    tokenizer: PreTrainedTokenizerBase
    form: ExampleForm
    words: bool
    """Whether the examples know where words begin."""
    tokens: int
    """The tokens of a window, of which each pool has its share."""
    seed: int
    """Decides the order of the shards."""
    held_out: float
    """The share of the documents that is held out for evaluation, and so is not in a window."""
    examples: int
    """The number of examples in a step, or of rows."""
    row_tokens: int | None
    """As in `minilm.data.batch_plan.Plan`."""
    _starts: list[WindowStart] = field(default_factory=list, compare=False, repr=False)
    """The part of the index that this process has read."""

    @cached_property
    def key(self) -> str:
        """A hash of everything that decides the windows."""
        form = [self.form.around, self.form.room, self.form.layout, self.form.overflow]
        settings = [self.tokens, self.seed, self.held_out, self.examples, self.row_tokens, self.words]
        pools = [[pool.share, len(pool.shards)] for pool in self.pools]
        content = [_VERSION, self.identity, describe_backend(self.tokenizer), form, settings, pools]
        text = json.dumps(content).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(text, digest_size=12).hexdigest()

    @cached_property
    def pieces(self) -> list[Piece]:
        """All pieces, in the order of the sources."""
        return [piece for pool in self.pools for shard in pool.shards for piece in shard.pieces]

    @property
    def first_pieces(self) -> list[int]:
        """The number in `pieces` of the first piece of each pool."""
        return [pool[0] for pool in self._pieces_of_shards]

    @cached_property
    def _pieces_of_shards(self) -> list[list[int]]:
        """For each shard of each pool, the number in `pieces` of its first piece."""
        counts = [[len(shard.pieces) for shard in pool.shards] for pool in self.pools]
        firsts = iter(np.cumsum([0, *chain.from_iterable(counts)]).tolist())
        return [[next(firsts) for _ in pool] for pool in counts]

    @cached_property
    def _own_key(self) -> str:
        """The key of the files in the cache. It differs from `key` if this host lacks pieces."""
        absent = [number for number, piece in enumerate(self.pieces) if not piece.present]
        if not absent:
            return self.key
        return hashlib.blake2b(json.dumps([self.key, absent]).encode(), digest_size=12).hexdigest()

    def sample(self) -> Examples:
        """Return the first examples of the stream in the order of its sources. Checks take them for all examples."""
        name = f"sample-{self._own_key}-{_SAMPLE_TOKENS}"
        folder = open_entry(name, lambda folder: self._write(folder, None, _SAMPLE_TOKENS, _never))
        return self._open_examples(folder, f"{self.key}-sample", warn=True)

    @property
    def is_one_window(self) -> bool:
        """Whether the first window holds the whole stream, in the order of its sources."""
        end = PoolPlace(1, 0, START)
        return len(self.pools) == 1 and self.start_of(1).pools == (end,)

    def start_of(self, number: int) -> WindowStart:
        """Return where a window begins. This encodes the windows before it that the index does not know."""
        while number >= len(self._starts):
            starts = self._read_starts()
            if len(starts) > len(self._starts):
                self._starts[:] = starts
                continue
            if len(starts) < len(self._starts):
                # The cache was emptied during the run.
                self.index.write(self._starts[1:])
            self._open_entry(self._starts[-1])
        return self._starts[number]

    def find(self, step: int) -> WindowStart:
        """Return the start of the window that holds a step."""
        while True:
            at = bisect_right([start.step for start in self._starts], step) - 1
            if 0 <= at < len(self._starts) - 1:
                return self._starts[at]
            # The start of the next window says whether the step is in this one.
            self.start_of(max(1, len(self._starts)))

    def open(self, number: int, *, warn: bool = False) -> Examples:
        """Return the examples of a window, and encode it first if it is not in the cache.

        warn: whether to warn of special tokens inside texts.
        """
        while True:
            folder = self._open_entry(self.start_of(number))
            # Another process may remove an old window at this moment.
            with suppress(FileNotFoundError):
                return self._open_examples(folder, f"{self.key}-{number}", warn=warn)

    @contextmanager
    def locked_to_encode(self, number: int) -> Iterator[int | None]:
        """Hold the lock of the stream in the block, if a window is to be encoded and no other process encodes.

        Yield the descriptor of the lock, or None. A process that inherits the descriptor holds the lock to its end.
        """
        with self._lock(wait=False) as descriptor:
            yield None if self.is_encoded(number) else descriptor

    def encode_locked(self, number: int, cancelled: Callable[[], bool]) -> None:
        """Encode a window whose beginning is in the index. The stream's lock is held.

        cancelled: called after each batch of documents. EncodingCancelledError is raised when it returns True.
        """
        starts = self._read_starts()
        # The run makes a lost index anew when it needs the window.
        if number < len(starts):
            self._open_locked(starts[number], cancelled)

    def is_encoded(self, number: int) -> bool:
        """Return whether a window is in the cache."""
        return self._entry(number).exists()

    def _entry(self, number: int) -> Path:
        return get_cache_folder() / f"window-{self._own_key}-{number}"

    def _open_entry(self, start: WindowStart) -> Path:
        """Return the folder of a window in the cache, whose end the index then knows."""
        folder = find_entry(self._entry(start.number).name)
        if folder is not None and len(self._read_starts()) > start.number + 1:
            return folder
        with self._lock():
            return self._open_locked(start, _never)

    def _open_locked(self, start: WindowStart, cancelled: Callable[[], bool]) -> Path:
        self._remove_before(start.number + 1 - _KEPT_WINDOWS)
        if self._entry(start.number).exists() and len(self._read_starts()) <= start.number + 1:
            log.warning(f"the cache is damaged and is built anew: {self.index.path} does not know where a window ends")
        folder = open_entry(
            self._entry(start.number).name, lambda folder: self._write(folder, start, self.tokens, cancelled)
        )
        self._add_start(WindowStart.from_json(json.loads((folder / "end.json").read_text("utf-8"))))
        return folder

    def _remove_before(self, number: int) -> None:
        for path in get_cache_folder().glob(f"window-{self._own_key}-*"):
            if int(path.name.rpartition("-")[2]) < number:
                remove_path(path)
        # A killed process leaves a folder that it has not finished. None is being written while the lock is held.
        for path in get_cache_folder().glob(f".window-{self._own_key}-*"):
            remove_path(path)

    @contextmanager
    def _lock(self, *, wait: bool = True) -> Iterator[int | None]:
        """Hold the lock of the stream in the block, and yield its descriptor.

        Without `wait`, yield None if another process holds the lock. On a file system without locks, several processes
        may encode the same window, of which the first one stays.
        """
        path = get_cache_folder() / f"windows-{self._own_key}.lock"
        with ExitStack() as stack:
            with explain_cache_errors(path.parent):
                descriptor = stack.enter_context(lock_file(path, wait=wait))
            yield descriptor

    @property
    def index(self) -> WindowIndex:
        """The index, which all hosts have alike."""
        return WindowIndex(self.key)

    def export_index(self) -> dict[str, Any]:
        """Return all that this process or the cache knows of the windows, for `restore_index`."""
        starts = max(self._starts[1:], self.index.read(), key=len)
        return self.index.export(starts)

    def _read_starts(self) -> list[WindowStart]:
        """Return the starts of the windows that the index knows."""
        return [WindowStart(number=0, step=0, pools=(PoolPlace(),) * len(self.pools)), *self.index.read()]

    def _add_start(self, end: WindowStart) -> None:
        """Add the start of the window after the last one in the index. The stream's lock is held."""
        starts = self._read_starts()
        if end.number == len(starts):
            self.index.write([*starts[1:], end])

    # The files of a window.

    def _open_examples(self, folder: Path, fingerprint: str, *, warn: bool) -> Examples:
        special = read_special_tokens(folder, self.tokenizer, "training documents") if warn else None
        stop_K, piece_K = np.load(folder / "pieces.npy")
        runs = PieceRuns(pieces=self.pieces, stop_K=stop_K, piece_K=piece_K)
        # Each pool has blocks of its own, so that a host can have all documents of a block if it has the pool.
        pool_K = np.searchsorted(self.first_pieces, piece_K, side="right")
        breaks = stop_K[np.flatnonzero(np.diff(pool_K))]
        examples = open_examples(
            folder, self.form, words=self.words, fingerprint=fingerprint, special_tokens=special, breaks=breaks.tolist()
        )
        assert isinstance(examples.ids, ArrayFile)
        ids = examples.ids if self._own_key == self.key else PresentIds(examples.ids, runs)
        return replace(examples, ids=ids, pieces=runs)

    def _write(self, folder: Path, start: WindowStart | None, tokens: int, cancelled: Callable[[], bool]) -> None:
        """Encode the documents from `start` on, and write the files of a corpus, `end.json`, and `pieces.npy`.

        `pieces.npy` (int64[2, K]) has the stops and the pieces of `minilm.data.stream_pieces.PieceRuns`.

        start: None for the first documents in the order of the sources.

        The documents are in the order of the sources, whatever the order in which their shards were read. So a window
        that holds the whole stream is the corpus of the stream.
        """
        encoder = TextEncoder(self.tokenizer, *self.form.around, words=self.words, name="training documents")
        parts, ends = list[tuple[tuple[int, int, int], int, EncodedTexts]](), list[PoolPlace]()
        first = start or WindowStart(number=0, step=0, pools=(PoolPlace(),) * len(self.pools))
        for number, (pool, place) in enumerate(zip(self.pools, first.pools, strict=True)):
            enough = max(1, round(pool.share * tokens))
            taken = 0
            while taken < enough:
                order = self._order(pool, place.passes) if start else np.arange(len(pool.shards))
                for batch, at, following in _with_following(self._iterate(pool, order, place)):
                    if cancelled():
                        raise EncodingCancelledError
                    encoded = batch.encode(encoder)
                    count = 1 + int(np.searchsorted(np.cumsum(encoded.sizes), enough - taken))
                    if count < len(batch.places):
                        encoded, following = encoded.first(count), PoolPlace(0, at, batch.places[count])
                    shard = int(order[at])
                    piece = self._pieces_of_shards[number][shard] + batch.piece
                    parts.append(((number, place.passes, shard), piece, encoded))
                    taken += int(encoded.sizes.sum())
                    if taken >= enough:
                        break
                else:
                    following = None
                if following is not None:
                    place = replace(following, passes=place.passes)
                    continue
                begin, place = place, PoolPlace(place.passes + 1)
                is_whole_pass = begin == PoolPlace(begin.passes)
                # The pass of a single pool ends its window, unless the documents that were left of it have no token. A
                # pool without tokens would be read for ever.
                if (len(self.pools) == 1 and taken) or (is_whole_pass and not taken):
                    break
            ends.append(place)
        parts.sort(key=lambda part: part[0])
        _write_arrays(folder, [encoded for _, _, encoded in parts], encoder)
        sizes = [(len(encoded.ids), piece) for _, piece, encoded in parts if len(encoded.ids)]
        # One element for each batch of documents.
        size_B, piece_B = np.array(sizes, np.int64).reshape(-1, 2).T
        # The last batch of each run.
        last = np.flatnonzero(np.diff(piece_B, append=-1))
        np.save(folder / "pieces.npy", np.stack([np.cumsum(size_B), piece_B])[:, last])
        number, step = (first.number + 1, first.step + self._count_steps(folder)) if start else (0, 0)
        end = WindowStart(number=number, step=step, pools=tuple(ends))
        (folder / "end.json").write_text(json.dumps(end.to_json()), encoding="utf-8")

    def _order(self, pool: Pool, passes: int) -> NDArray[np.int64]:
        """Return the order of the shards in a pass."""
        return np.random.default_rng((self.seed, passes, _SHARD_ORDER)).permutation(len(pool.shards))

    def _iterate(self, pool: Pool, order: NDArray[np.int64], start: PoolPlace) -> Iterator[tuple[DocumentBatch, int]]:
        """Yield the training documents of a pass from a place on, and the position of their shard in its order."""
        for at in range(start.shard, len(order)):
            for batch in pool.shards[order[at]].read(start.place if at == start.shard else START):
                if self.held_out:
                    batch = batch.select(~is_held_out(batch.hashes(), self.held_out))
                if len(batch.places):
                    yield batch, at

    def _count_steps(self, folder: Path) -> int:
        examples = self._open_examples(folder, "", warn=False)
        if not len(examples):
            raise ValueError(
                f"the training documents hold no token to predict in a window of {self.tokens:,} tokens, since all are "
                "empty once encoded. Give other documents."
            )
        plan = Plan(
            examples.lengths, examples=self.examples, micro_tokens=1, seed=self.seed, row_tokens=self.row_tokens
        )
        return plan.steps_per_epoch


def _never() -> bool:
    return False


def _with_following(
    batches: Iterator[tuple[DocumentBatch, int]],
) -> Iterator[tuple[DocumentBatch, int, PoolPlace | None]]:
    """Yield each batch with the position of its shard, and with the place after it; None after the last batch."""
    before: tuple[DocumentBatch, int] | None = None
    for batch, at in batches:
        if before is not None:
            yield *before, PoolPlace(0, at, batch.places[0])
        before = batch, at
    if before is not None:
        yield *before, None


def _write_arrays(folder: Path, parts: Sequence[EncodedTexts], encoder: TextEncoder) -> None:
    """Write the files of a corpus, as `minilm.data.corpus` describes them."""
    sizes = np.concatenate([np.zeros(1, np.int64), *(part.sizes for part in parts)])
    np.save(folder / "offsets.npy", np.cumsum(sizes))
    with (
        create_array_file(folder / "ids.npy", encoder.dtype) as ids_file,
        create_array_file(folder / "begins.npy", np.dtype(bool)) as starts_file,
    ):
        for part in parts:
            ids_file.write(part.ids.data)
            if part.is_word_start is not None:
                starts_file.write(part.is_word_start.data)
    encoder.special.write(folder)
