"""Batches of few different sizes, where each size has its price."""

import torch

_MULTIPLE = 32


def to_round(count: int, device: torch.device) -> int:
    """How many rows more make a product of `count` rows one that was had before, one at least; 0 where it is no matter.

    oneDNN, which takes products in bf16 on CPUs, compiles a kernel of a megabyte for each shape: a quarter of the time
    where each batch has a number of tokens of its own.
    """
    rounds = device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return _MULTIPLE - count % _MULTIPLE if rounds else 0
