"""Batches of few different sizes, where each size has its price."""

import torch

_LEAST = 32


def to_round(count: int, device: torch.device) -> int:
    """How many rows more make a product of `count` rows one that was had before; 0 where it is no matter.

    oneDNN, which takes products in bf16 on CPUs, compiles a kernel of a megabyte for each shape: a quarter of the time
    where each batch has a number of tokens of its own. What is added is less than a sixteenth of `count`, or than 32,
    and nothing to full blocks, whose number is a round one.
    """
    if device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return 0
    return -count % max(_LEAST, 1 << max(0, count.bit_length() - 5))
