"""Streamed documents: every pass reads the sources again, and nothing is stored. The counterpart of `documents`."""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import datasets

from minilm.config import Data
from minilm.data.fingerprints import fingerprint_files
from minilm.data.glue import apply_glue_task
from minilm.data.held_out import hash_texts, is_held_out
from minilm.data.sources import (
    build_columns,
    check_data_settings,
    fetch_revision,
    list_files,
    no_documents_error,
    quiet_datasets,
    stream_rows,
)
from minilm.data.splits import assemble_splits
from minilm.data.token_shards import TokenFolder, is_tokenized
from minilm.utils.local_files import get_full_ending

# The number of texts that are hashed at a time. A stream of the hub is read only so far beyond what a run needs.
_HASHED_TEXTS = 100


@dataclass(frozen=True, kw_only=True)
class TextStream:
    """Texts in a fixed order. Every pass over them reads the source again."""

    texts: Callable[[], Iterator[str]]
    identity: str
    """Differs between streams with different texts. It holds fingerprints of files or a revision, and the settings."""
    revisions: Mapping[str, str] = field(default_factory=dict)
    """The commit of each source that is a dataset on the hub. Each pass downloads its texts."""

    def iter(self, batch_size: int) -> Iterator[dict[str, list[str]]]:
        """Yield the texts in batches, as a `datasets.Dataset` with the column `text` does."""
        texts = self.texts()
        while batch := [*itertools.islice(texts, batch_size)]:
            yield {"text": batch}

    def take_characters(self, count: int) -> "TextStream":
        """Return a stream of the first texts, up to the one with which they have `count` characters."""

        def texts() -> Iterator[str]:
            left = count
            for text in self.texts():
                yield text
                left -= len(text)
                if left <= 0:
                    return

        return replace(self, texts=texts, identity=f"{self.identity} first {count} characters")


def stream_documents(data: Data) -> tuple[TextStream, dict[str, TextStream]]:
    """Return (training documents, evaluation documents by name), as `load_documents` without labels.

    If a fraction of the documents is held out, a hash of each text decides whether it is (`minilm.data.held_out`).
    """
    data = apply_glue_task(data)
    check_data_settings(data, build_columns(data))
    return assemble_splits(data, _StreamReader(data))


@dataclass(frozen=True)
class _StreamReader:
    """Reads documents as streams (a `minilm.data.splits.SplitReader`). An empty stream raises ValueError when read."""

    data: Data

    def read(self, source: str, split: str) -> TextStream:
        return _stream_split(self.data, source, split)

    def hold_out(self, source: str) -> tuple[TextStream, TextStream]:
        """Hold out the documents whose hash says so."""
        documents, fraction = self.read(source, self.data.split), self.data.eval_fraction
        if is_tokenized(source):
            folder = TokenFolder.open(source)
            identity = f"{documents.identity} hash {fraction}"
            held_out = TextStream(texts=lambda: folder.iterate_held_out(fraction), identity=identity)
            return replace(documents, identity=identity), held_out
        empty = f"{source}: data.eval_fraction={fraction} holds out no document; raise it or give data.eval_source"
        return _hold_out(documents, fraction, inside=False), _hold_out(documents, fraction, if_empty=empty)

    def repeat(self, documents: TextStream, source: str, weight: float) -> TextStream:
        """Repeat all documents. For the fraction of `weight`, add a share of them, at equal distances."""
        whole, share = divmod(weight, 1)
        empty = "" if whole else f"{source}: data.weights {weight} selects no document; give a larger weight"
        parts = [documents] * int(whole)
        if share:
            parts.append(_take_share(documents, share, empty))
        return join_streams(parts)

    def join(self, parts: list[TextStream]) -> TextStream:
        return join_streams(parts)


def _stream_split(data: Data, source: str, split: str) -> TextStream:
    """Return a stream of the documents of a split. Documents without a visible character are dropped."""
    if is_tokenized(source):
        return _stream_tokens(source, split)
    files = list_files(source)
    commit = None if files else fetch_revision(source)
    # Names of files are left out, because a copy of a file has the same texts.
    fingerprints = zip(map(get_full_ending, files), fingerprint_files(files), strict=True)
    # The library decides how a dataset on the hub is divided into files and groups of rows.
    origin: list[Any] = [*fingerprints] or [source, commit, data.config, datasets.__version__]
    settings = {"column": data.column, "document": data.document, "delimiter": data.delimiter, "split": split}

    def texts() -> Iterator[str]:
        with quiet_datasets():
            empty = True
            for batch in stream_rows(data, source, split, commit):
                yield from batch
                empty &= not batch
            if empty:
                raise no_documents_error(source, split, build_columns(data)[:1])

    return TextStream(
        texts=texts, identity=json.dumps([origin, settings]), revisions={} if commit is None else {source: commit}
    )


def _stream_tokens(source: str, split: str) -> TextStream:
    """Return the stream of a folder of tokenised shards, whose texts cannot be read."""
    if split != "train":
        raise ValueError(f"data source {source}: tokenised shards have no split {split!r}; leave data.split out")

    def texts() -> Iterator[str]:
        raise ValueError(
            f"data source {source}: tokenised shards have no texts, which this run needs: give the text itself"
        )

    return TextStream(texts=texts, identity=TokenFolder.open(source).identity)


def _hold_out(stream: TextStream, fraction: float, *, inside: bool = True, if_empty: str = "") -> TextStream:
    """Return the documents that are held out, or all other documents if not `inside`.

    if_empty: the message of the ValueError that an empty result raises. With "", an empty result is allowed.
    """

    def texts() -> Iterator[str]:
        empty, all_texts = True, stream.texts()
        while batch := [*itertools.islice(all_texts, _HASHED_TEXTS)]:
            held_out = is_held_out(hash_texts(batch), fraction)
            for text in itertools.compress(batch, held_out if inside else ~held_out):
                empty = False
                yield text
        if empty and if_empty:
            raise ValueError(if_empty)

    return replace(stream, texts=texts, identity=f"{stream.identity} {inside} hash {fraction}")


def _take_share(stream: TextStream, share: float, if_empty: str) -> TextStream:
    """Return every (1 / `share`)-th document. If there is none, reading it raises ValueError(if_empty)."""

    def texts() -> Iterator[str]:
        empty = True
        for index, text in enumerate(stream.texts()):
            if math.floor((index + 1) * share) > math.floor(index * share):
                empty = False
                yield text
        if empty and if_empty:
            raise ValueError(if_empty)

    return replace(stream, texts=texts, identity=f"{stream.identity} True {share}")


def join_streams(streams: list[TextStream]) -> TextStream:
    """Return the texts of all streams, one stream after the other."""
    return TextStream(
        texts=lambda: itertools.chain.from_iterable(stream.texts() for stream in streams),
        identity=" then ".join(stream.identity for stream in streams),
        revisions={source: commit for stream in streams for source, commit in stream.revisions.items()},
    )
