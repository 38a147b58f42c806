"""A stand-in for the hub inside one process: the datasets library loads what a function returns."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from huggingface_hub import HfApi

COMMIT = "abc"


def replace_hub(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    """Let `load(path, name=..., split=..., revision=..., streaming=...)` return the rows of each dataset on the hub."""

    def open_builder(path: str, *, name: str | None, revision: str | None, cache_dir: str | None) -> SimpleNamespace:
        def rows(streaming: bool) -> Callable[[str], Any]:
            return lambda split: load(path, name=name, split=split, revision=revision, streaming=streaming)

        return SimpleNamespace(
            hash=revision,
            info=SimpleNamespace(builder_name="parquet"),
            as_streaming_dataset=rows(True),
            as_dataset=rows(False),
            download_and_prepare=lambda: None,
        )

    monkeypatch.setattr(datasets, "load_dataset_builder", open_builder)
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, timeout: SimpleNamespace(sha=COMMIT))
