"""Masked LM: which tokens are chosen, what takes their place, and what a model of this kind is for.

Axes: T tokens of the micro-batch, N targets of the micro-batch.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from minilm.batch import Batch, join
from minilm.config import MaskedLM
from minilm.infer import check_masks, fill_mask
from minilm.language import LanguageModel
from minilm.tokens import Examples

_Hashes = NDArray[np.uint64]


class MaskedCollator:
    """Masks rows of token ids and joins them.

    Whether a token is chosen, and what becomes of it, is a hash of (seed, epoch, example, position): it does not depend
    on the batch, the process or the order in which anything is drawn. Special tokens are never chosen and never drawn
    as replacements. `padded` and `multiple` are those of `minilm.plan.Plan`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rate: float,
        seed: int,
        padded: bool = False,
        multiple: int = 1,
    ) -> None:
        if tokenizer.mask_token_id is None:
            name = tokenizer.name_or_path or "this one"
            raise ValueError(f"the tokenizer {name} has no mask token; masked LM needs one: pass --tokens.name")
        vocabulary = len(tokenizer)
        self.possible = np.ones(vocabulary, bool)
        self.possible[tokenizer.all_special_ids] = False
        self.replacements = np.flatnonzero(self.possible)
        self.mask_id = tokenizer.mask_token_id
        self.rate, self.seed, self.padded, self.multiple = rate, seed, padded, multiple

    def __call__(self, rows: Sequence[NDArray[np.int64]], examples: NDArray[np.int64], epoch: int) -> Batch:
        """`rows[i]`: the ids of example `examples[i]`."""
        ids_T, packing = join(rows, padded=self.padded, multiple=self.multiple)
        index_N = new_N = np.zeros(0, np.int64)
        if rows:
            example_T = np.repeat(examples, [len(row) for row in rows])
            index_N, new_N = self._choose(ids_T, packing.position_T.numpy(), example_T, epoch)
        targets_N = ids_T[index_N]
        ids_T[index_N] = new_N
        return Batch(
            input_ids_T=torch.from_numpy(ids_T),
            packing=packing,
            target_index_N=torch.from_numpy(index_N),
            target_ids_N=torch.from_numpy(targets_N),
        )

    def _choose(
        self, ids_T: NDArray[np.int64], position_T: NDArray[np.int64], example_T: NDArray[np.int64], epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of the T tokens are targets, and the ids that take their place in the input."""
        key = _mix(_mix(np.array([self.seed], np.uint64)) + np.uint64(epoch))
        hash_T = _mix(_mix(_mix(key + example_T.astype(np.uint64)) ^ key) + position_T.astype(np.uint64))
        index_N = np.flatnonzero((_uniform(hash_T) < self.rate) & self.possible[ids_T])
        fate_N = _mix(hash_T[index_N])
        uniform_N = _uniform(fate_N)
        # Multiply and shift maps 32 hash bits to a range without the bias of a modulus that matters (Lemire 2019).
        draw_N = (_mix(fate_N) >> np.uint64(32)) * np.uint64(len(self.replacements)) >> np.uint64(32)
        new_N = np.where(uniform_N < 0.8, self.mask_id, self.replacements[draw_N.astype(np.int64)])
        return index_N, np.where(uniform_N < 0.9, new_N, ids_T[index_N])


def _mix(x: _Hashes) -> _Hashes:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014, figure 17), on a stepped counter."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform(x: _Hashes) -> NDArray[np.float64]:
    """The top 53 bits as a float64 in [0, 1)."""
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Masked(LanguageModel):
    """Masked LM."""

    auto, causal, pipeline, title = AutoModelForMaskedLM, False, "fill-mask", "masked language model"

    def __init__(self, settings: MaskedLM) -> None:
        self.settings = settings
        self.predicted = f"{settings.eval_rate:.0%} of the tokens"

    def collator(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        seed: int | None,
        padded: bool = False,
        multiple: int = 1,
    ) -> MaskedCollator:
        rate, key = (self.settings.eval_rate, 2**63) if seed is None else (self.settings.rate, seed)
        return MaskedCollator(tokenizer, rate=rate, seed=key, padded=padded, multiple=multiple)

    def check(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        check_masks(network, tokenizer, texts)

    def sample(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        best = fill_mask(network, tokenizer, [text], top_k=3)[0][0]
        return ", ".join(f"{fill.token} ({fill.probability:.0%})" for fill in best)

    def command(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
        return f'minilm fill-mask {folder} "… {tokenizer.mask_token} …"'
