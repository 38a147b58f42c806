"""Streamed documents: each pass reads them anew, and nothing is stored. The counterpart of `load_documents`."""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from minilm.config import Data
from minilm.data.glue import with_glue_columns
from minilm.data.sources import check_data_settings, list_files, no_documents, quiet_datasets, revision, stream_rows
from minilm.data.text_files import fingerprint_file
from minilm.utils.local_files import full_ending


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Texts in a fixed order, read anew by every pass."""

    texts: Callable[[], Iterator[str]]
    identity: str
    """Tells apart streams with different texts: the fingerprints of the files or the revision, and the settings."""
    remote: bool
    """True if the texts come from the hub, so that each pass downloads them."""

    def iter(self, batch_size: int) -> Iterator[dict[str, list[str]]]:
        """Yield the texts in batches, as a `datasets.Dataset` with the column `text` does."""
        texts = self.texts()
        while batch := [*itertools.islice(texts, batch_size)]:
            yield {"text": batch}

    def first(self, count: int) -> "Stream":
        """Return a stream of the first `count` texts."""
        return Stream(
            texts=lambda: itertools.islice(self.texts(), count),
            identity=f"{self.identity} first {count}",
            remote=self.remote,
        )


def stream_documents(data: Data) -> tuple[Stream, dict[str, Stream]]:
    """Return (training documents, evaluation documents by name), as `load_documents` without labels.

    If a fraction of the documents is held out, document i is held out where floor((i + 1) * fraction) is greater than
    floor(i * fraction): these are every (1 / fraction)-th document.
    """
    data = with_glue_columns(data)
    check_data_settings(data, labels=False)
    if data.eval_source is None and data.eval_split is None:
        whole = [_stream(data, source, data.split) for source in data.sources]
        train = [_share(stream, data.eval_fraction, inside=False) for stream in whole]
        empty = f"data.eval_fraction={data.eval_fraction} holds out no document; raise it or give data.eval_source"
        parts = [
            _share(stream, data.eval_fraction, if_empty=f"{source}: {empty}")
            for stream, source in zip(whole, data.sources, strict=True)
        ]
        held_out = {"": chained(parts)}
    else:
        train = [_stream(data, source, data.split) for source in data.sources]
        splits = (data.eval_split or "train").split("+")
        sources = (data.eval_source,) if data.eval_source else data.sources
        held_out = {
            split if len(splits) > 1 else "": chained([_stream(data, source, split) for source in sources])
            for split in splits
        }
    if data.weights:
        train = [
            _repeated(stream, weight, source)
            for stream, weight, source in zip(train, data.weights, data.sources, strict=True)
        ]
    return chained(train), held_out


def _stream(data: Data, source: str, split: str) -> Stream:
    """Return a stream of the documents of a split that have a visible character."""
    files = list_files(source)
    commit = None if files else revision(source)
    # A copy of a file has the same texts, and so has a file whose time alone changed.
    origin = [[full_ending(name), fingerprint_file(name)] for name in files] if files else [source, commit, data.config]
    settings = {"column": data.column, "document": data.document, "delimiter": data.delimiter, "split": split}

    def texts() -> Iterator[str]:
        with quiet_datasets():
            empty = True
            for batch in stream_rows(data, source, split, commit):
                yield from batch
                empty &= not batch
            if empty:
                raise no_documents(data, source, split)

    return Stream(texts=texts, identity=json.dumps([origin, settings]), remote=not files)


def _repeated(stream: Stream, weight: float, source: str) -> Stream:
    """Return the documents `weight` times. Its fraction adds that share of them, at equal distances."""
    whole, share = divmod(weight, 1)
    empty = "" if whole else f"{source}: data.weights {weight} selects no document; give a larger weight"
    return chained([*[stream] * int(whole), *([_share(stream, share, if_empty=empty)] if share else [])])


def _share(stream: Stream, fraction: float, *, inside: bool = True, if_empty: str = "") -> Stream:
    """Return every (1 / `fraction`)-th document, or all other documents if not `inside`.

    if_empty: the message of a ValueError if there are none; without a message, an empty stream is right.
    """

    def texts() -> Iterator[str]:
        empty = True
        for index, text in enumerate(stream.texts()):
            if (math.floor((index + 1) * fraction) > math.floor(index * fraction)) == inside:
                empty = False
                yield text
        if empty and if_empty:
            raise ValueError(if_empty)

    return Stream(texts=texts, identity=f"{stream.identity} {inside} {fraction}", remote=stream.remote)


def chained(streams: list[Stream]) -> Stream:
    """Return the texts of all streams, one stream after the other."""
    return Stream(
        texts=lambda: itertools.chain.from_iterable(stream.texts() for stream in streams),
        identity=" then ".join(stream.identity for stream in streams),
        remote=any(stream.remote for stream in streams),
    )
