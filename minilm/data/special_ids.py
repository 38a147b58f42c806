"""The ids of a tokenizer: the largest, those that surround a text, and those that a model's configuration names.

Axes: V ids of a tokenizer.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer, models
from transformers import PreTrainedTokenizerBase

# The largest id that the tokenizers library accepts. It stands for a text, since it is not a token's id.
_PLACEHOLDER_ID = 2**32 - 1
PADDING_FIELDS = ("pad_token_id", "pad_index")
"""Fields of a model's configuration that hold the id of padding. XLM uses the second."""
_TEXT_ROLES = ("bos", "eos", "cls", "sep", "mask")
SPECIAL_ROLES = ("pad", *_TEXT_ROLES)
"""The special tokens for which a model's configuration may have a field `{role}_token_id`."""


def count_embedding_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of rows that an embedding needs: the largest id of the tokenizer plus one.

    `len(tokenizer)` counts the tokens instead. There are fewer if some ids have no token, for example because of a
    repeated line in a vocab.txt.
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def mark_used_ids(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.bool_]:
    """Return whether each id has a token, bool[V], with `count_embedding_rows` for V."""
    used_V = np.zeros(count_embedding_rows(tokenizer), bool)
    used_V[[*tokenizer.get_vocab().values()]] = True
    return used_V


def find_unused_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return an id that no text is encoded to.

    If every byte has a token, no text is unknown, so this is the id of the unknown token. Otherwise it is the id after
    the largest.
    """
    unknown: int | None = tokenizer.unk_token_id
    has_all_bytes = "ByteLevel" in str(tokenizer.backend_tokenizer.pre_tokenizer)
    others = [getattr(tokenizer, f"{role}_token_id") for role in _TEXT_ROLES]
    if has_all_bytes and unknown is not None and unknown not in others:
        return unknown
    return count_embedding_rows(tokenizer)


def find_prefix_and_suffix(tokenizer: PreTrainedTokenizerBase) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the special ids that the tokenizer puts before and after a single text, two int64 arrays."""
    ids = encode_placeholder(tokenizer).ids
    at = ids.index(_PLACEHOLDER_ID)
    return np.array(ids[:at], np.int64), np.array(ids[at + 1 :], np.int64)


@dataclass(frozen=True)
class PairRow:
    """A row of tokens with two texts."""

    ids: list[int]
    type_ids: list[int]
    first: int
    """The places at which the two texts begin."""
    second: int
    special_places: list[int]
    """The places of the special tokens around the texts."""


@dataclass(frozen=True)
class PairTemplate:
    """The special tokens that a tokenizer puts around two texts, and the token types."""

    ids: list[int]
    """The special tokens, with a placeholder for each text."""
    type_ids: list[int]

    @property
    def special_count(self) -> int:
        """The number of special tokens."""
        return len(self.ids) - 2

    def fill(self, first: list[int], second: list[int]) -> PairRow:
        """Return the row of two texts, given by their ids."""
        at = self.ids.index(_PLACEHOLDER_ID)
        after = self.ids.index(_PLACEHOLDER_ID, at + 1)
        lengths = [1] * len(self.ids)
        lengths[at], lengths[after] = len(first), len(second)
        ends = [*itertools.accumulate(lengths, initial=0)]
        return PairRow(
            ids=[*self.ids[:at], *first, *self.ids[at + 1 : after], *second, *self.ids[after + 1 :]],
            type_ids=[kind for kind, length in zip(self.type_ids, lengths, strict=True) for _ in range(length)],
            first=ends[at],
            second=ends[after],
            special_places=[ends[place] for place in range(len(self.ids)) if place not in (at, after)],
        )


def find_pair_template(tokenizer: PreTrainedTokenizerBase) -> PairTemplate:
    """Return the special tokens and the token types that the tokenizer gives to a pair of texts."""
    encoded = encode_placeholder(tokenizer, pair=True)
    return PairTemplate(encoded.ids, encoded.type_ids)


def encode_placeholder(tokenizer: PreTrainedTokenizerBase, *, pair: bool = False) -> Encoding:
    """Return what the tokenizer's post-processor adds to a placeholder for a text, or for a pair of texts.

    A real text would not do, since the vocabulary may not be able to encode it. The placeholder is one id without a
    token.
    """
    placeholder = Tokenizer(models.WordLevel({"a": _PLACEHOLDER_ID}, unk_token=""))
    if (post_processor := tokenizer.backend_tokenizer.post_processor) is not None:
        placeholder.post_processor = post_processor
    return placeholder.encode("a", "a" if pair else None)


def collect_special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """Return the special ids as fields of a model's configuration; None if the tokenizer lacks the token.

    The fields of padding are also None if another special token has the same id. An embedding sets the row of
    `pad_token_id` to zero and does not train it. So this must not be the id of a token that texts hold, such as the one
    that ends a text.
    """
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in SPECIAL_ROLES}
    if ids["pad"] in [tokenizer.unk_token_id, *(ids[role] for role in _TEXT_ROLES)]:
        ids["pad"] = None
    # A tokenizer with [CLS] and [SEP] begins and ends its texts with them.
    for role, substitute in (("bos", "cls"), ("eos", "sep")):
        if ids[role] is None:
            ids[role] = ids[substitute]
    return {**{f"{role}_token_id": ids[role] for role in SPECIAL_ROLES}, **dict.fromkeys(PADDING_FIELDS, ids["pad"])}
