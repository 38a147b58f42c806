"""Layers that torch.compile has fused: each pass over memory less is time won where a GPU waits for its memory.

A layer is compiled once for all like it, and for batches of any size.
"""

import torch

from minilm.head import Head, SparseHead
from minilm.losses import softmax_at_once


def compile_layers(head: Head) -> None:
    """Have the layers of `head` and its loss compiled in their first step. Evaluation goes on without.

    Raises ValueError for a model whose layers cannot be told.
    """
    if not head.layers:
        raise ValueError(f"{type(head.model).__name__} has no list of layers: leave run.compile out")
    for layer in head.layers:
        layer.compile(dynamic=True)
    if isinstance(head, SparseHead):
        head.softmax = torch.compile(softmax_at_once, dynamic=True)
