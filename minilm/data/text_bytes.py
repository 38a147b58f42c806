"""Count the bytes of a text that each of its tokens stands for, with any kind of tokenizer.

Axes: L tokens of a text, C characters of it, S groups of tokens that share characters, V ids of a tokenizer.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from minilm.data.special_ids import count_embedding_rows


def measure_token_names(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """Return the number of characters of each token's name, int64[V]; at least 1.

    In byte-level BPE this is the number of bytes that the token stands for.
    """
    lengths = np.ones(count_embedding_rows(tokenizer), np.int64)
    for token, id in tokenizer.get_vocab().items():
        lengths[id] = max(1, len(token))
    return lengths


def count_text_bytes(text: str, spans: Sequence[tuple[int, int]], weight_L: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the UTF-8 bytes of `text` that each token stands for, int64[L]. Their sum is the length of the text.

    spans: the first character of each token, and the one after its last, as the tokenizers library returns them.
    weight_L: int64. If several tokens stand for one character, as in byte fallback, they share its bytes in proportion
        to these weights.

    A character without a token, such as a space that WordPiece drops, belongs to the next token, or to the last token
    if there is no next one.
    """
    if not spans:
        return np.zeros(0, np.int64)
    bounds_C1 = _byte_bounds(text)
    start_L, stop_L = np.array(spans, np.int64).T
    stop_L = np.maximum.accumulate(stop_L)
    stop_L[-1] = len(bounds_C1) - 1
    # A group ends with a token that has no character in common with the next.
    ends_L = np.append(start_L[1:] >= stop_L[:-1], True)
    last_S = np.flatnonzero(ends_L)
    first_S = np.append(0, last_S[:-1] + 1)
    bytes_S = np.diff(bounds_C1[stop_L[last_S]], prepend=0)
    if len(last_S) == len(spans):
        return bytes_S
    group_L = np.repeat(np.arange(len(last_S)), last_S - first_S + 1)
    total_L = np.cumsum(weight_L)
    before_S = total_L[first_S] - weight_L[first_S]
    weight_S = total_L[last_S] - before_S
    until_L = bytes_S[group_L] * (total_L - before_S[group_L]) // weight_S[group_L]
    begins_L = np.zeros(len(spans), bool)
    begins_L[first_S] = True
    bytes_L: NDArray[np.int64] = np.where(begins_L, until_L, np.diff(until_L, prepend=0))
    return bytes_L


def _byte_bounds(text: str) -> NDArray[np.int64]:
    """Return where each character begins in UTF-8, and where the last one ends, int64[C + 1]."""
    if text.isascii():
        return np.arange(len(text) + 1)
    codes_C = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    sizes_C = 1 + (codes_C >= 0x80).astype(np.int64) + (codes_C >= 0x800) + (codes_C >= 0x10000)
    return np.append(0, np.cumsum(sizes_C))
