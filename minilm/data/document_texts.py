"""The texts of documents, from a dataset or a stream: read in batches, counted and hashed."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from datasets import Dataset

from minilm.data.streaming import TextStream
from minilm.utils.cache import open_entry

_VERSION = 5  # of the files below in the cache
Documents: TypeAlias = Dataset | TextStream
DOCUMENTS_PER_BATCH = 2000  # documents read at a time; the tokenizers library spreads them over all cores


def count_documents(documents: Documents) -> int | None:
    """How many there are, where that is known."""
    return None if isinstance(documents, TextStream) else len(documents)


def count_texts(documents: Documents) -> int | None:
    """Return how many texts `iterate_texts` yields, where that is known."""
    count = count_documents(documents)
    return None if count is None else count * len(find_text_columns(documents))


def iterate_batches(documents: Documents) -> Iterator[list[str]]:
    """The texts, many at a time."""
    for batch in documents.iter(batch_size=DOCUMENTS_PER_BATCH):
        yield batch["text"]


def find_text_columns(documents: Documents) -> tuple[str, ...]:
    """Return the columns that hold text: `text`, and `pair` where documents are pairs of texts."""
    pairs = not isinstance(documents, TextStream) and "pair" in documents.column_names
    return ("text", "pair") if pairs else ("text",)


def iterate_texts(documents: Documents) -> Iterator[str]:
    """Yield each text of all columns."""
    for batch in documents.iter(batch_size=DOCUMENTS_PER_BATCH):
        for column in find_text_columns(documents):
            yield from batch[column]


def fingerprint_documents(documents: Documents, *rest: object, columns: Sequence[str] = ("text",)) -> str:
    """A hash of every text, or of a stream's identity, and of whatever else decides the result, as 24 hex digits.

    The texts are read once: the cache remembers the hash by the name that the datasets library gives to how they came
    about, which is another for files that changed and comes from the same cache as the texts.
    """
    digest = hashlib.blake2b(json.dumps([_VERSION, *rest]).encode(), digest_size=12)
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
