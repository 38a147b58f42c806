"""Sliding-window attention on long rows. Its time and memory grow with the length of a row, not with its square.

Rows are cut into chunks, as in Longformer (Beltagy et al. 2020, section 3.1). The context of a chunk is the chunk
itself and as many tokens before and after it as the window reaches. The queries of a chunk see only its context.

Axes: R rows and L length of a group, A heads, D size of a head, N chunks of C tokens, W tokens of a chunk's context.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minilm.data.packing import SHORT_ROW_TOKENS, RowGroup

_CHUNK_MULTIPLE = 16  # tokens; products of smaller chunks are slow
_FEWEST_CHUNKS = 4  # in a row; with fewer chunks, the contexts cover most of the row anyway
# In bf16 W is a multiple of this. A CPU's softmax computes the remainder one number at a time.
_VECTOR = 32


def chunk_size(window: int | None, group: RowGroup) -> int | None:
    """Return C, the number of tokens in a chunk, or None if the group's rows are not cut into chunks.

    window: a token sees the tokens that are fewer than this number away.

    Bins are not cut, because they hold several rows. Short rows are not cut, because that would not be faster.
    """
    if window is None or group.owner_RL is not None or group.length < SHORT_ROW_TOKENS:
        return None
    size = max(_CHUNK_MULTIPLE, -(-(window - 1) // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE)
    return size if group.length >= _FEWEST_CHUNKS * size else None


def split_into_chunks(x_RxAxLxD: Tensor, size: int) -> Tensor:
    """Return the rows cut into chunks of C = `size` tokens, R x A x N x C x D, with zeros after the last token."""
    rows, heads, length, width = x_RxAxLxD.shape
    return F.pad(x_RxAxLxD, (0, 0, 0, -length % size)).view(rows, heads, -1, size, width)


def gather_chunk_contexts(x_RxAxLxD: Tensor, size: int, window: int, *, causal: bool) -> Tensor:
    """Return the context of each chunk, R x A x N x W x D, with zeros before the first and after the last token."""
    before, after = window - 1, 0 if causal else window - 1
    beyond = -(before + size + after) % _VECTOR if x_RxAxLxD.dtype == torch.bfloat16 else 0
    contexts: Tensor = _Contexts.apply(x_RxAxLxD, size, before, after, beyond)  # type: ignore[no-untyped-call]
    return contexts


def chunk_bias(group: RowGroup, size: int, window: int, like: Tensor, *, causal: bool) -> Tensor:
    """Return the same as `RowGroup.attention_bias` for chunks, R x 1 x N x C x W or a shape that broadcasts to it."""
    kind = (size, window, like.shape[-1], causal, like.dtype, like.device)
    if group.place_T is None:
        return _bias_of_whole_rows(group.length, *kind)
    return group.cached(("chunks", *kind), lambda: _bias(group.token_mask(like.device), *kind))


# Full blocks have the same bias in every step.
@functools.lru_cache(maxsize=2)
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
    distance_CxW = place_C[:, None] - place_W  # positive if the key is before the query
    itself_CxW = distance_CxW == 0
    near_CxW = (distance_CxW < window) & (distance_CxW > (-1 if causal else -window))
    real_RxNxW = F.pad(real_RxL, (before, width - before - size + -real_RxL.shape[1] % size)).unfold(1, width, size)
    # A padded place sees itself, so that its softmax is not NaN.
    visible = (near_CxW & real_RxNxW[:, None, :, None]) | itself_CxW
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -torch.inf)


class _Contexts(torch.autograd.Function):
    """The overlapping contexts of a row's chunks. Backward adds up the gradients where contexts overlap.

    The last `beyond` tokens of a context only fill up its width. No query sees them, and they get no gradient.
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
