"""Micro-batches of examples, and the arrangement of a model's outputs for their loss.

Axes: T tokens of the micro-batch, R its rows, L padded length, N targets, E examples, K rows of an example, C outputs.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minilm.data.corpus import Examples
from minilm.data.example import NO_TARGET
from minilm.data.micro_batch import MicroBatch, concatenate_rows
from minilm.data.packing import Packing


class ExampleCollator:
    """A collator that joins the rows of examples, with the targets that the examples have.

    outputs: as `minilm.objectives.objective.Objective.outputs`.
    padded, multiple: as in `minilm.data.batch_plan.Plan`.
    """

    def __init__(self, examples: Examples, outputs: str, *, padded: bool, multiple: int) -> None:
        # The examples hold the target of a next token at the token before it.
        self.examples, self.outputs = examples, "targets" if outputs == "next_tokens" else outputs
        self.padded, self.multiple = padded, multiple

    def rate(self, progress: float = 0.0) -> float:
        """Return the share of the tokens at which the model's head runs. One output per row costs almost nothing."""
        if self.outputs == "tokens":
            return 1.0
        if self.outputs != "targets":
            return 0.0
        sample = [*range(0, len(self.examples), max(1, len(self.examples) // 1000))]
        return float(count_targets(self.examples, sample).sum() / self.examples.lengths[sample].sum())

    def __call__(
        self, rows: Sequence[NDArray[np.int64]], examples: NDArray[np.int64], epoch: int, progress: float = 0.0
    ) -> MicroBatch:
        """Return a micro-batch of the rows; `rows[i]` holds the token ids of example `examples[i]`.

        Ignores `epoch` and `progress`.
        """
        split, counts = rows, None
        if self.examples.rows is not None:
            lengths = [self.examples.row_lengths(int(i)) for i in examples]
            parts = (np.split(row, np.cumsum(own)[:-1]) for row, own in zip(rows, lengths, strict=True))
            split, counts = [*chain.from_iterable(parts)], tuple(map(len, lengths))
        ids_T, packing = concatenate_rows(split, padded=self.padded, multiple=self.multiple)
        packing = replace(packing, rows_per_example=counts)
        types_T = None
        if self.examples.type_ids is not None:
            types = [self.examples.token_type_ids(int(i)) for i in examples]
            types_T = torch.from_numpy(np.concatenate(types or [np.zeros(1, np.int64)]))
        index_N, targets_N = self._find_targets(examples, packing, len(split))
        return MicroBatch(
            input_ids_T=torch.from_numpy(ids_T),
            packing=packing,
            target_index_N=index_N,
            target_ids_N=targets_N,
            type_ids_T=types_T,
            example_ids_N=torch.from_numpy(examples) if self.outputs != "targets" else None,
        )

    def _find_targets(self, examples: NDArray[np.int64], packing: Packing, rows: int) -> tuple[Tensor, Tensor]:
        """Return the places of the outputs, int64, and the targets."""
        if self.outputs == "targets":
            targets = [self.examples.targets_of_tokens(int(i)) for i in examples]
            targets_T = torch.from_numpy(np.concatenate(targets or [np.array([NO_TARGET])]))
            index_N = (targets_T != NO_TARGET).nonzero()[:, 0]
            return index_N, targets_T[index_N]
        assert self.examples.labels is not None
        targets_E = torch.from_numpy(self.examples.labels[examples])
        if self.outputs == "tokens":
            return torch.arange(len(packing.position_T) if rows else 0), targets_E
        return (packing.position_T == 0).nonzero()[:rows, 0], targets_E


def count_targets(examples: Examples, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of targets of each of these examples of tokens with targets, int64[len(ids)]."""
    return np.array([np.count_nonzero(examples.targets_of_tokens(int(i)) != NO_TARGET) for i in ids], np.int64)


def arrange_outputs(outputs_UxC: Tensor, kind: str, lengths: Sequence[int], counts: Sequence[int] | None) -> Tensor:
    """Return the outputs in the shape that a loss gets.

    kind: `Objective.outputs`. "tokens" gives R x L x C, with -inf after the end of a row.
    lengths: the number of tokens of each row, for "tokens".
    counts: the number of rows of each example. If it is not None, an output per row becomes E x K x C, with -inf in
        place of the rows that an example does not have.
    """
    if kind == "tokens":
        if not len(outputs_UxC):
            return outputs_UxC.new_zeros(0, 1, *outputs_UxC.shape[1:])
        return pad_sequence([*torch.split(outputs_UxC, [*lengths])], batch_first=True, padding_value=-torch.inf)
    if counts is None or kind in ("targets", "next_tokens"):
        return outputs_UxC
    if len({*counts}) == 1:
        return outputs_UxC.view(len(counts), counts[0], *outputs_UxC.shape[1:])
    if not counts:
        return outputs_UxC.new_zeros(0, 1, *outputs_UxC.shape[1:])
    return pad_sequence([*torch.split(outputs_UxC, [*counts])], batch_first=True, padding_value=-torch.inf)
