"""The ids of a tokenizer: how many there are, which go around a text, and which a model's configuration is told."""

import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer, models
from transformers import PreTrainedTokenizerBase

log = logging.getLogger("minilm")
_NO_TOKEN = 2**32 - 1  # the largest id that the tokenizers library knows; it stands for a text
PADDING_FIELDS = ("pad_token_id", "pad_index")  # the second is XLM's
_TEXT_ROLES = ("bos", "eos", "cls", "sep", "mask")
ROLES = ("pad", *_TEXT_ROLES)


def id_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id of the tokenizer, plus one: the rows that an embedding needs.

    `len(tokenizer)` counts tokens, which are fewer where the ids have holes, as after a repeated line in a vocab.txt.
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def is_token(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.bool_]:
    """Whether each id has a token, bool[id_count]."""
    known = np.zeros(id_count(tokenizer), bool)
    known[[*tokenizer.get_vocab().values()]] = True
    return known


def unused_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id that no text gives: that of the unknown token where any byte has a token, else the one after the last."""
    spelt = "ByteLevel" in str(tokenizer.backend_tokenizer.pre_tokenizer)
    unknown = tokenizer.unk_token_id
    others = [getattr(tokenizer, f"{role}_token_id") for role in _TEXT_ROLES]
    return unknown if spelt and unknown is not None and unknown not in others else id_count(tokenizer)


def ids_around(tokenizer: PreTrainedTokenizerBase) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The special ids that the tokenizer puts before and after a single text.

    Any text that one could write might be unknown to the vocabulary, so an id that is not a token's stands for it.
    """
    ids = encode_stand_in(tokenizer).ids
    at = ids.index(_NO_TOKEN)
    return np.array(ids[:at], np.int64), np.array(ids[at + 1 :], np.int64)


def encode_stand_in(tokenizer: PreTrainedTokenizerBase, *, pair: bool = False) -> Encoding:
    """What the tokenizer's post-processor makes of a text, or pair of texts, of one id that is not a token's."""
    stand_in = Tokenizer(models.WordLevel({"a": _NO_TOKEN}, unk_token=""))
    if (post_processor := tokenizer.backend_tokenizer.post_processor) is not None:
        stand_in.post_processor = post_processor
    return stand_in.encode("a", "a" if pair else None)


def special_fields(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The special ids as fields of a configuration; None for padding's where it is another token's id too.

    Embeddings leave the row of `pad_token_id` at zero and do not train it. So it must not be the id of a token that
    stands in texts, such as the end of a text.
    """
    fields = {role: getattr(tokenizer, f"{role}_token_id") for role in ROLES}
    if fields["pad"] in [tokenizer.unk_token_id, *(fields[role] for role in _TEXT_ROLES)]:
        fields["pad"] = None
    # A tokenizer with [CLS] and [SEP] begins and ends its texts with them.
    for role, stand_in in (("bos", "cls"), ("eos", "sep")):
        if fields[role] is None:
            fields[role] = fields[stand_in]
    names = {f"{role}_token_id": fields[role] for role in ROLES}
    return {**names, **dict.fromkeys(PADDING_FIELDS, fields["pad"])}


class SpecialInTexts:
    """Which special tokens stand in texts, in how many, and which text is the first of these.

    A tokenizer takes a text such as `</s>` in a page of HTML for the token of that name.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        ids = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}  # what is unknown is no word of the text's
        self._special = np.array(sorted(ids), np.int64)
        self.texts: dict[int, int] = {}
        """By id, in how many texts it stands."""
        self.first: dict[int, tuple[int, str]] = {}
        """By id, the number of the first of these texts, from 1, and how it begins."""
        self._read = 0  # texts so far

    def count(self, texts: Sequence[str], rows: Sequence[Sequence[int]], around: Sequence[int]) -> NDArray[np.int64]:
        """Go on with texts and their rows of ids, which end with or begin by those of `around`; return all the ids."""
        ids = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
        own = [id for id in around if id in self._special]
        if np.isin(ids, self._special).sum() > len(own) * len(rows):
            special = {*self._special.tolist()}
            for number, (text, row) in enumerate(zip(texts, rows, strict=True), self._read + 1):
                for id in {*row} & special:
                    if row.count(id) > own.count(id):
                        self.texts[id] = self.texts.get(id, 0) + 1
                        self.first.setdefault(id, (number, text[:40]))
        self._read += len(texts)
        return ids

    def write(self, folder: Path) -> None:
        """Keep what was counted in `folder`."""
        counted = [[id, self.texts[id], *self.first[id]] for id in sorted(self.texts)]
        (folder / "special.json").write_text(json.dumps(counted), encoding="utf-8")


def read_special_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase, name: str) -> dict[int, tuple[int, str]]:
    """Return what `SpecialInTexts` wrote: for each id, the number of the first text with it and how that begins.

    A warning names each special token in the texts, which it calls `name`.
    """
    first = {}
    for id, count, number, text in json.loads((folder / "special.json").read_text("utf-8")):
        first[id] = (number, text)
        token = tokenizer.convert_ids_to_tokens(id)
        log.warning(
            f"{count:,} of the {name} hold the special token {token}, the first of them number {number:,}, which "
            f"begins {text!r}: change it there if it is meant as text"
        )
    return first
