"""Rounding of the number of rows of a matrix product, where each new number costs time."""

import torch

_MULTIPLE = 32


def to_round(count: int, device: torch.device) -> int:
    """Return the rows to add to `count`, so that oneDNN reuses a compiled kernel; 0 where that does not help.

    oneDNN computes products in bf16 on CPUs, and compiles a kernel of a megabyte for each shape. Without rounding that
    took a quarter of the time, since nearly every batch has another number of tokens. The result is less than a
    sixteenth of `count`, or less than 32, and 0 for full blocks, whose number is round.
    """
    if device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return 0
    return -count % max(_MULTIPLE, 1 << max(0, count.bit_length() - 5))
