"""A micro-batch: rows of token ids joined to one flat row, and the targets in it; its loss is a sum over those.

Axes: T tokens of the micro-batch, N targets of the micro-batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minilm.data.packing import Packing, pack


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A micro-batch on its way to the model: its rows one after the other, without padding."""

    input_ids_T: Tensor
    """int64, the rows' token ids, concatenated."""
    packing: Packing
    """Where the rows lie."""
    target_index_N: Tensor
    """int64, where the targets are among the T tokens."""
    target_ids_N: Tensor
    """What to predict there: int64, ids; of a classification, the labels."""
    type_ids_T: Tensor | None = None
    """int64, which of two texts each token is of, where the model is told."""

    @property
    def target_count(self) -> int:
        """Number of targets; read from the shape, so that asking never waits for a device."""
        return self.target_ids_N.shape[0]

    def to(self, device: torch.device) -> "MicroBatch":
        """The batch on `device`; the copy from pinned memory does not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "MicroBatch":
        """The batch in page-locked memory (called by DataLoader)."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        return MicroBatch(
            input_ids_T=change(self.input_ids_T),
            packing=self.packing.map(change),
            target_index_N=change(self.target_index_N),
            target_ids_N=change(self.target_ids_N),
            type_ids_T=None if self.type_ids_T is None else change(self.type_ids_T),
        )


def concatenate_rows(
    rows: Sequence[NDArray[np.int64]], *, padded: bool, multiple: int
) -> tuple[NDArray[np.int64], Packing]:
    """The rows one after the other, and where they lie. No rows give one token without a target, so that a process that
    has nothing to do in a step can still join its collectives."""
    ids_T = np.concatenate(rows) if rows else np.zeros(1, np.int64)
    return ids_T, pack([len(row) for row in rows] or [1], grouped=not padded, multiple=multiple)


def collate_all_targets(
    rows: Sequence[NDArray[np.int64]], examples: NDArray[np.int64], epoch: int, progress: float
) -> MicroBatch:
    """The rows as they are, unpadded, each token a target: for a loss that compares models."""
    ids, packing = concatenate_rows(rows, padded=False, multiple=1)
    ids_T, every_N = torch.from_numpy(ids), torch.arange(len(ids) if rows else 0)
    return MicroBatch(input_ids_T=ids_T, packing=packing, target_index_N=every_N, target_ids_N=ids_T[every_N])


def target_losses(model: nn.Module, batch: MicroBatch) -> Tensor:
    """-log p of each target in nats, float32[N], by a model like `SparseHead`."""
    nats_N: Tensor = model(batch.input_ids_T, batch.packing, batch.target_index_N, batch.target_ids_N, batch.type_ids_T)
    return nats_N


def loss_sum(model: nn.Module, batch: MicroBatch) -> Tensor:
    """The cross entropy of the batch summed over its targets, nats, float32 scalar."""
    return target_losses(model, batch).sum()


# (rows, the ids of their examples, the epoch, the share of the run that is done)
CollateFunction = Callable[[Sequence[NDArray[np.int64]], NDArray[np.int64], int, float], MicroBatch]


class Collator(Protocol):
    """Rows of token ids to a batch."""

    padded: bool
    multiple: int

    def rate(self, progress: float = 0.0) -> float:
        """Share of the tokens that are targets; `progress` is the share of the run's steps that are done."""

    def __call__(
        self, rows: Sequence[NDArray[np.int64]], examples: NDArray[np.int64], epoch: int, progress: float = 0.0
    ) -> MicroBatch: ...


class LanguageCollator(Collator, Protocol):
    """The collator of a language model."""

    can_be_target: NDArray[np.bool_]
    """bool[vocabulary], the ids that can be targets."""
    target_offset: int
    """How many places after the one where it is predicted a target stands in its row."""
