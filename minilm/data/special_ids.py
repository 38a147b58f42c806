"""The ids of a tokenizer: how many there are, which go around a text, and which a model's configuration is told."""

import logging

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer, models
from transformers import PreTrainedTokenizerBase

log = logging.getLogger("minilm")
_NO_TOKEN = 2**32 - 1  # the largest id that the tokenizers library knows; it stands for a text
PADDING_FIELDS = ("pad_token_id", "pad_index")  # the second is XLM's
_TEXT_ROLES = ("bos", "eos", "cls", "sep", "mask")
SPECIAL_ROLES = ("pad", *_TEXT_ROLES)


def count_embedding_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id of the tokenizer, plus one: the rows that an embedding needs.

    `len(tokenizer)` counts tokens, which are fewer where the ids have holes, as after a repeated line in a vocab.txt.
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def mark_used_ids(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.bool_]:
    """Whether each id has a token, bool[count_embedding_rows]."""
    known = np.zeros(count_embedding_rows(tokenizer), bool)
    known[[*tokenizer.get_vocab().values()]] = True
    return known


def find_unused_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id that no text gives: that of the unknown token where any byte has a token, else the one after the last."""
    spelt = "ByteLevel" in str(tokenizer.backend_tokenizer.pre_tokenizer)
    unknown = tokenizer.unk_token_id
    others = [getattr(tokenizer, f"{role}_token_id") for role in _TEXT_ROLES]
    return unknown if spelt and unknown is not None and unknown not in others else count_embedding_rows(tokenizer)


def find_prefix_and_suffix(tokenizer: PreTrainedTokenizerBase) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The special ids that the tokenizer puts before and after a single text.

    Any text that one could write might be unknown to the vocabulary, so an id that is not a token's stands for it.
    """
    ids = encode_placeholder(tokenizer).ids
    at = ids.index(_NO_TOKEN)
    return np.array(ids[:at], np.int64), np.array(ids[at + 1 :], np.int64)


def encode_placeholder(tokenizer: PreTrainedTokenizerBase, *, pair: bool = False) -> Encoding:
    """What the tokenizer's post-processor makes of a text, or pair of texts, of one id that is not a token's."""
    stand_in = Tokenizer(models.WordLevel({"a": _NO_TOKEN}, unk_token=""))
    if (post_processor := tokenizer.backend_tokenizer.post_processor) is not None:
        stand_in.post_processor = post_processor
    return stand_in.encode("a", "a" if pair else None)


def collect_special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The special ids as fields of a configuration; None for padding's where it is another token's id too.

    Embeddings leave the row of `pad_token_id` at zero and do not train it. So it must not be the id of a token that
    stands in texts, such as the end of a text.
    """
    fields = {role: getattr(tokenizer, f"{role}_token_id") for role in SPECIAL_ROLES}
    if fields["pad"] in [tokenizer.unk_token_id, *(fields[role] for role in _TEXT_ROLES)]:
        fields["pad"] = None
    # A tokenizer with [CLS] and [SEP] begins and ends its texts with them.
    for role, stand_in in (("bos", "cls"), ("eos", "sep")):
        if fields[role] is None:
            fields[role] = fields[stand_in]
    names = {f"{role}_token_id": fields[role] for role in SPECIAL_ROLES}
    return {**names, **dict.fromkeys(PADDING_FIELDS, fields["pad"])}
