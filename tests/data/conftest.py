"""Tokenizers and an empty cache for the tests of this folder."""

from pathlib import Path

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from minilm.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="session")
def wordpiece(documents: Dataset) -> PreTrainedTokenizerBase:
    """A lower-cased WordPiece tokenizer trained on the documents."""
    return train_tokenizer(documents, "wordpiece", 150)


@pytest.fixture(params=["tokenizer", "wordpiece", "unigram"])
def each_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """A tokenizer of each kind in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "minilm"
