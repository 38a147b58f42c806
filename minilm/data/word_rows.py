"""Rows of tokens for sentences that are given as words: which word each token belongs to, and pieces of long rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from minilm.data.encoding_errors import locate_encoding_errors
from minilm.data.special_ids import encode_placeholder, find_prefix_and_suffix


@dataclass(frozen=True, kw_only=True)
class WordRow:
    """A row of tokens with whole words of a sentence."""

    ids: list[int]
    """The token ids, special tokens included."""
    type_ids: list[int] | None
    """The token types, or None if the tokenizer's models take none."""
    words: list[int | None]
    """For each token, the number of the word that it is the first token of, from 0; None for every other token."""


@dataclass(frozen=True, kw_only=True)
class EncodedWords:
    """A sentence as rows of tokens."""

    rows: list[WordRow]
    """One for a sentence that is short enough; none if no word has a token."""
    missing: int
    """The number of words without a token of their own."""
    cut: int
    """The number of words that are too long for a row and have lost their ends."""


def encode_words(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[Sequence[str]], max_length: int
) -> Iterator[EncodedWords]:
    """Yield each sentence as rows of at most `max_length` tokens. Long sentences are split between words.

    The tokens are those of the words joined by spaces, which is how a text reaches the trained model. For tokenizers
    that take words (`is_split_into_words`), they are the same. A token that holds parts of two words, or the space
    before a word, counts for the word in which it begins. The space before a word is a part of it.

    Raise ValueError if the tokenizer cannot encode a sentence.
    """
    texts = [" ".join(words) for words in sentences]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    with locate_encoding_errors(tokenizer, texts):
        encoded = backend.encode_batch(texts, add_special_tokens=False)
    before, after = (ids.tolist() for ids in find_prefix_and_suffix(tokenizer))
    types = encode_placeholder(tokenizer).type_ids
    takes_types = "token_type_ids" in tokenizer.model_input_names
    room = max_length - len(before) - len(after)
    for words, encoding in zip(sentences, encoded, strict=True):
        ends_W = np.cumsum([len(word) + 1 for word in words]) - 1
        starts_L = np.array([start for start, _ in encoding.offsets], np.int64)
        # A token at the very end of the text, without a character, still belongs to the last word.
        word_L = np.minimum(np.searchsorted(ends_W, starts_L, side="right"), len(words) - 1)
        (first_F,) = np.diff(word_L, prepend=-1).nonzero()
        rows, cut = [], 0
        for start, stop in _split_between_words(first_F, len(word_L), room):
            cut += stop - start > room
            own = slice(start, min(stop, start + room))
            numbers: list[int | None] = [None] * len(word_L[own])
            for place in first_F[(first_F >= own.start) & (first_F < own.stop)]:
                numbers[place - start] = int(word_L[place])
            kinds = [*types[: len(before)], *types[len(before) : len(before) + 1] * len(numbers)]
            kinds += types[len(before) + 1 :]
            rows.append(
                WordRow(
                    ids=[*before, *encoding.ids[own], *after],
                    type_ids=kinds if takes_types else None,
                    words=[*[None] * len(before), *numbers, *[None] * len(after)],
                )
            )
        yield EncodedWords(rows=rows, missing=len(words) - len(first_F), cut=cut)


def _split_between_words(first_F: NDArray[np.int64], count: int, room: int) -> Iterator[tuple[int, int]]:
    """Yield where pieces of nearly equal length start and stop. A piece exceeds `room` only if it is a single word.

    first_F: the first token of each word that has one. count: the number of all tokens.
    """
    ends_F = np.append(first_F[1:], count)
    start = 0
    while start < count:
        left = count - start
        size = -(-left // -(-left // room))
        # The last word that ends inside the piece, or else the first one that ends after its beginning.
        fitting = int(np.searchsorted(ends_F, start + size, side="right")) - 1
        stop = int(ends_F[max(fitting, int(np.searchsorted(ends_F, start, side="right")))])
        yield start, stop
        start = stop
