"""Write the tokens of text into a folder of shards, which `minilm.data.token_shards` describes.

Any number of processes may write into one folder (`minilm.data.shard_pieces`).
"""

import json
import logging
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from minilm.config import Data, Tokens
from minilm.data.array_file import create_array_file
from minilm.data.document_filters import KEPT, FilterJob, Filters, format_removed
from minilm.data.held_out import is_held_out
from minilm.data.shard_pieces import PieceJob
from minilm.data.shards import Shard, TextBatch, open_shards
from minilm.data.sources import pin_revisions
from minilm.data.streaming import stream_documents
from minilm.data.text_encoder import EncodedTexts, TextEncoder
from minilm.data.token_shards import FORMAT, MANIFEST, TOKENIZER, describe_backend, is_tokenized
from minilm.data.tokenizer import load_tokenizer
from minilm.utils.atomic_files import hash_file, replace_folder, write_atomically

log = logging.getLogger("minilm")

_SETTINGS = "settings.json"
# While a file is encoded, the memory holds the ids of one piece.
PIECE_TOKENS = 16_000_000


@dataclass(frozen=True, kw_only=True)
class TokenizeJob:
    """The texts to tokenise, and the folder for their tokens. It can be sent to another process."""

    shards: Sequence[Shard]
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    words: bool
    eval_fraction: float
    piece_tokens: int
    filters: Filters

    @property
    def filter_job(self) -> FilterJob | None:
        """The filters; None if all documents stay."""
        if not self.filters.verdicts:
            return None
        return FilterJob(folder=self.folder, shards=self.shards, filters=self.filters)

    @property
    def pieces(self) -> PieceJob:
        """The pieces of tokens."""
        return PieceJob(
            folder=self.folder,
            shards=self.shards,
            kind="tokens",
            unit="tokens",
            piece_size=self.piece_tokens,
            begin=lambda number, pieces: _TokenPieces(self, number, pieces),
        )


def tokenize(
    data: Data,
    tokenizer_name: str,
    folder: Path,
    *,
    words: bool = False,
    processes: int = 1,
    piece_tokens: int = PIECE_TOKENS,
    filters: Filters | None = None,
) -> int:
    """Write the tokens of `data.sources` into `folder`, and return their number.

    filters: which documents to leave out. The log and the manifest have their numbers.

    If the folder has a part of them, only the others are encoded, from the same commit of a dataset on the hub. The
    texts of `data.eval_fraction` of the documents are written too, for evaluations.

    Raises ValueError for sources that cannot be read, and for a folder that holds something else.
    """
    filters = filters or Filters()
    if any(map(is_tokenized, data.sources)):
        raise ValueError("minilm tokenize reads text, and a source is tokenised already: train on that folder")
    with pin_revisions(_read_settings(folder).get("revisions", {})):
        stream, _ = stream_documents(replace(data, streaming=True))
    tokenizer = load_tokenizer(Tokens(name=tokenizer_name), None, stream)
    settings = {
        "tokenizer": describe_backend(tokenizer),
        "documents": stream.identity,
        "eval_fraction": data.eval_fraction,
        "words": words,
        "piece_tokens": piece_tokens,
        "filters": filters.describe() if filters.verdicts else None,
    }
    if stream.revisions:
        settings |= {"revisions": stream.revisions, "datasets": datasets.__version__}
    shards = list[Shard]()
    for source in data.sources:
        shards_of_source = open_shards(data, source, stream.revisions.get(source))
        if not shards_of_source:
            raise ValueError(
                f"data source {source}: minilm tokenize reads whole splits; leave the part of data.split out"
            )
        shards += shards_of_source
    _claim_folder(folder, settings, tokenizer)
    job = TokenizeJob(
        shards=shards,
        tokenizer=tokenizer,
        folder=folder,
        words=words,
        eval_fraction=data.eval_fraction,
        piece_tokens=piece_tokens,
        filters=filters,
    )
    _run_processes(job, min(processes, len(shards)))
    files = [job.pieces.read(number) for number in range(len(shards))]
    if unfinished := sum(not file or file[-1]["next"] is not None for file in files):
        raise ValueError(
            f"{folder}: other processes still write {unfinished} of {len(files)} files; when they have ended, run "
            "the same command again"
        )
    content: dict[str, Any] = {"format": FORMAT, "settings": settings, "files": files}
    if filter_job := job.filter_job:
        content["filtered"] = filter_job.count()
        log.info(format_removed(content["filtered"]))
        filter_job.remove_survey()
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


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings with which a folder was begun; empty if it was not. Raise ValueError if they are damaged."""
    path = folder / _SETTINGS
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_bytes())
        if not isinstance(settings.get("revisions", {}), dict):
            raise ValueError
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read; remove the folder and start again") from error
    result: dict[str, Any] = settings
    return result


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError if the folder was begun with other settings."""
    begun = _read_settings(folder)
    # Earlier versions did not record these two, which also decide `documents`.
    optional = {"revisions", "datasets"} - begun.keys()
    different = [name for name, value in settings.items() if name not in optional and begun.get(name) != value]
    if "datasets" in different:
        different[different.index("datasets")] = f"datasets ({begun['datasets']}, now {settings['datasets']})"
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
    """Tokenise each source file that no other process has finished or locked. Filter the documents of all before."""
    if filter_job := job.filter_job:
        filter_job.run()
    job.pieces.run()


class _TokenPieces:
    """Encodes the documents of a source file, and writes them in pieces (a `minilm.data.shard_pieces.PieceBuilder`)."""

    def __init__(self, job: TokenizeJob, number: int, pieces: Sequence[dict[str, Any]]) -> None:
        self._job = job
        # What the filters decided on the documents of the file, and the number of those that have been read.
        self._verdicts = job.filter_job.read(number) if job.filter_job else None
        self._read = sum(piece["documents"] + piece.get("removed", 0) for piece in pieces)
        self._encoder = TextEncoder(job.tokenizer, words=job.words, name="documents")
        self._begin_piece()

    def _begin_piece(self) -> None:
        self._parts, self._hashes, self._held_out = list[EncodedTexts](), list[NDArray[np.uint64]](), list[str]()
        self.size = self._removed = 0

    def add(self, batch: TextBatch) -> None:
        if self._verdicts is not None:
            kept = self._verdicts[self._read : self._read + len(batch.texts)] == KEPT
            assert len(kept) == len(batch.texts)
            self._read += len(kept)
            self._removed += int((~kept).sum())
            batch = batch.select(kept)
        encoded, hashes = batch.encode(self._encoder), batch.hashes()
        self._parts.append(encoded)
        self._hashes.append(hashes)
        held_out = is_held_out(hashes, self._job.eval_fraction)
        self._held_out += [batch.texts[at] for at in np.flatnonzero(held_out).tolist()]
        self.size += len(encoded.ids)

    def write(self, folder: Path) -> dict[str, Any]:
        sizes = np.concatenate([np.zeros(1, np.int64), *(part.sizes for part in self._parts)])
        np.save(folder / "offsets.npy", np.cumsum(sizes))
        np.save(folder / "hashes.npy", np.concatenate([np.zeros(0, np.uint64), *self._hashes]))
        with create_array_file(folder / "ids.npy", self._encoder.dtype) as file:
            for part in self._parts:
                file.write(part.ids.data)
        if self._job.words:
            with create_array_file(folder / "begins.npy", np.dtype(bool)) as file:
                for part in self._parts:
                    assert part.is_word_start is not None
                    file.write(part.is_word_start.data)
        lines = "".join(json.dumps(text) + "\n" for text in self._held_out)
        (folder / "held_out.jsonl").write_text(lines, encoding="utf-8")
        removed = self._removed
        self._begin_piece()
        return {
            "documents": len(sizes) - 1,
            "removed": removed,
            "tokens": int(sizes.sum()),
            "sha256": {path.name: hash_file(path)["sha256"] for path in sorted(folder.iterdir())},
        }
