"""Write the tokens of text into a folder of shards, which `minilm.data.token_shards` describes.

Any number of processes may write into one folder, also from several hosts that share it. Each process takes a source
file that no other has locked, and continues it after the last piece that is complete.
"""

import fcntl
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from minilm.config import Data, Tokens
from minilm.data.array_file import create_array_file
from minilm.data.held_out import is_held_out
from minilm.data.shards import START, Shard, TextBatch, open_shards
from minilm.data.streaming import stream_documents
from minilm.data.text_encoder import EncodedTexts, TextEncoder
from minilm.data.token_shards import FORMAT, MANIFEST, TOKENIZER, describe_backend, is_tokenized
from minilm.data.tokenizer import load_tokenizer
from minilm.utils.atomic_files import hash_file, remove_path, replace_folder, write_atomically

log = logging.getLogger("minilm")

_SETTINGS = "settings.json"
_FACTS = "piece.json"
# While a file is encoded, the memory holds the ids of one piece.
PIECE_TOKENS = 16_000_000


@dataclass(frozen=True, kw_only=True)
class TokenizeJob:
    """What to tokenise, and where to. It can be pickled."""

    shards: Sequence[Shard]
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    words: bool
    eval_fraction: float
    piece_tokens: int


def tokenize(
    data: Data,
    tokenizer_name: str,
    folder: Path,
    *,
    words: bool = False,
    processes: int = 1,
    piece_tokens: int = PIECE_TOKENS,
) -> int:
    """Write the tokens of `data.sources` into `folder`, and return their number.

    If the folder has a part of them, only the others are encoded. The texts of `data.eval_fraction` of the documents
    are written too, for evaluations.

    Raises ValueError for sources that cannot be read, and for a folder that holds something else.
    """
    if any(map(is_tokenized, data.sources)):
        raise ValueError("minilm tokenize reads text, and a source is tokenised already: train on that folder")
    stream, _ = stream_documents(replace(data, streaming=True))
    tokenizer = load_tokenizer(Tokens(name=tokenizer_name), None, stream)
    settings = {
        "tokenizer": describe_backend(tokenizer),
        "documents": stream.identity,
        "eval_fraction": data.eval_fraction,
        "words": words,
        "piece_tokens": piece_tokens,
    }
    shards = [shard for source in data.sources for shard in open_shards(data, source)]
    if not shards:
        raise ValueError(f"data source {data.sources[0]}: minilm tokenize reads local files and saved datasets alone")
    _claim_folder(folder, settings, tokenizer)
    job = TokenizeJob(
        shards=shards,
        tokenizer=tokenizer,
        folder=folder,
        words=words,
        eval_fraction=data.eval_fraction,
        piece_tokens=piece_tokens,
    )
    _run_processes(job, min(processes, len(shards)))
    files = [_read_pieces(folder, number) for number in range(len(shards))]
    if unfinished := sum(not file or file[-1]["next"] is not None for file in files):
        raise ValueError(
            f"{folder}: other processes still write {unfinished} of {len(files)} files; when they have ended, run "
            "the same command again"
        )
    content = {"format": FORMAT, "settings": settings, "files": files}
    write_atomically(folder / MANIFEST, json.dumps(content, indent=1) + "\n")
    return sum(piece["tokens"] for file in files for piece in file)


def _claim_folder(folder: Path, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Create the folder with its settings and tokenizer. Raise ValueError if it holds something else.

    The settings come first, so that a command that was killed, or one that runs at the same time, finds its own folder.
    """
    path = folder / _SETTINGS
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder}: it is not empty: choose another folder, or remove what it holds")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(settings, indent=1) + "\n")
    _check_settings(folder, settings)
    if not (folder / TOKENIZER).exists():
        with replace_folder(folder / TOKENIZER) as temporary:
            tokenizer.save_pretrained(temporary)


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError if the folder was begun with other settings."""
    path = folder / _SETTINGS
    try:
        different = [name for name, value in settings.items() if json.loads(path.read_bytes()).get(name) != value]
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read; remove the folder and start again") from error
    if different:
        raise ValueError(
            f"{folder}: it was begun with other values of {', '.join(different)}: choose another folder, or remove it"
        )


def _run_processes(job: TokenizeJob, processes: int) -> None:
    """Tokenise in this process, or in several. Raise the first error of a process."""
    if processes <= 1:
        _tokenize_files(job)
        return
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_limit_threads, initargs=(threads,)
    ) as pool:
        for result in [pool.submit(_tokenize_files, job) for _ in range(processes)]:
            try:
                result.result()
            except BrokenProcessPool as error:
                raise ValueError(
                    f"{job.folder}: a process was killed, perhaps for its memory: run the same command again, with "
                    "fewer --processes"
                ) from error


def _limit_threads(threads: int) -> None:
    """Let this process encode on its share of the processors."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"


def _tokenize_files(job: TokenizeJob) -> None:
    """Tokenise each source file that no other process has finished or locked."""
    for number, shard in enumerate(job.shards):
        with _lock(job.folder / f".file-{number:05}.lock") as locked:
            pieces = _read_pieces(job.folder, number) if locked else []
            if locked and not (pieces and pieces[-1]["next"] is None):
                for leftover in job.folder.glob(f".tokens-{number:05}-*"):
                    remove_path(leftover)
                _tokenize_file(job, number, shard, pieces)


def _tokenize_file(job: TokenizeJob, number: int, shard: Shard, pieces: list[dict[str, Any]]) -> None:
    """Write the pieces of a source file that follow `pieces`."""
    encoder = TextEncoder(job.tokenizer, words=job.words, name="documents")
    start = (pieces[-1]["next"][0], pieces[-1]["next"][1]) if pieces else START
    piece, begun = _Piece(), time.perf_counter()
    tokens = 0
    for batch in shard.read(start):
        assert isinstance(batch, TextBatch)
        if piece.tokens >= job.piece_tokens:
            pieces.append(piece.write(job, f"tokens-{number:05}-{len(pieces):05}", encoder, list(batch.places[0])))
            tokens += piece.tokens
            rate = tokens / (time.perf_counter() - begun)
            log.info(f"file {number + 1} of {len(job.shards)}: {tokens:,} tokens, {rate:,.0f} tokens/s")
            piece = _Piece()
        piece.add(batch, batch.encode(encoder), job.eval_fraction)
    piece.write(job, f"tokens-{number:05}-{len(pieces):05}", encoder, None)


class _Piece:
    """The part of a source file that is in memory."""

    def __init__(self) -> None:
        self.parts, self.hashes, self.held_out = list[EncodedTexts](), list[NDArray[np.uint64]](), list[str]()
        self.tokens = 0

    def add(self, batch: TextBatch, encoded: EncodedTexts, eval_fraction: float) -> None:
        """Add documents and their ids."""
        hashes = batch.hashes()
        self.parts.append(encoded)
        self.hashes.append(hashes)
        self.held_out += [batch.texts[at] for at in np.flatnonzero(is_held_out(hashes, eval_fraction)).tolist()]
        self.tokens += len(encoded.ids)

    def write(self, job: TokenizeJob, name: str, encoder: TextEncoder, following: list[int] | None) -> dict[str, Any]:
        """Write the piece, and return its facts. following: the place of the next piece, or None after the last."""
        sizes = np.concatenate([np.zeros(1, np.int64), *(part.sizes for part in self.parts)])
        with replace_folder(job.folder / name) as folder:
            np.save(folder / "offsets.npy", np.cumsum(sizes))
            np.save(folder / "hashes.npy", np.concatenate([np.zeros(0, np.uint64), *self.hashes]))
            with create_array_file(folder / "ids.npy", encoder.dtype) as file:
                for part in self.parts:
                    file.write(part.ids.data)
            if job.words:
                with create_array_file(folder / "begins.npy", np.dtype(bool)) as file:
                    for part in self.parts:
                        assert part.is_word_start is not None
                        file.write(part.is_word_start.data)
            lines = "".join(json.dumps(text) + "\n" for text in self.held_out)
            (folder / "held_out.jsonl").write_text(lines, encoding="utf-8")
            facts = {
                "name": name,
                "documents": len(sizes) - 1,
                "tokens": int(sizes.sum()),
                "next": following,
                "sha256": {path.name: hash_file(path)["sha256"] for path in sorted(folder.iterdir())},
            }
            (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
        return facts


def _read_pieces(folder: Path, number: int) -> list[dict[str, Any]]:
    """Return the facts of the complete pieces of a source file, in their order."""
    pieces = list[dict[str, Any]]()
    while (path := folder / f"tokens-{number:05}-{len(pieces):05}" / _FACTS).exists():
        pieces.append(json.loads(path.read_bytes()))
    return pieces


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold a lock in the block, and yield True; or yield False if another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)
