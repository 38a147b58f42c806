"""Count the special tokens that stand in texts, and warn of them."""

import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

log = logging.getLogger("minilm")


class SpecialTokenCounter:
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
    """Return what `SpecialTokenCounter` wrote: for each id, the number of the first text with it and how that begins.

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
