"""Objectives: rows of token ids in, a padded batch with its targets out, and the loss as a sum over targets.

Axes: B rows of the micro-batch, L padded length, N targets of the micro-batch, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from minilm.config import MaskedLM

_Hashes = NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch on its way to the model."""

    input_ids_BxL: Tensor
    """int64, padded to the longest row."""
    attention_mask_BxL: Tensor | None
    """int64, 1 for a token and 0 for padding; None where no row is padded."""
    target_index_N: Tensor
    """int64, where the targets are: positions in the flattened B x L."""
    target_ids_N: Tensor
    """int64, the ids to predict there."""

    @property
    def targets(self) -> int:
        """Number of targets; read from the shape, so that asking never waits for a device."""
        return self.target_ids_N.shape[0]

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; the copy from pinned memory does not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory (called by DataLoader)."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        mask_BxL = self.attention_mask_BxL
        return Batch(
            input_ids_BxL=change(self.input_ids_BxL),
            attention_mask_BxL=None if mask_BxL is None else change(mask_BxL),
            target_index_N=change(self.target_index_N),
            target_ids_N=change(self.target_ids_N),
        )


class MaskedCollator:
    """Masks and pads rows of token ids.

    Whether a token is chosen, and what becomes of it, is a hash of (seed, epoch, example, position): it does not depend
    on the batch, the padding, the process or the order in which anything is drawn. Special tokens are never chosen and
    never drawn as replacements.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, rate: float, seed: int, multiple: int = 1) -> None:
        if tokenizer.mask_token_id is None:
            name = tokenizer.name_or_path or "this one"
            raise ValueError(f"the tokenizer {name} has no mask token; masked LM needs one: pass --tokens.name")
        vocabulary = len(tokenizer)
        self.ordinary = np.ones(vocabulary, bool)
        self.ordinary[tokenizer.all_special_ids] = False
        self.replacements = np.flatnonzero(self.ordinary)
        self.mask_id, self.pad_id = tokenizer.mask_token_id, tokenizer.pad_token_id
        self.rate, self.seed, self.multiple = rate, seed, multiple

    def __call__(self, rows: Sequence[NDArray[np.int64]], examples: NDArray[np.int64], epoch: int) -> Batch:
        """`rows[i]`: the ids of example `examples[i]`. No rows give one row of padding without a target, so that a
        process that has nothing to do in a step can still join its collectives."""
        sizes = np.array([len(row) for row in rows] or [1], np.int64)
        width = -(-int(sizes.max()) // self.multiple) * self.multiple
        ids_BxL = np.full((len(sizes), width), self.pad_id, np.int64)
        real_BxL = np.arange(width) < sizes[:, None]
        if rows:
            ids_BxL[real_BxL] = np.concatenate(rows)
            index_N, new_N = self._choose(ids_BxL, real_BxL, examples.astype(np.uint64), epoch)
        else:
            index_N = new_N = np.zeros(0, np.int64)
        flat = ids_BxL.reshape(-1)
        targets_N = flat[index_N]
        flat[index_N] = new_N
        return Batch(
            input_ids_BxL=torch.from_numpy(ids_BxL),
            attention_mask_BxL=None if real_BxL.all() else torch.from_numpy(real_BxL.astype(np.int64)),
            target_index_N=torch.from_numpy(index_N),
            target_ids_N=torch.from_numpy(targets_N),
        )

    def _choose(
        self, ids_BxL: NDArray[np.int64], real_BxL: NDArray[np.bool_], examples_B: _Hashes, epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Flat positions of the targets, and the ids that take their place in the input."""
        key = _mix(_mix(np.array([self.seed], np.uint64)) + np.uint64(epoch))
        row_B = _mix(_mix(key + examples_B) ^ key)
        position_L = np.arange(ids_BxL.shape[1], dtype=np.uint64)
        hash_BxL = _mix(row_B[:, None] + position_L)
        chosen_BxL = (_uniform(hash_BxL) < self.rate) & real_BxL & self.ordinary[ids_BxL]
        index_N = np.flatnonzero(chosen_BxL)
        fate_N = _mix(hash_BxL.reshape(-1)[index_N])
        uniform_N = _uniform(fate_N)
        # Multiply and shift maps 32 hash bits to a range without the bias of a modulus that matters (Lemire 2019).
        draw_N = (_mix(fate_N) >> np.uint64(32)) * np.uint64(len(self.replacements)) >> np.uint64(32)
        new_N = np.where(uniform_N < 0.8, self.mask_id, self.replacements[draw_N.astype(np.int64)])
        return index_N, np.where(uniform_N < 0.9, new_N, ids_BxL.reshape(-1)[index_N])


def _mix(x: _Hashes) -> _Hashes:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014, figure 17), on a stepped counter."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform(x: _Hashes) -> NDArray[np.float64]:
    """The top 53 bits as a float64 in [0, 1)."""
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def masked_collator(
    objective: MaskedLM, tokenizer: PreTrainedTokenizerBase, *, seed: int | None, multiple: int = 1
) -> MaskedCollator:
    """The collator of training, or with `seed=None` that of evaluation, whose masks are the same in every run."""
    if seed is None:
        return MaskedCollator(tokenizer, rate=objective.eval_rate, seed=2**63, multiple=multiple)
    return MaskedCollator(tokenizer, rate=objective.rate, seed=seed, multiple=multiple)


def target_nats(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of each target in nats, float32[N]; `model(ids, mask, target_index)` returns N x V logits."""
    logits_NxV = model(batch.input_ids_BxL, batch.attention_mask_BxL, batch.target_index_N)
    return F.cross_entropy(logits_NxV.float(), batch.target_ids_N, reduction="none")


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """The cross entropy of the batch summed over its targets, nats, float32 scalar."""
    return target_nats(model, batch).sum()
