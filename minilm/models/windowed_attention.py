"""Attention with a window on long rows, whose time and memory grow with the length, and not with its square.

Rows are cut into chunks, as in Longformer (Beltagy et al. 2020, section 3.1). The queries of a chunk see the chunk's
keys, and as many keys before and after it as the window reaches.

Axes: R rows and L length of a group, A heads, D size of a head, N chunks of C tokens, W tokens that a chunk sees.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minilm.data.packing import SHORT_ROW_TOKENS, RowGroup

_CHUNK_MULTIPLE = 16  # tokens; products of fewer are slow
_FEWEST_CHUNKS = 4  # of a row; with fewer chunks a row needs most of its scores anyway
_VECTOR = 32  # in bf16 W is a multiple of this: a CPU's softmax computes the remainder one number at a time


def chunk_size(window: int | None, group: RowGroup) -> int | None:
    """Return C for a group whose tokens see those that are fewer than `window` away; None for no chunks.

    Bins have no chunks, since they hold several rows. Short rows have none, since chunks would not be faster.
    """
    if window is None or group.owner_RL is not None or group.length < SHORT_ROW_TOKENS:
        return None
    size = max(_CHUNK_MULTIPLE, -(-(window - 1) // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE)
    return size if group.length >= _FEWEST_CHUNKS * size else None


def split_into_chunks(x_RxAxLxD: Tensor, size: int) -> Tensor:
    """Cut rows into chunks of C=`size`, with zeros after the last token: R x A x N x C x D."""
    rows, heads, length, width = x_RxAxLxD.shape
    return F.pad(x_RxAxLxD, (0, 0, 0, -length % size)).view(rows, heads, -1, size, width)


def gather_chunk_contexts(x_RxAxLxD: Tensor, size: int, window: int, *, causal: bool) -> Tensor:
    """Return the tokens that each chunk sees, R x A x N x W x D, with zeros before the first and after the last."""
    before, after = window - 1, 0 if causal else window - 1
    beyond = -(before + size + after) % _VECTOR if x_RxAxLxD.dtype == torch.bfloat16 else 0
    around: Tensor = _Around.apply(x_RxAxLxD, size, before, after, beyond)  # type: ignore[no-untyped-call]
    return around


def chunk_bias(group: RowGroup, size: int, window: int, like: Tensor, *, causal: bool) -> Tensor:
    """Return the same as `RowGroup.bias` for chunks, R x 1 x N x C x W or a shape that broadcasts to it."""
    kind = (size, window, like.shape[-1], causal, like.dtype, like.device)
    if group.place_T is None:
        return _bias_of_whole_rows(group.length, *kind)
    return group.cached(("chunks", *kind), lambda: _bias(group.token_mask(like.device), *kind))


@functools.lru_cache(maxsize=2)  # full blocks have the same bias in every step
def _bias_of_whole_rows(
    length: int, size: int, window: int, width: int, causal: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    real_1xL = torch.ones(1, length, dtype=torch.bool, device=device)
    return _bias(real_1xL, size, window, width, causal, dtype, device)


def _bias(
    real_RxL: Tensor, size: int, window: int, width: int, causal: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    before = window - 1
    place_C, place_W = torch.arange(size, device=device), torch.arange(-before, width - before, device=device)
    seen_CxW = place_C[:, None] - place_W  # the distance from the key to the query after it
    itself_CxW, near_CxW = seen_CxW == 0, (seen_CxW < window) & (seen_CxW > (-1 if causal else -window))
    real_RxNxW = F.pad(real_RxL, (before, width - before - size + -real_RxL.shape[1] % size)).unfold(1, width, size)
    seen = (near_CxW & real_RxNxW[:, None, :, None]) | itself_CxW
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


class _Around(torch.autograd.Function):
    """Overlapping pieces of rows. The gradients of their overlaps are added up, a strip at a time.

    The last `beyond` tokens of a piece only fill up the width: no query sees them, and they get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x_RxAxLxD: Tensor, size: int, before: int, after: int, beyond: int) -> Tensor:
        ctx.length, ctx.sides = x_RxAxLxD.shape[2], (size, before, after)
        padded = F.pad(x_RxAxLxD, (0, 0, before, after + beyond + -ctx.length % size))
        return padded.unfold(2, before + size + after + beyond, size).transpose(-1, -2).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        size, before, after = ctx.sides
        own = gradient[:, :, :, before : before + size].clone()  # a chunk is no shorter than either side
        own[:, :, :-1, size - before :] += gradient[:, :, 1:, :before]
        own[:, :, 1:, :after] += gradient[:, :, :-1, before + size : before + size + after]
        return own.flatten(2, 3)[:, :, : ctx.length], None, None, None, None
