"""The texts of documents, from a dataset or a stream: read them in batches, count them and hash them."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from datasets import Dataset

from minilm.data.streaming import TextStream
from minilm.utils.cache import open_entry

# A part of every hash. Raise it when the code that encodes texts or trains tokenizers changes what it writes.
_VERSION = 5
DOCUMENTS_PER_BATCH = 2000
"""The number of documents that are read at a time. The tokenizers library spreads them over all cores."""
Documents: TypeAlias = Dataset | TextStream
"""Documents with a column `text`, and with a column `pair` if each document is a pair of texts."""


def count_documents(documents: Documents) -> int | None:
    """Return the number of documents, or None for a stream."""
    return None if isinstance(documents, TextStream) else len(documents)


def count_texts(documents: Documents) -> int | None:
    """Return the number of texts that `iterate_texts` yields, or None for a stream."""
    count = count_documents(documents)
    return None if count is None else count * len(find_text_columns(documents))


def find_text_columns(documents: Documents) -> tuple[str, ...]:
    """Return the columns that hold text: `text`, and `pair` if documents are pairs of texts."""
    pairs = not isinstance(documents, TextStream) and "pair" in documents.column_names
    return ("text", "pair") if pairs else ("text",)


def iterate_batches(documents: Documents) -> Iterator[list[str]]:
    """Yield the column `text` in batches of `DOCUMENTS_PER_BATCH` texts."""
    for batch in documents.iter(batch_size=DOCUMENTS_PER_BATCH):
        yield batch["text"]


def iterate_texts(documents: Documents) -> Iterator[str]:
    """Yield each text of all text columns."""
    for batch in documents.iter(batch_size=DOCUMENTS_PER_BATCH):
        for column in find_text_columns(documents):
            yield from batch[column]


def fingerprint_documents(documents: Documents, *settings: object, columns: Sequence[str] = ("text",)) -> str:
    """Return a hash of all texts of `columns`, or of a stream's identity, and of `settings`, as 24 hex digits.

    settings: JSON types that decide what is made of the texts.

    The texts are hashed only once. The cache keeps the hash under the fingerprint that the datasets library gives a
    dataset. The fingerprint changes when the files of the dataset change.
    """
    digest = hashlib.blake2b(json.dumps([_VERSION, *settings]).encode(), digest_size=12)
    if isinstance(documents, TextStream):
        digest.update(documents.identity.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()
    name = digest.copy()
    name.update(json.dumps([documents._fingerprint, *columns]).encode())

    def build(folder: Path) -> None:
        for batch in documents.iter(batch_size=DOCUMENTS_PER_BATCH):
            for text in itertools.chain.from_iterable(zip(*(batch[column] for column in columns), strict=True)):
                encoded = text.encode("utf-8", "surrogatepass")
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
        (folder / "fingerprint").write_text(digest.hexdigest(), encoding="utf-8")

    return (open_entry(f"fingerprint-{name.hexdigest()}", build) / "fingerprint").read_text(encoding="utf-8")
