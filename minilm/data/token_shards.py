"""Tokenised shards: a folder of token ids that `minilm tokenize` wrote, and that streams read in place of text.

The folder holds

- `manifest.json`: the settings, the pieces of each source file with their documents and tokens, the SHA-256 of each
  file of a piece, and in `filtered` how many documents the filters have removed. It is written last.
- `tokenizer`: the tokenizer.
- `tokens-<file>-<piece>`: a piece of a source file. `ids.npy` has the ids of all its documents without special tokens
  around them, `offsets.npy` (int64) where each document begins and the end of the last one, `hashes.npy` (uint64) the
  hashes of the texts (`minilm.data.held_out`), `begins.npy` (bool) the ids that begin words, and `held_out.jsonl` the
  texts of the documents that may be held out for evaluation.
- `filter-<file>.npy` (uint8), if there are filters: for each document of a source file 0 if it stayed, 1 for an exact
  copy, 2 for a near-copy, 3 if it is too short, and 4 if it is too long.

A source file is a shard, as it is when a stream reads its text. So a run makes the same steps as from the text.

A host may lack `ids.npy` and `begins.npy` of some pieces, if another host of the run has them. It then reads documents
of the right lengths, whose ids are zeros (`minilm.data.stream_pieces`).
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from minilm.data.array_file import ArrayFile
from minilm.data.held_out import hash_texts, is_held_out
from minilm.data.stream_pieces import Piece
from minilm.data.tables import Place
from minilm.data.text_encoder import EncodedTexts, TextEncoder
from minilm.data.tokenizer_state import serialize_backend
from minilm.utils.atomic_files import hash_file

MANIFEST = "manifest.json"
FORMAT = "minilm tokens 1"
"""The value of `format` in the manifest."""
TOKENIZER = "tokenizer"
"""The subfolder of the tokenizer."""
# The large files of a piece, which a host may lack.
_TOKEN_FILES = ("ids.npy", "begins.npy")
# The number of documents that are read at a time.
_BATCH_DOCUMENTS = 2000


def is_tokenized(source: str) -> bool:
    """Return whether a source is a folder of tokenised shards."""
    try:
        content = (Path(os.path.expanduser(source)) / MANIFEST).read_bytes()
        return bool(json.loads(content)["format"] == FORMAT)
    except (OSError, ValueError, TypeError, KeyError):
        return False


@dataclass(frozen=True)
class TokenFolder:
    """An opened folder of tokenised shards."""

    folder: Path
    manifest: dict[str, Any]
    identity: str
    """A hash of the manifest, and so of all files."""

    @classmethod
    def open(cls, source: str) -> "TokenFolder":
        """Open a folder for which `is_tokenized` is True."""
        folder = Path(os.path.expanduser(source))
        content = (folder / MANIFEST).read_bytes()
        return cls(folder, json.loads(content), hashlib.sha256(content).hexdigest())

    @property
    def tokenizer(self) -> str:
        """The folder of the tokenizer."""
        return str(self.folder / TOKENIZER)

    @property
    def shards(self) -> "list[TokenShard]":
        """A shard for each source file, in their order."""
        return [
            TokenShard(self.folder, file, tuple(_find_piece(self.folder, facts) for facts in file))
            for file in self.manifest["files"]
        ]

    def check_run(self, tokenizer: PreTrainedTokenizerBase, *, words: bool) -> None:
        """Raise ValueError if a run with this tokenizer cannot read the tokens. words: whether it asks for words."""
        if describe_backend(tokenizer) != self.manifest["settings"]["tokenizer"]:
            raise ValueError(
                f"data source {self.folder}: it was tokenised with another tokenizer than that of the run: pass "
                f"--tokens.name {self.tokenizer}, or tokenize the text again"
            )
        if words and not self.manifest["settings"]["words"]:
            raise ValueError(
                f"data source {self.folder}: it does not say where words begin, which objective.unit needs: run minilm "
                "tokenize --words"
            )

    def iterate_held_out(self, fraction: float) -> Iterator[str]:
        """Yield the texts that are held out if the share `fraction` of all texts is, in their order."""
        stored = self.manifest["settings"]["eval_fraction"]
        if fraction > stored:
            raise ValueError(
                f"data source {self.folder}: it has the texts of a share of {stored} for evaluation, less than "
                f"data.eval_fraction {fraction}: lower it, or give data.eval_source"
            )
        for file in self.manifest["files"]:
            for piece in file:
                check_piece_file(self.folder, piece["name"], "held_out.jsonl", piece["sha256"]["held_out.jsonl"])
                with (self.folder / piece["name"] / "held_out.jsonl").open(encoding="utf-8") as lines:
                    for line in lines:
                        text = json.loads(line)
                        if is_held_out(hash_texts([text]), fraction)[0]:
                            yield text


def _find_piece(folder: Path, facts: dict[str, Any]) -> Piece:
    """Return a piece of a folder, of which the manifest says `facts`."""
    paths = [folder / facts["name"] / name for name in _TOKEN_FILES if name in facts["sha256"]]
    absent = [path for path in paths if not path.exists()]
    return Piece(str((absent or paths)[0]), not absent)


def describe_backend(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of what decides the ids of a text without special tokens around it."""
    state = json.dumps([serialize_backend(tokenizer), tokenizer.split_special_tokens])
    return hashlib.sha256(state.encode("utf-8", "surrogatepass")).hexdigest()


@lru_cache(maxsize=4096)
def check_piece_file(folder: Path, piece: str, name: str, sha256: str) -> None:
    """Raise ValueError if a file of a piece is not the one in the manifest. A process checks each file once."""
    path = folder / piece / name
    try:
        found = hash_file(path)["sha256"]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); copy the folder again") from error
    if found != sha256:
        raise ValueError(f"{path}: it differs from its SHA-256 in {MANIFEST}; copy the folder again")


@dataclass(frozen=True)
class TokenBatch:
    """Documents as ids (a `minilm.data.shards.DocumentBatch`)."""

    places: Sequence[Place]
    piece: int
    hashes_D: NDArray[np.uint64]
    encoded: EncodedTexts
    """The ids without special tokens around the documents."""

    def hashes(self) -> NDArray[np.uint64]:
        return self.hashes_D

    def select(self, chosen: NDArray[np.bool_]) -> "TokenBatch":
        sizes, starts = self.encoded.sizes, self.encoded.is_word_start
        chosen_I = np.repeat(chosen, sizes)
        encoded = EncodedTexts(
            sizes=sizes[chosen],
            ids=self.encoded.ids[chosen_I],
            is_word_start=None if starts is None else starts[chosen_I],
        )
        places = [self.places[i] for i in np.flatnonzero(chosen).tolist()]
        return TokenBatch(places, self.piece, self.hashes_D[chosen], encoded)

    def encode(self, encoder: TextEncoder) -> EncodedTexts:
        before, after, sizes = encoder.before, encoder.after, self.encoded.sizes
        starts = self.encoded.is_word_start if encoder.words else None
        new_sizes = sizes + len(before) + len(after)
        first_D = np.cumsum(new_sizes) - new_sizes
        inner_I = np.arange(len(self.encoded.ids)) + np.repeat(
            first_D + len(before) - (np.cumsum(sizes) - sizes), sizes
        )
        ids = np.empty(int(new_sizes.sum()), encoder.dtype)
        ids[inner_I] = self.encoded.ids
        for at, id in enumerate(before):
            ids[first_D + at] = id
        for at, id in enumerate(after):
            ids[first_D + len(before) + sizes + at] = id
        is_word_start = None
        if starts is not None:
            is_word_start = np.ones(len(ids), np.bool_)
            is_word_start[inner_I] = starts
        return EncodedTexts(sizes=new_sizes, ids=ids, is_word_start=is_word_start)


@dataclass(frozen=True)
class TokenShard:
    """The tokens of a source file (a `minilm.data.shards.Shard`). A place is the number of a document."""

    folder: Path
    facts: Sequence[dict[str, Any]]
    """What the manifest says of each piece, in their order."""
    pieces: Sequence[Piece]
    """The pieces, as they were when the folder was opened."""

    @property
    def stamp(self) -> list[Any]:
        """The SHA-256 of each file of each piece, and whether this host has its tokens."""
        return [[facts["sha256"], piece.present] for facts, piece in zip(self.facts, self.pieces, strict=True)]

    def read(self, start: Place) -> Iterator[TokenBatch]:
        firsts = np.cumsum([0, *(facts["documents"] for facts in self.facts)]).tolist()
        for number in range(max(0, bisect_right(firsts, start[0]) - 1), len(self.facts)):
            yield from self._read_piece(number, firsts[number], max(0, start[0] - firsts[number]))

    def _read_piece(self, number: int, first: int, skipped: int) -> Iterator[TokenBatch]:
        """Yield the documents of a piece without the first `skipped`. first: the number of its first document."""
        name, sha256, present = self.facts[number]["name"], self.facts[number]["sha256"], self.pieces[number].present
        for file, digest in sha256.items():
            if file != "held_out.jsonl" and (present or file not in _TOKEN_FILES):
                check_piece_file(self.folder, name, file, digest)
        folder, words = self.folder / name, "begins.npy" in sha256
        ids = ArrayFile(folder / "ids.npy") if present else _Zeros(np.dtype(np.uint16))
        starts = (ArrayFile(folder / "begins.npy") if present else _Zeros(np.dtype(bool))) if words else None
        offsets, hashes = np.load(folder / "offsets.npy", mmap_mode="r"), np.load(folder / "hashes.npy", mmap_mode="r")
        for at in range(skipped, len(hashes), _BATCH_DOCUMENTS):
            bounds = np.array(offsets[at : at + _BATCH_DOCUMENTS + 1])
            part = slice(int(bounds[0]), int(bounds[-1]))
            encoded = EncodedTexts(
                sizes=np.diff(bounds), ids=ids[part], is_word_start=None if starts is None else starts[part]
            )
            places = [(first + document, 0) for document in range(at, at + len(bounds) - 1)]
            yield TokenBatch(places, number, np.array(hashes[at : at + _BATCH_DOCUMENTS]), encoded)


@dataclass(frozen=True)
class _Zeros:
    """Stands for the tokens of a piece that this host lacks."""

    dtype: np.dtype[Any]

    def __getitem__(self, part: slice) -> NDArray[Any]:
        return np.zeros(part.stop - part.start, self.dtype)
