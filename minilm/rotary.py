"""Rotary position embeddings (Su et al. 2021, section 3.4.2) in half the passes over memory, in training.

The models of transformers turn queries and keys by a function of their module, as a sum of products whose every part
has a gradient of its own. It is linear, and its gradient is the turn back: here both are written out.

Axes: D size of a head; whatever is before it.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "apply_rotary_pos_emb"  # of the function, in all modules of transformers that have it
Turn = Callable[..., tuple[Tensor, Tensor]]


def with_fast_rotary(model: nn.Module) -> None:
    """Have the modules of transformers that `model` is made of turn queries and keys faster, to rounding the same.

    That is for all models of these modules. One that does something else than the usual turn is left as it is, and so
    is what each computes without gradients.
    """
    for name in {type(module).__module__ for module in model.modules()}:
        plain = getattr(sys.modules[name], _NAME, None)
        if plain is not None and not hasattr(plain, "plain") and (keeps_type := _keeps_type(plain)) is not None:
            setattr(sys.modules[name], _NAME, _fast(plain, keeps_type))


def _fast(plain: Turn, keeps_type: bool) -> Turn:
    @functools.wraps(plain)
    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and cos.dtype == sin.dtype == torch.float32:
            factors = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
            if all(_fits(x, factor) for x in (q, k) for factor in factors):
                turned_q, turned_k = (_Turn.apply(x, *factors, keeps_type) for x in (q, k))  # type: ignore[no-untyped-call]
                return turned_q, turned_k
        return plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    turn.plain = plain  # type: ignore[attr-defined]
    return turn


def _fits(x: Tensor, factor: Tensor) -> bool:
    """Whether `factor` is for all of a head, and for each position one that `x` has."""
    if x.dim() != factor.dim() or x.shape[-1] != factor.shape[-1]:
        return False
    return all(own in (1, size) for size, own in zip(x.shape, factor.shape, strict=True))


def _keeps_type(plain: Turn) -> bool | None:
    """Whether half precision stays what it is, in place of the type of `cos`; None for another turn than the usual."""
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
    """x cos + rotate_half(x) sin, float32, where rotate_half(a, b) is (-b, a); with `way` -1 the transpose of that."""
    x = x.float()
    turned = x * cos
    (first, second), sins = x.chunk(2, -1), sin.chunk(2, -1)[::way]
    to_first, to_second = turned.chunk(2, -1)
    to_first.addcmul_(second, sins[0], value=-way)
    to_second.addcmul_(first, sins[1], value=way)
    return turned


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, keeps_type: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _turned(x, cos, sin, 1).to(x.dtype if keeps_type else cos.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, -1).to(ctx.dtype), None, None, None
