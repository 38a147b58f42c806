"""Rotary position embeddings (Su et al. 2021, section 3.4.2) that take half the passes over memory in training.

In transformers, the module of a model with these embeddings has a function that rotates queries and keys. The
function computes a sum of products, and autograd computes a gradient for each product. But the rotation is linear, and
its gradient is the inverse rotation. Here one autograd function computes both.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "apply_rotary_pos_emb"  # the function's name in all modules of transformers that have it
RotaryFunction = Callable[..., tuple[Tensor, Tensor]]


def install_fast_rotary(model: nn.Module) -> None:
    """Replace the rotary function by a faster one in the modules of transformers that `model` comes from.

    The change affects all models of these modules. The results are equal up to rounding, and equal to the bit if
    gradients are disabled. A function that does not compute the usual rotation is not replaced.
    """
    for name in {type(module).__module__ for module in model.modules()}:
        plain = getattr(sys.modules[name], _NAME, None)
        if plain is not None and not hasattr(plain, "plain") and (keeps_type := _keeps_type(plain)) is not None:
            setattr(sys.modules[name], _NAME, _make_fast(plain, keeps_type))


def _make_fast(plain: RotaryFunction, keeps_type: bool) -> RotaryFunction:
    @functools.wraps(plain)
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        # If the frequencies are trained, `cos` and `sin` need a gradient too, and the plain function computes it.
        fixed = not (cos.requires_grad or sin.requires_grad)
        if torch.is_grad_enabled() and fixed and cos.dtype == sin.dtype == torch.float32:
            factors = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
            if all(_fits(x, factor) for x in (q, k) for factor in factors):
                rotated_q, rotated_k = _Rotation.apply(q, k, *factors, keeps_type)  # type: ignore[no-untyped-call]
                return rotated_q, rotated_k
        return plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    rotate.plain = plain  # type: ignore[attr-defined]
    return rotate


def _fits(x: Tensor, factor: Tensor) -> bool:
    """Return whether `factor` has the width of `x` and broadcasts to it."""
    if x.dim() != factor.dim() or x.shape[-1] != factor.shape[-1]:
        return False
    return all(own in (1, size) for size, own in zip(x.shape, factor.shape, strict=True))


def _keeps_type(plain: RotaryFunction) -> bool | None:
    """Return whether inputs in half precision give results in half precision, or None for another function.

    If the answer is False, they give results in the dtype of `cos`.
    """
    if str(inspect.signature(plain)) != "(q, k, cos, sin, unsqueeze_dim=1)":
        return None
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (3, 1, 1, 1))
    try:
        rotated = plain(q, k, cos[:, 0], sin[:, 0])
        in_half = plain(q.bfloat16(), k.bfloat16(), cos[:, 0], sin[:, 0])
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None
    if not all(torch.allclose(y, _rotate(x, cos, sin, 1), atol=1e-5) for x, y in zip((q, k), rotated, strict=True)):
        return None
    return in_half[0].dtype == torch.bfloat16


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    """Return x cos + rotate_half(x) sin, float32, where rotate_half of (a, b) is (-b, a).

    way: 1 for this rotation, -1 for its inverse.
    """
    x = x.float()
    rotated = x * cos
    (first, second), sins = x.chunk(2, -1), sin.chunk(2, -1)[::way]
    to_first, to_second = rotated.chunk(2, -1)
    to_first.addcmul_(second, sins[0], value=-way)
    to_second.addcmul_(first, sins[1], value=way)
    return rotated


def _view_as_one(q: Tensor, k: Tensor) -> Tensor | None:
    """Return a view of both, 2 x the shape of each, if they lie in one tensor, else None.

    Returns None on GPUs too, where a compiler does better.
    """
    if q.device.type != "cpu" or (q.shape, q.stride()) != (k.shape, k.stride()):
        return None
    apart = k.storage_offset() - q.storage_offset()
    if apart <= 0 or q.untyped_storage().data_ptr() != k.untyped_storage().data_ptr():
        return None
    return q.as_strided((2, *q.shape), (apart, *q.stride()))


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, keeps_type: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.dtypes = q.dtype, k.dtype
        if (both := _view_as_one(q, k)) is not None:
            rotated_q, rotated_k = _rotate(both, cos, sin, 1).to(q.dtype if keeps_type else cos.dtype)
            return rotated_q, rotated_k
        rotated_q, rotated_k = (_rotate(x, cos, sin, 1).to(x.dtype if keeps_type else cos.dtype) for x in (q, k))
        return rotated_q, rotated_k

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        parts = zip(gradients, ctx.dtypes, strict=True)
        return *(_rotate(gradient, cos, sin, -1).to(dtype) for gradient, dtype in parts), None, None, None
