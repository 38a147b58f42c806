"""Compilation of a model's layers by torch.compile, which fuses operations: a GPU then waits less for its memory.

All layers of one kind share one compiled function, for batches of any size.
"""

import torch

from minilm.models.chunked_loss import softmax_at_once
from minilm.models.head import Head, SparseHead


def compile_layers(head: Head) -> None:
    """Let torch compile the layers of `head`, and its loss, in their first step. Evaluation does not use the result.

    Raises ValueError for a model without a list of layers.
    """
    if not head.layers:
        raise ValueError(f"{type(head.model).__name__} has no list of layers: leave run.compile out")
    for layer in head.layers:
        layer.compile(dynamic=True)
    if isinstance(head, SparseHead):
        head.softmax = torch.compile(softmax_at_once, dynamic=True)
