"""From documents to token ids: encode once into a corpus on disk, and view it as examples.

A corpus is every document's ids one after the other, without special tokens, in one flat file. Layout and maximum
length are views of it, so changing them encodes nothing again.
"""

from array import array
from collections.abc import Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from minilm.data.array_file import ArrayFile, create_array_file
from minilm.data.document_texts import Documents, count_documents, fingerprint_documents, iterate_batches
from minilm.data.encoding_errors import locate_encoding_errors
from minilm.data.labels import Labels
from minilm.data.special_ids import count_embedding_rows, find_prefix_and_suffix
from minilm.data.special_token_counter import SpecialTokenCounter, read_special_tokens
from minilm.data.text_bytes import count_text_bytes, measure_token_names
from minilm.data.word_boundaries import find_word_starts
from minilm.utils.cache import open_entry
from minilm.utils.progress import show_progress

_T = TypeVar("_T", bound=np.generic)
_CHUNK = 2**20  # documents that are cut into examples at a time


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Token ids by example: row i is `prefix + ids[start[i]:stop[i]] + suffix`.

    `ids` is a flat array of integers in the order of the documents; `start` and `stop` are int64 arrays.
    """

    ids: NDArray[np.integer] | ArrayFile
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    prefix: NDArray[np.int64]
    suffix: NDArray[np.int64]
    type_ids: NDArray[np.uint8] | ArrayFile | None = None
    """Which of two texts each of `ids` is of, where the model is told."""
    labels: NDArray[Any] | None = None
    """Of each example, where it is classified: int64[E], or float32[E] or [E, C]."""
    fingerprint: str = ""
    """A hash of the documents and the tokenizer that they were encoded by."""
    is_word_start: NDArray[np.bool_] | ArrayFile | None = None
    """Whether each of `ids` begins a word; None where nobody asked."""
    text_bytes: NDArray[np.integer] | ArrayFile | None = None
    """UTF-8 bytes of the text that each of `ids` stands for; None where nobody asked."""
    special_tokens: dict[int, tuple[int, str]] = field(default_factory=dict)
    """By id of a special token in the texts, the number of the first such text, from 1, and how it begins."""

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        middle = self.ids[self.start[index] : self.stop[index]]
        return np.concatenate((self.prefix, middle, self.suffix), dtype=np.int64, casting="same_kind")

    def token_type_ids(self, index: int) -> NDArray[np.int64]:
        """The token types of an example, where there are `types`."""
        assert self.type_ids is not None
        return self.type_ids[self.start[index] : self.stop[index]].astype(np.int64)

    def word_starts(self, index: int) -> NDArray[np.bool_]:
        """Whether each token of row `index` begins a word there; a word that was cut goes on as one of its own."""
        assert self.is_word_start is not None
        start, stop = self.start[index], self.stop[index]
        begins = self.is_word_start[start:stop].copy()
        # A cut word begins again.
        begins[:1] = True
        return _surround(begins, self.prefix, self.suffix, True)

    def token_bytes(self, index: int) -> NDArray[np.int64]:
        """UTF-8 bytes of the text that each token of row `index` stands for, 0 of what goes around a text."""
        assert self.text_bytes is not None
        sizes = self.text_bytes[self.start[index] : self.stop[index]].astype(np.int64)
        return _surround(sizes, self.prefix, self.suffix, 0)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, special tokens included."""
        return self.stop - self.start + (len(self.prefix) + len(self.suffix))

    def identity(self) -> dict[str, Any]:
        """What tells these examples from others, as JSON types."""
        return {"examples": len(self), "tokens": int(self.lengths.sum()), "fingerprint": self.fingerprint}

    def count_ids(self, vocab_size: int) -> NDArray[np.int64]:
        """How often each id occurs in the documents and between them; int64[vocab_size]."""
        total = np.zeros(vocab_size, np.int64)
        for at in range(0, len(self.ids), 2**22):
            total += np.bincount(self.ids[at : at + 2**22], minlength=vocab_size)
        return total


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """What a run works on."""

    tokenizer: PreTrainedTokenizerBase
    train: Examples
    eval: Examples
    labels: Labels | None = None
    """What the labels mean, where there are any."""
    eval_parts: dict[str, int] = field(default_factory=dict)
    """How many of the evaluation examples are of each part of them, in this order."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's configuration that follow from the data, such as the names of its labels."""


def encode(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    layout: str = "documents",
    overflow: str = "split",
    causal: bool = False,
    words: bool = False,
    text_bytes: bool = False,
    name: str = "documents",
    enough: int | None = None,
) -> Examples:
    """Encode the column `text` and cut it into examples of at most `max_length` tokens, special tokens included.

    `documents`: one example a document; a longer one is split into pieces of nearly equal length, or truncated.
    `blocks`: all documents joined by the tokenizer's separator, cut into full blocks; the last one may be shorter.
    Special tokens begin and end every example; those of `causal` LM every document, wherever it is then cut.
    The ids are cached by content (of a stream by its identity), so that a second run starts at once; with `words`, also
    where words begin, and with `text_bytes` the bytes of text that each stands for. A warning says where texts hold
    special tokens. Once there are `enough` ids, without those that are truncated, no more documents are read.
    """
    prefix, suffix = find_prefix_and_suffix(tokenizer)
    before, after = prefix[:0], suffix[:1] if layout == "blocks" else suffix[:0]
    if causal:
        before, after = prefix, suffix if len(suffix) else np.array([tokenizer.eos_token_id], np.int64)
        prefix, suffix = prefix[:0], suffix[:0]
    room = max_length - len(prefix) - len(suffix)
    around = before.tolist(), after.tolist()
    most = room if enough and layout != "blocks" and overflow == "truncate" else None
    splits = tokenizer.split_special_tokens  # which the backend's state does not say
    key = fingerprint_documents(documents, tokenizer.backend_tokenizer.to_str(), splits, *around, enough, most)
    kind = "-".join(["corpus", *["words"] * words, *["bytes"] * text_bytes, key])
    folder = open_entry(
        kind, lambda folder: _write_ids(folder, documents, tokenizer, *around, words, text_bytes, name, enough, most)
    )
    ids = ArrayFile(folder / "ids.npy")
    is_word_start = ArrayFile(folder / "begins.npy") if words else None
    sizes = ArrayFile(folder / "bytes.npy") if text_bytes else None
    special_tokens = read_special_tokens(folder, tokenizer, name)
    start, stop = _examples_of(np.load(folder / "offsets.npy"), room, layout, overflow)
    if len(start) == 0:
        raise ValueError(f"the {name} hold no token that could be a target: every document is empty once encoded")
    return Examples(
        ids=ids,
        start=start,
        stop=stop,
        prefix=prefix,
        suffix=suffix,
        fingerprint=key,
        is_word_start=is_word_start,
        text_bytes=sizes,
        special_tokens=special_tokens,
    )


def _examples_of(
    offsets: NDArray[np.int64], room: int, layout: str, overflow: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the examples that hold an id begin and end, of at most `room` ids."""
    if layout == "blocks":
        start = np.arange(0, offsets[-1], room)
        stop = np.minimum(start + room, offsets[-1])
    elif overflow == "truncate":
        start, stop = offsets[:-1], np.minimum(offsets[1:], offsets[:-1] + room)
    else:
        # Some documents at a time: what is computed on the way takes several times the memory of what comes of it.
        parts = [_pieces(offsets[at : at + _CHUNK + 1], room) for at in range(0, len(offsets), _CHUNK)]
        start, stop = (np.concatenate(side) for side in zip(*parts, strict=True))
    keep = stop > start
    return (start, stop) if keep.all() else (start[keep], stop[keep])


def _pieces(offsets: NDArray[np.int64], room: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut each document into the fewest pieces of at most `room` ids, as equal in length as they can be."""
    sizes = np.diff(offsets)
    pieces = -(-sizes // room)
    document = np.repeat(np.arange(len(sizes)), pieces)
    order = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # 0, 1, … inside each document
    cut = offsets[document] + order * sizes[document] // pieces[document]
    return cut, offsets[document] + (order + 1) * sizes[document] // pieces[document]


def _write_ids(
    folder: Path,
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    before: list[int],
    after: list[int],
    words: bool,
    text_bytes: bool,
    name: str,
    enough: int | None = None,
    most: int | None = None,
) -> None:
    """Write `ids.npy`, flat, in the smallest unsigned type that holds the vocabulary, and `offsets.npy`, int64.

    `before` and `after` go around each document; reading ends once there are `enough` ids, of a document at most `most`
    counted. With `words`, write `begins.npy` too: bool, which ids begin a word; with `text_bytes`, `bytes.npy`: uint32,
    the bytes of text that each stands for. Which special tokens are in the texts is written beside.
    """
    kind = np.uint16 if count_embedding_rows(tokenizer) <= 2**16 else np.uint32
    backend = tokenizer.backend_tokenizer
    if text_bytes:  # RoBERTa's post-processor moves the ends of tokens that are spaces
        backend = Tokenizer.from_str(backend.to_str())
        backend.post_processor = None
        weight_V = measure_token_names(tokenizer)
    backend.no_truncation()  # what it was saved with is not what it is
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    # The fast one does not know places.
    encode_batch = backend.encode_batch if words or text_bytes else backend.encode_batch_fast
    sizes, counted, special = array("q", [0]), 0, SpecialTokenCounter(tokenizer)
    with (
        create_array_file(folder / "ids.npy", np.dtype(kind)) as file,
        create_array_file(folder / "begins.npy", np.dtype(bool)) as begins_file,
        create_array_file(folder / "bytes.npy", np.dtype(np.uint32)) as bytes_file,
        show_progress(total=count_documents(documents), desc=f"encoding {name}", unit="doc", leave=False) as bar,
    ):
        for texts in iterate_batches(documents):
            with locate_encoding_errors(tokenizer, texts, name, first=len(sizes)):
                encodings = encode_batch(texts, add_special_tokens=False)
            rows = [[*before, *encoding.ids, *after] for encoding in encodings]
            sizes.extend(map(len, rows))
            file.write(special.count(texts, rows, [*before, *after]).astype(kind).data)
            for text, encoding in zip(texts, encodings, strict=True):
                if words:
                    begins = find_word_starts(text, [start for start, _ in encoding.offsets])
                    begins_file.write(_surround(begins, before, after, True).data)
                if text_bytes:
                    sizes_L = count_text_bytes(text, encoding.offsets, weight_V[encoding.ids]).astype(np.uint32)
                    bytes_file.write(_surround(sizes_L, before, after, 0).data)
            bar.update(len(texts))
            counted += sum(min(len(row), most or len(row)) for row in rows) if enough else 0
            if enough and counted >= enough:
                break
    np.save(folder / "offsets.npy", np.cumsum(sizes, dtype=np.int64))
    special.write(folder)


def _surround(values: NDArray[_T], before: Sized, after: Sized, value: Any) -> NDArray[_T]:
    """Return the values of a text's tokens with `value` for each of the tokens before and after them."""
    row = np.full(len(before) + len(values) + len(after), value, values.dtype)
    row[len(before) : len(before) + len(values)] = values
    return row
