"""The ids of a tokenizer: the largest, those that surround a text, and those that a model's configuration names.

Axes: V ids of a tokenizer.
"""

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
