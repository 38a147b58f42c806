"""A trained model whose outputs another model learns (distillation, Hinton et al. 2015, section 2)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minilm.data.packing import Packing

Compare = Callable[[Tensor, Tensor, Tensor, Packing], Tensor]
"""Computes a loss for each target from a model's outputs, its teacher's outputs, the targets, and the packing."""


class Teacher:
    """A head that another head learns from. It is not a part of that head: its weights are neither trained nor saved.

    weight: the share of the comparison with the teacher in the loss; the rest is the usual loss.
    """

    def __init__(self, head: nn.Module, compare: Compare, *, weight: float) -> None:
        self.head, self.compare, self.weight = head.eval(), compare, weight

    def mix(
        self,
        losses_N: Tensor,
        outputs: Tensor,
        targets: Tensor,
        input_ids_T: Tensor,
        packing: Packing,
        target_index_N: Tensor,
        type_ids_T: Tensor | None,
    ) -> Tensor:
        """Return the usual losses of a micro-batch, mixed with those of the comparison, float32[N]."""
        with torch.no_grad():
            expected = self.head(input_ids_T, packing, target_index_N, None, type_ids_T)
        return (1 - self.weight) * losses_N + self.weight * self.compare(outputs, expected, targets, packing)
