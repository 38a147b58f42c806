"""Count the special tokens that texts hold, and warn of them.

A tokenizer takes a text such as `</s>` in a page of HTML for the special token of that name.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

log = logging.getLogger("minilm")


class SpecialTokenCounter:
    """Counts the texts that hold each special token, and remembers the first of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # The unknown token stands for ordinary text.
        self._special = np.array(sorted({*tokenizer.all_special_ids} - {tokenizer.unk_token_id}), np.int64)
        self._texts: dict[int, int] = {}
        """The number of texts with each special id."""
        self._first: dict[int, tuple[int, str]] = {}
        """For each special id, the number of the first text with it, from 1, and how that text begins."""
        self._read = 0
        """The number of texts so far."""

    def count(
        self,
        texts: Sequence[str],
        rows: Sequence[Sequence[int]],
        ids: NDArray[np.int64],
        *,
        surrounding: Sequence[int] = (),
    ) -> None:
        """Count the special tokens of the next texts.

        rows: the ids of each text. `ids` holds the same ids in one array.
        surrounding: the ids that were added around each text. They are not counted.
        """
        added = [id for id in surrounding if id in self._special]
        # Most batches hold no other special token. One comparison for the whole batch finds that out.
        if np.isin(ids, self._special).sum() > len(added) * len(rows):
            special = {*self._special.tolist()}
            for number, (text, row) in enumerate(zip(texts, rows, strict=True), self._read + 1):
                for id in {*row} & special:
                    if row.count(id) > added.count(id):
                        self._texts[id] = self._texts.get(id, 0) + 1
                        self._first.setdefault(id, (number, text[:40]))
        self._read += len(texts)

    def write(self, folder: Path) -> None:
        """Write the counts to `special.json` in `folder`, for `read_special_tokens`."""
        counts = [[id, self._texts[id], *self._first[id]] for id in sorted(self._texts)]
        (folder / "special.json").write_text(json.dumps(counts), encoding="utf-8")


def read_special_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase, name: str) -> dict[int, tuple[int, str]]:
    """Read what a `SpecialTokenCounter` wrote, and warn of each special token in the texts.

    Return the number of the first text with each special id, from 1, and how that text begins. The warnings call the
    texts `name`.
    """
    first = {}
    for id, count, number, text in json.loads((folder / "special.json").read_text("utf-8")):
        first[id] = (number, text)
        token = tokenizer.convert_ids_to_tokens(id)
        log.warning(
            f"{count:,} of the {name} hold the special token {token}. The first is number {number:,}, which begins "
            f"{text!r}. If the token is meant as text, write it differently there."
        )
    return first
