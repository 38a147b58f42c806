"""Attention of short rows of different lengths on a GPU, several rows in a tile, by kernels in Triton.

FlashAttention (Dao 2023) computes each row tile by tile. If rows are shorter than a tile, it spends most of its time on
empty places, and on sums over tiles, which a row of one tile does not need. Here one program computes one head of a
tile that holds several rows, and a mask keeps the rows apart. Backward computes the softmax again, so that forward does
not store it.

Axes: T tokens of the batch, B tiles, A heads, D size of a head.
"""

# The kernels' annotations come from Triton, which may be missing. With this import Python does not evaluate them.
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from minilm.data.packing import SHORT_ROW_TOKENS

try:
    import triton
    import triton.language as tl
except ImportError:
    # Only the builds of torch for GPUs install Triton.
    triton = None

HEAD_SIZES = () if triton is None else (16, 32, 64)  # the sizes of a head that the kernels support
_ROOM = SHORT_ROW_TOKENS  # tokens in a tile
_WARPS = 8


def _operator(name: str) -> Any:
    return (lambda function: function) if triton is None else triton_op(f"minilm::{name}", mutates_args={})


@_operator("attend_short_rows")
def attend_short_rows(
    query: Tensor, key: Tensor, value: Tensor, position: Tensor, tiles: Tensor, near: int, causal: bool, scaling: float
) -> Tensor:
    """Return softmax(query key^T scaling) value inside each row, T x A x D, in the dtype of the inputs.

    query, key, value: each T x A x D.
    position: the place of each token in its row, int64[T].
    tiles: the start of each tile, which holds whole rows, and the end of the last tile, int32[B + 1].
    near: a token sees the tokens of its row at a distance of at most this.
    causal: whether a token sees only itself and earlier tokens.
    scaling: the factor of the scores.
    """
    attended = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    heads, size = query.shape[1:]
    _wrap_kernel(_forward)[(heads, tiles.shape[0] - 1)](
        *(query, key, value, attended, position, tiles),
        *(query.stride(0), key.stride(0), value.stride(0), query.stride(1), key.stride(1), value.stride(1)),
        *(near, scaling, heads),
        CAUSAL=causal,
        WINDOW=near < _ROOM,
        SIZE=size,
        ROOM=_ROOM,
        num_warps=_WARPS,
    )
    return attended


@_operator("attend_short_rows_backward")
def _gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    tiles: Tensor,
    near: int,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, given that of the result."""
    of_query, of_key, of_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    heads, size = query.shape[1:]
    _wrap_kernel(_backward)[(heads, tiles.shape[0] - 1)](
        *(gradient, query, key, value, of_query, of_key, of_value, position, tiles),
        *(gradient.stride(0), query.stride(0), key.stride(0), value.stride(0)),
        *(gradient.stride(1), query.stride(1), key.stride(1), value.stride(1)),
        *(near, scaling, heads),
        CAUSAL=causal,
        WINDOW=near < _ROOM,
        SIZE=size,
        ROOM=_ROOM,
        num_warps=_WARPS,
    )
    return of_query, of_key, of_value


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _backward_of(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    if gradient.stride(2) != 1:
        gradient = gradient.contiguous()
    return *_gradients(gradient, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None


if triton is not None:
    attend_short_rows.register_autograd(_backward_of, setup_context=_save_inputs)


def _jit(kernel: Any) -> Any:
    return kernel if triton is None else triton.jit(kernel)


def _wrap_kernel(kernel: Any) -> Any:
    """Wrap the kernel for torch.compile. If Triton interprets it on a CPU, return it unchanged."""
    return wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel


@_jit
def _forward(
    query,
    key,
    value,
    attended,
    position,
    tiles,
    query_token,
    key_token,
    value_token,
    query_head,
    key_head,
    value_head,
    near,
    scaling,
    heads,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SIZE: tl.constexpr,
    ROOM: tl.constexpr,
):
    scaling = tl.cast(scaling, tl.float32)  # torch.compile passes float64, which would make all scores float64
    head, start = tl.program_id(0), tl.load(tiles + tl.program_id(1)).to(tl.int64)
    length = (tl.load(tiles + tl.program_id(1) + 1) - start).to(tl.int32)
    query += start * query_token + head * query_head
    key += start * key_token + head * key_head
    value += start * value_token + head * value_head
    attended += (start * heads + head) * SIZE
    q = _read(query, query_token, length, SIZE, ROOM)
    k = _read(key, key_token, length, SIZE, ROOM)
    v = _read(value, value_token, length, SIZE, ROOM)
    weights, total = _weights(q, k, position + start, length, near, scaling, CAUSAL, WINDOW, ROOM)
    _write(attended, tl.dot(weights.to(v.dtype), v) / total[:, None], heads * SIZE, length, SIZE, ROOM)


@_jit
def _backward(
    gradient,
    query,
    key,
    value,
    of_query,
    of_key,
    of_value,
    position,
    tiles,
    gradient_token,
    query_token,
    key_token,
    value_token,
    gradient_head,
    query_head,
    key_head,
    value_head,
    near,
    scaling,
    heads,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SIZE: tl.constexpr,
    ROOM: tl.constexpr,
):
    scaling = tl.cast(scaling, tl.float32)  # torch.compile passes float64, which would make all scores float64
    head, start = tl.program_id(0), tl.load(tiles + tl.program_id(1)).to(tl.int64)
    length = (tl.load(tiles + tl.program_id(1) + 1) - start).to(tl.int32)
    gradient += start * gradient_token + head * gradient_head
    query += start * query_token + head * query_head
    key += start * key_token + head * key_head
    value += start * value_token + head * value_head
    to = (start * heads + head) * SIZE
    g = _read(gradient, gradient_token, length, SIZE, ROOM)
    q = _read(query, query_token, length, SIZE, ROOM)
    k = _read(key, key_token, length, SIZE, ROOM)
    v = _read(value, value_token, length, SIZE, ROOM)
    weights, total = _weights(q, k, position + start, length, near, scaling, CAUSAL, WINDOW, ROOM)
    weights *= (1 / total)[:, None]
    _write(of_value + to, tl.dot(tl.trans(weights.to(g.dtype)), g), heads * SIZE, length, SIZE, ROOM)
    of_weights = tl.dot(g, tl.trans(v))
    of_scores = weights * (of_weights - tl.sum(weights * of_weights, 1)[:, None]) * scaling
    of_scores = of_scores.to(q.dtype)
    _write(of_query + to, tl.dot(of_scores, k), heads * SIZE, length, SIZE, ROOM)
    _write(of_key + to, tl.dot(tl.trans(of_scores), q), heads * SIZE, length, SIZE, ROOM)


@_jit
def _weights(q, k, position, length, near, scaling, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ROOM: tl.constexpr):
    """Return the numerator of the softmax, float32[ROOM, ROOM], and its denominator, float32[ROOM].

    The softmax uses powers of two, and the factor below is log2(e). A place after the tile's last token sees only
    itself.
    """
    at = tl.arange(0, ROOM)
    begin = at - tl.load(position + at, mask=at < length, other=0).to(tl.int32)  # the start of each token's row
    visible = begin[:, None] == begin[None, :]
    if CAUSAL:
        visible = visible & (at[:, None] >= at[None, :])
    if WINDOW:
        visible = visible & (tl.abs(at[:, None] - at[None, :]) <= near)
    scores = tl.where(visible, tl.dot(q, tl.trans(k)) * (scaling * 1.4426950408889634), float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights, tl.sum(weights, 1)


@_jit
def _read(source, token, length, SIZE: tl.constexpr, ROOM: tl.constexpr):
    """Return one head of a tile's tokens, [ROOM, SIZE], with zeros after them."""
    at, place = tl.arange(0, ROOM)[:, None], tl.arange(0, SIZE)[None, :]
    return tl.load(source + at * token + place, mask=at < length, other=0.0)


@_jit
def _write(target, values, token, length, SIZE: tl.constexpr, ROOM: tl.constexpr):
    at, place = tl.arange(0, ROOM)[:, None], tl.arange(0, SIZE)[None, :]
    tl.store(target + at * token + place, values.to(target.dtype.element_ty), mask=at < length)
