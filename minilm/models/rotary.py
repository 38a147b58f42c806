"""Rotary position embeddings (Su et al. 2021, section 3.4.2) in half the passes over memory, in training.

The models of transformers rotate queries and keys by a function of their module: a sum of products, each with its own
gradient. The whole is linear, and its gradient is the inverse rotation. Here both are written out.

Axes: D size of a head, after any others.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "apply_rotary_pos_emb"  # the function's name in all modules of transformers that have it
Turn = Callable[..., tuple[Tensor, Tensor]]


def install_fast_rotary(model: nn.Module) -> None:
    """Replace the function by a faster one in the modules of transformers that `model` comes from.

    The change is for all models of these modules. The results are the same up to rounding, and to the bit without
    gradients. A module whose function is not the usual rotation is left as it is.
    """
    for name in {type(module).__module__ for module in model.modules()}:
        plain = getattr(sys.modules[name], _NAME, None)
        if plain is not None and not hasattr(plain, "plain") and (keeps_type := _keeps_type(plain)) is not None:
            setattr(sys.modules[name], _NAME, _fast(plain, keeps_type))


def _fast(plain: Turn, keeps_type: bool) -> Turn:
    @functools.wraps(plain)
    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        # Where frequencies are trained, the factors need a gradient too.
        fixed = not (cos.requires_grad or sin.requires_grad)
        if torch.is_grad_enabled() and fixed and cos.dtype == sin.dtype == torch.float32:
            factors = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
            if all(_fits(x, factor) for x in (q, k) for factor in factors):
                turned_q, turned_k = _Turn.apply(q, k, *factors, keeps_type)  # type: ignore[no-untyped-call]
                return turned_q, turned_k
        return plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    turn.plain = plain  # type: ignore[attr-defined]
    return turn


def _fits(x: Tensor, factor: Tensor) -> bool:
    """Return whether `factor` has the width of a head, and broadcasts to `x`."""
    if x.dim() != factor.dim() or x.shape[-1] != factor.shape[-1]:
        return False
    return all(own in (1, size) for size, own in zip(x.shape, factor.shape, strict=True))


def _keeps_type(plain: Turn) -> bool | None:
    """Return whether a result in half precision keeps its type, and not that of `cos`; None for another function."""
    if str(inspect.signature(plain)) != "(q, k, cos, sin, unsqueeze_dim=1)":
        return None
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (3, 1, 1, 1))
    try:
        turned = plain(q, k, cos[:, 0], sin[:, 0])
        in_half = plain(q.bfloat16(), k.bfloat16(), cos[:, 0], sin[:, 0])
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None
    if not all(torch.allclose(y, _turned(x, cos, sin, 1), atol=1e-5) for x, y in zip((q, k), turned, strict=True)):
        return None
    return in_half[0].dtype == torch.bfloat16


def _turned(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    """Return x cos + rotate_half(x) sin, float32, where rotate_half(a, b) is (-b, a); with `way` -1 the transpose."""
    x = x.float()
    turned = x * cos
    (first, second), sins = x.chunk(2, -1), sin.chunk(2, -1)[::way]
    to_first, to_second = turned.chunk(2, -1)
    to_first.addcmul_(second, sins[0], value=-way)
    to_second.addcmul_(first, sins[1], value=way)
    return turned


def _view_as_one(q: Tensor, k: Tensor) -> Tensor | None:
    """Return both as one tensor, 2 x the shape of each, if one product gave both; on GPUs a compiler does better."""
    if q.device.type != "cpu" or (q.shape, q.stride()) != (k.shape, k.stride()):
        return None
    apart = k.storage_offset() - q.storage_offset()
    if apart <= 0 or q.untyped_storage().data_ptr() != k.untyped_storage().data_ptr():
        return None
    return q.as_strided((2, *q.shape), (apart, *q.stride()))


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, keeps_type: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.dtypes = q.dtype, k.dtype
        if (both := _view_as_one(q, k)) is not None:
            turned_q, turned_k = _turned(both, cos, sin, 1).to(q.dtype if keeps_type else cos.dtype)
            return turned_q, turned_k
        turned_q, turned_k = (_turned(x, cos, sin, 1).to(x.dtype if keeps_type else cos.dtype) for x in (q, k))
        return turned_q, turned_k

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        parts = zip(gradients, ctx.dtypes, strict=True)
        return *(_turned(gradient, cos, sin, -1).to(dtype) for gradient, dtype in parts), None, None, None
