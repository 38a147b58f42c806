"""Datasets on the hub, loaded with the datasets library."""

from typing import Any

import datasets

from minilm.utils.cache import get_cache_folder


def load_from_hub(path: str, *, name: str | None, split: str, revision: str | None, streaming: bool) -> Any:
    """Return the rows of a split, a `Dataset`, or an `IterableDataset` if `streaming`.

    name: the configuration. revision: a commit; None for the newest.

    If the hub fails, the library takes the newest copy in its cache, whatever its commit. Its log is the only sign. A
    stream never reads such a copy, whose files and groups of rows are others than those of the hub. Raise the errors
    of the library, which are of many types.
    """
    # A cache of its own, in which no dataset is ever stored, leaves the library no copy to fall back on.
    cache = str(get_cache_folder() / "streams") if streaming else None
    builder = datasets.load_dataset_builder(path, name=name, revision=revision, cache_dir=cache)
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)
