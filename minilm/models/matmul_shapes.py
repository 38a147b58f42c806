"""Extra rows of matrix products. They keep the number of different shapes small, where each new shape costs time."""

import torch

_MULTIPLE = 32


def count_padding_rows(rows: int, device: torch.device) -> int:
    """Return how many rows to add to a matrix of `rows` rows, so that oneDNN reuses a compiled kernel.

    oneDNN computes bf16 products on CPUs, and compiles a kernel of a megabyte for each shape. Nearly every batch has
    another number of tokens, so without padding rows the compilation took a quarter of the time. The result is less
    than `rows` / 16, or less than 32. It is 0 if `rows` is a multiple of a large power of two, as for full blocks. It
    is also 0 wherever padding rows do not help: on GPUs, and without autocast.
    """
    if device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return 0
    return -rows % max(_MULTIPLE, 1 << max(0, rows.bit_length() - 5))
