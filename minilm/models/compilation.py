"""Compilation of a model's layers by torch.compile, which fuses operations. A GPU then waits less for its memory.

All layers of one kind share one compiled function, which takes batches of any size.
"""

import torch

from minilm.models.chunked_loss import compilable_cross_entropy
from minilm.models.head import Head
from minilm.models.sparse_head import SparseHead


def compile_layers(head: Head) -> None:
    """Let torch compile the layers of `head`, and its loss, in their first step. Evaluation runs uncompiled code.

    Raises ValueError for a model without a list of layers.
    """
    if not head.layers:
        raise ValueError(f"{type(head.model).__name__} has no list of layers: leave run.compile out")
    for layer in head.layers:
        layer.compile(dynamic=True)
    if isinstance(head, SparseHead):
        head.cross_entropy = torch.compile(compilable_cross_entropy, dynamic=True)
