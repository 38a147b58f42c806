"""Encode texts into the arrays of a corpus: ids, the words that they begin, and the bytes of text that they stand for.

Axes: D documents, I ids of all of them.
"""

import itertools
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from minilm.data.encoding_errors import locate_encoding_errors
from minilm.data.special_ids import count_embedding_rows
from minilm.data.special_token_counter import SpecialTokenCounter
from minilm.data.text_bytes import count_text_bytes, measure_token_names
from minilm.data.word_boundaries import find_word_starts

_T = TypeVar("_T", bound=np.generic)


@dataclass(frozen=True, kw_only=True)
class EncodedTexts:
    """The ids of documents, one after the other."""

    sizes: NDArray[np.int64]
    """int64[D], the ids of each document."""
    ids: NDArray[np.unsignedinteger[Any]]
    """uint16[I] or uint32[I] (`TextEncoder.dtype`)."""
    is_word_start: NDArray[np.bool_] | None = None
    """bool[I], True for an id that begins a word. None if the encoder does not look for words."""
    text_bytes: NDArray[np.uint32] | None = None
    """uint32[I], the bytes of text that each id stands for. None if the encoder does not count them."""

    def first(self, count: int) -> "EncodedTexts":
        """Return the first `count` documents."""
        stop = int(self.sizes[:count].sum())
        return EncodedTexts(
            sizes=self.sizes[:count],
            ids=self.ids[:stop],
            is_word_start=None if self.is_word_start is None else self.is_word_start[:stop],
            text_bytes=None if self.text_bytes is None else self.text_bytes[:stop],
        )


class TextEncoder:
    """Encodes texts, and counts the special tokens inside them.

    before, after: the ids that surround each text.
    words: also find where words begin. text_bytes: also count the bytes of text of each id.
    name: what messages call the texts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
        *,
        words: bool = False,
        text_bytes: bool = False,
        name: str = "documents",
    ) -> None:
        self.tokenizer, self.before, self.after = tokenizer, [*before], [*after]
        self.words, self.text_bytes, self.name = words, text_bytes, name
        self.dtype = np.dtype(np.uint16 if count_embedding_rows(tokenizer) <= 2**16 else np.uint32)
        """The smallest unsigned type that holds the vocabulary."""
        self.special = SpecialTokenCounter(tokenizer)
        self._encoded = 0
        backend = tokenizer.backend_tokenizer
        if text_bytes:
            # RoBERTa's post-processor moves the ends of tokens that hold spaces.
            backend = Tokenizer.from_str(backend.to_str())
            backend.post_processor = None
            self._weight_V = measure_token_names(tokenizer)
        # A saved tokenizer may truncate and pad by itself.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
        # The faster method does not return offsets.
        self._encode_batch = backend.encode_batch if words or text_bytes else backend.encode_batch_fast

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Return the ids of the next texts. Raise ValueError that names a text which the tokenizer cannot encode."""
        with locate_encoding_errors(self.tokenizer, texts, self.name, first=self._encoded + 1):
            encodings = self._encode_batch(texts, add_special_tokens=False)
        self._encoded += len(texts)
        rows = [[*self.before, *encoding.ids, *self.after] for encoding in encodings]
        ids = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
        self.special.count(texts, rows, ids, surrounding=[*self.before, *self.after])
        word_starts, text_bytes = list[NDArray[np.bool_]](), list[NDArray[np.uint32]]()
        for text, encoding in zip(texts, encodings, strict=True) if self.words or self.text_bytes else ():
            if self.words:
                starts = find_word_starts(text, [start for start, _ in encoding.offsets])
                word_starts.append(surround(starts, self.before, self.after, True))
            if self.text_bytes:
                sizes = count_text_bytes(text, encoding.offsets, self._weight_V[encoding.ids]).astype(np.uint32)
                text_bytes.append(surround(sizes, self.before, self.after, 0))
        return EncodedTexts(
            sizes=np.fromiter(map(len, rows), np.int64, len(rows)),
            ids=ids.astype(self.dtype),
            is_word_start=np.concatenate([*word_starts, np.zeros(0, np.bool_)]) if self.words else None,
            text_bytes=np.concatenate([*text_bytes, np.zeros(0, np.uint32)]) if self.text_bytes else None,
        )


def surround(values: NDArray[_T], before: Sized, after: Sized, value: Any) -> NDArray[_T]:
    """Return the values of a text's tokens, with `value` for each token before and after the text."""
    row = np.full(len(before) + len(values) + len(after), value, values.dtype)
    row[len(before) : len(before) + len(values)] = values
    return row
