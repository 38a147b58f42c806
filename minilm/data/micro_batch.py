"""A micro-batch: rows of token ids joined to one flat row, and the targets in it. Its loss is a sum over the targets.

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
    """The input of one forward pass: rows of tokens one after the other, without padding, and their targets."""

    input_ids_T: Tensor
    """int64, the token ids of all rows."""
    packing: Packing
    """Where each row is among the T tokens."""
    target_index_N: Tensor
    """int64, for each target, the index of the token at which it is predicted."""
    target_ids_N: Tensor
    """What to predict there: int64 token ids, or the labels for classification."""
    type_ids_T: Tensor | None = None
    """int64, the token types, which say to which of two texts a token belongs. None if the model needs none."""
    example_ids_N: Tensor | None = None
    """int64, the example of each target, for an objective whose loss compares the examples of a step."""
    coupling_NxD: Tensor | None = None
    """float32, the loss of each example and its gradient at the model's outputs, if all examples of the step decide
    them (`minilm.objectives.gradient_cache`)."""
    outputs: Tensor | None = None
    """float32, the model's outputs with their gradient graph, if an earlier pass has computed them: N, or the rows of N
    examples, by any size."""

    counted_N: Tensor | None = None
    """bool, which targets count in the loss. None if all do."""
    uncounted: int = 0
    """The number of targets that do not count."""

    @property
    def target_count(self) -> int:
        """The number of targets that count. It comes from a shape, so that reading it never waits for a device."""
        return self.target_ids_N.shape[0] - self.uncounted

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the batch on `device`. A copy from pinned memory does not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "MicroBatch":
        """Return the batch in page-locked memory. A DataLoader calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        def map_optional(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return MicroBatch(
            input_ids_T=change(self.input_ids_T),
            packing=self.packing.map(change),
            target_index_N=change(self.target_index_N),
            target_ids_N=change(self.target_ids_N),
            type_ids_T=map_optional(self.type_ids_T),
            example_ids_N=map_optional(self.example_ids_N),
            coupling_NxD=map_optional(self.coupling_NxD),
            outputs=map_optional(self.outputs),
            counted_N=map_optional(self.counted_N),
            uncounted=self.uncounted,
        )


def concatenate_rows(
    rows: Sequence[NDArray[np.int64]], *, padded: bool, multiple: int
) -> tuple[NDArray[np.int64], Packing]:
    """Return the rows one after the other, int64[T], and where each row is.

    padded: whether the model needs a rectangular batch, whose width is then a multiple of `multiple`.

    Without rows, return one token. Then a process without examples in a step can still run the model and take part in
    collective operations.
    """
    ids_T = np.concatenate(rows) if rows else np.zeros(1, np.int64)
    return ids_T, pack([len(row) for row in rows] or [1], grouped=not padded, multiple=multiple)


def collate_all_targets(
    rows: Sequence[NDArray[np.int64]], examples: NDArray[np.int64], epoch: int, progress: float
) -> MicroBatch:
    """Return the rows as a batch in which each token is a target, for a loss that compares models.

    It ignores `examples`, `epoch` and `progress`.
    """
    ids, packing = concatenate_rows(rows, padded=False, multiple=1)
    ids_T, every_N = torch.from_numpy(ids), torch.arange(len(ids) if rows else 0)
    return MicroBatch(input_ids_T=ids_T, packing=packing, target_index_N=every_N, target_ids_N=ids_T[every_N])


def couple_losses(outputs: Tensor, coupling_NxD: Tensor) -> Tensor:
    """Return the losses of `MicroBatch.coupling_NxD`, float32[N]. The gradient of their sum is that of the coupling."""
    losses_N, gradient_NxD = coupling_NxD[:, 0], coupling_NxD[:, 1:]
    linear_N = (outputs.reshape(gradient_NxD.shape) * gradient_NxD).sum(1)
    return losses_N + (linear_N - linear_N.detach())


def target_losses(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Return the loss of each target, -log p in nats, float32[N].

    model: computes the losses from the fields of a batch, as `SparseHead` does. It does not run for a batch that has
    its outputs already.
    """
    if batch.outputs is not None and batch.coupling_NxD is not None:
        return couple_losses(batch.outputs, batch.coupling_NxD)
    # Heads for losses that do not compare examples take no coupling.
    coupling = () if batch.coupling_NxD is None else (batch.coupling_NxD,)
    nats_N: Tensor = model(
        batch.input_ids_T, batch.packing, batch.target_index_N, batch.target_ids_N, batch.type_ids_T, *coupling
    )
    return nats_N


def counted_losses(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Return the same as `target_losses`, with 0 for targets that do not count."""
    nats_N = target_losses(model, batch)
    return nats_N if batch.counted_N is None else torch.where(batch.counted_N, nats_N, 0.0)


def loss_sum(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Return the sum of the losses of the batch's targets that count in nats, a float32 scalar."""
    return counted_losses(model, batch).sum()


CollateFunction = Callable[[Sequence[NDArray[np.int64]], NDArray[np.int64], int, float], MicroBatch]
"""Makes a batch of rows of token ids. It gets the rows, the indices of their examples, the epoch, and the share of the
run's steps that are done."""


class Collator(Protocol):
    """A `CollateFunction` that says how its batches are laid out and how many targets they have."""

    padded: bool
    """Whether the model needs rectangular batches."""
    multiple: int
    """The width of a rectangular batch is a multiple of this."""

    def rate(self, progress: float = 0.0) -> float:
        """Return the share of the tokens that are targets. `progress` is the share of the run's steps that are done."""

    def __call__(
        self, rows: Sequence[NDArray[np.int64]], examples: NDArray[np.int64], epoch: int, progress: float = 0.0
    ) -> MicroBatch:
        """Make a batch of `rows` of token ids. `examples` are the indices of their examples, int64[R]."""


class LanguageCollator(Collator, Protocol):
    """The collator of a language model."""

    can_be_target: NDArray[np.bool_]
    """bool[V], whether each of the V ids of the tokenizer can be a target."""
    target_offset: int
    """The place of a target in its row, minus the place at which it is predicted: 1 for causal LM, 0 for masked LM."""
