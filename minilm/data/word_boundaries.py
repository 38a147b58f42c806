"""Find where words begin in a text, for masks of whole words. The words do not depend on the tokenizer.

Axes: C characters of a text, L tokens of it.
"""

import functools
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ASCII_SIGNS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
# The blocks of Unicode that BERT's released tokenizer takes for Chinese characters.
_IDEOGRAPHS = (
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF)),
    *((0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0x2F800, 0x2FA1F)),
)


@functools.cache
def _classify_characters() -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return, for each code point, whether it is white space and whether it is a word by itself; two bool[0x110000]."""
    characters = [chr(code) for code in range(0x110000)]
    space = np.fromiter((character.isspace() for character in characters), bool)
    alone = np.fromiter((unicodedata.category(character)[0] == "P" for character in characters), bool)
    alone[[ord(sign) for sign in _ASCII_SIGNS]] = True
    for first, last in _IDEOGRAPHS:
        alone[first : last + 1] = True
    return space, alone


def find_word_starts(text: str, starts: Sequence[int]) -> NDArray[np.bool_]:
    """Return whether each token of `text` begins a word, bool[L].

    starts: the index of the first character of each token.

    The words are those of BERT's BasicTokenizer (Devlin et al. 2019, released code): white space ends a word, and each
    punctuation mark and each Chinese character is a word. White space belongs to the word after it, as in most
    vocabularies. The tokenizer's own words would not do: byte-level BPE and SentencePiece take a Japanese clause for
    one word.
    """
    if not len(starts):
        return np.zeros(0, bool)
    codes_C = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    space_C, alone_C = (kind[codes_C] for kind in _classify_characters())
    after_space_C, after_alone_C = (np.concatenate(([False], kind_C[:-1])) for kind_C in (space_C, alone_C))
    word_C = np.cumsum(~after_space_C & (space_C | alone_C | after_alone_C))
    word_L = word_C[np.minimum(starts, len(word_C) - 1)]
    is_start_L: NDArray[np.bool_] = np.diff(word_L, prepend=-1) != 0
    return is_start_L
