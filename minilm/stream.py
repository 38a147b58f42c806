"""Documents that are read anew at every pass and stored nowhere: `stream_documents` is `load_documents` for them."""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from minilm.config import Data
from minilm.files import file_content, form
from minilm.glue import with_glue_columns
from minilm.sources import check_data_settings, files_of, no_documents, quiet_datasets, revision, stream_rows


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Texts in a fixed order, read anew by every pass."""

    texts: Callable[[], Iterator[str]]
    identity: str
    """What decides the texts: the content of the files or the revision on the hub, and what is taken of it."""
    remote: bool
    """They come from the hub, where reading costs more than time."""

    def iter(self, batch_size: int) -> Iterator[dict[str, list[str]]]:
        """The texts in batches, as a `datasets.Dataset` with the column `text` gives them."""
        texts = self.texts()
        while batch := [*itertools.islice(texts, batch_size)]:
            yield {"text": batch}

    def first(self, count: int) -> "Stream":
        """The first `count` texts."""
        return Stream(
            texts=lambda: itertools.islice(self.texts(), count),
            identity=f"{self.identity} first {count}",
            remote=self.remote,
        )


def stream_documents(data: Data) -> tuple[Stream, dict[str, Stream]]:
    """(training documents, evaluation documents by name), as `load_documents` without labels.

    Where a share is held out, it is document i when i + 1 documents hold one more in `data.eval_fraction` than i do.
    """
    data = with_glue_columns(data)
    check_data_settings(data, labels=False)
    if data.eval_source is None and data.eval_split is None:
        whole = [_stream(data, source, data.split) for source in data.sources]
        train = [_share(stream, data.eval_fraction, inside=False) for stream in whole]
        none = f"data.eval_fraction={data.eval_fraction} is none to evaluate on; raise it or give data.eval_source"
        ends = zip(whole, data.sources, strict=True)
        held_out = {
            "": chained([_share(stream, data.eval_fraction, none=f"{source}: {none}") for stream, source in ends])
        }
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
    """The documents of one split of a source that have a visible character."""
    files = files_of(source)
    commit = None if files else revision(source)
    # A copy of a file, or one with another time, has the same texts.
    origin = [[form(name), file_content(name)] for name in files] if files else [source, commit, data.config]
    what = {"column": data.column, "document": data.document, "delimiter": data.delimiter, "split": split}

    def texts() -> Iterator[str]:
        with quiet_datasets():
            empty = True
            for batch in stream_rows(data, source, split, commit):
                yield from batch
                empty &= not batch
            if empty:
                raise no_documents(data, source, split)

    return Stream(texts=texts, identity=json.dumps([origin, what]), remote=not files)


def _repeated(stream: Stream, weight: float, source: str) -> Stream:
    """The documents as often as `weight` says; of its fraction, each at which another is full."""
    whole, share = divmod(weight, 1)
    none = "" if whole else f"{source}: data.weights {weight} of the documents is none; give a larger weight"
    return chained([*[stream] * int(whole), *([_share(stream, share, none=none)] if share else [])])


def _share(stream: Stream, fraction: float, *, inside: bool = True, none: str = "") -> Stream:
    """Each document at which another `fraction` is full, or all the others; ValueError(`none`) where that is none."""

    def texts() -> Iterator[str]:
        empty = True
        for index, text in enumerate(stream.texts()):
            if (math.floor((index + 1) * fraction) > math.floor(index * fraction)) == inside:
                empty = False
                yield text
        if empty and none:
            raise ValueError(none)

    return Stream(texts=texts, identity=f"{stream.identity} {inside} {fraction}", remote=stream.remote)


def chained(streams: list[Stream]) -> Stream:
    """The texts of all streams, one stream after the other."""
    return Stream(
        texts=lambda: itertools.chain.from_iterable(stream.texts() for stream in streams),
        identity=" then ".join(stream.identity for stream in streams),
        remote=any(stream.remote for stream in streams),
    )
