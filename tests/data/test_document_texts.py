"""The texts of documents are hashed once, by content."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from minilm.config import Data
from minilm.data.document_texts import fingerprint_documents
from minilm.data.documents import load_documents


@pytest.mark.parametrize("document", ["line", "file"])
def test_texts_are_hashed_once_for_each_state_of_their_files(
    document: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Dataset] = []
    iterate = Dataset.iter

    def spy(documents: Dataset, *rest: Any, **options: Any) -> Iterator[Any]:
        read.append(documents)
        return iterate(documents, *rest, **options)

    monkeypatch.setattr(Dataset, "iter", spy)
    file = tmp_path / "text.txt"

    def keys() -> list[str]:
        documents, held_out = load_documents(Data(source=str(file), document=document, eval_fraction=0.5), seed=1)
        read.clear()
        return [
            fingerprint_documents(documents),
            fingerprint_documents(held_out[""]),
            fingerprint_documents(documents, 7),
        ]

    def write(text: str, seconds: int) -> None:
        file.write_text(text)
        os.utime(file, (seconds, seconds))

    write("one line\nan other\n", 1)
    first = keys()
    assert len(set(first)) == len(read) == 3
    assert keys() == first
    assert read == []
    write("two line\nor other\n", 1)  # the same size and time
    assert len({*first, *keys()}) == 6
    write("one line\nan other\n", 3)
    assert keys() == first  # the keys depend on the content alone
    assert {path.name.partition("-")[0] for path in cache.iterdir()} == {"fingerprint", "rows"}


def test_the_hash_depends_on_the_columns_and_their_order(cache: Path) -> None:
    documents = Dataset.from_dict({"text": ["one", "two"], "pair": ["two", "one"]})
    choices = (("text",), ("pair",), ("text", "pair"), ("pair", "text"))
    keys = [fingerprint_documents(documents, columns=columns) for columns in choices]
    assert len(set(keys)) == 4
    assert [fingerprint_documents(documents, columns=columns) for columns in choices] == keys
    assert fingerprint_documents(documents.select_columns("text")) == keys[0]
