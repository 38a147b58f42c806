"""The cross entropy of a linear head, a part of the targets at a time, so that no batch has all its logits in memory.

Axes: N targets, H hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_LOGITS, _LOGITS_ON_CPU = 2**26, 2**23  # in memory at a time: 256 MiB; 32 MiB where caches matter more than launches


def linear_cross_entropy(
    hidden_NxH: Tensor, weight_VxH: Tensor, bias_V: Tensor | None, target_N: Tensor, smoothing: float = 0.0
) -> Tensor:
    """-log softmax(hidden weight^T + bias) at each target, nats, float32[N]; rows of `hidden` after N do not count.

    A share of `smoothing` is the mean over the vocabulary instead (Szegedy et al. 2016, section 7).

    The products are taken in the type of autocast, or else in that of `hidden_NxH`. Gradients are taken on the way
    forward, while the logits are there, so that nothing is computed twice: those of the sum over the targets, and a
    RuntimeError for anything else.
    """
    result: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NxH, weight_VxH, bias_V, target_N, smoothing
    )
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NxH: Tensor,
        weight_VxH: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        smoothing: float,
    ) -> Tensor:
        inputs = (hidden_NxH, weight_VxH, bias_V)
        gradients = [
            _room(x, len(target_N)) if x is not None and needed else None
            for x, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        device = hidden_NxH.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NxH.dtype
        with torch.autocast(device, enabled=False):
            hidden, weight = hidden_NxH.to(kind), weight_VxH.to(kind)
            bias = None if bias_V is None else bias_V.to(kind)
            rows = max(1, (_LOGITS_ON_CPU if device == "cpu" else _LOGITS) // weight_VxH.shape[0])
            nats = [
                _part(hidden[at : at + rows], weight, bias, target_N[at : at + rows], smoothing, at, gradients)
                for at in range(0, len(target_N), rows)
            ]
        if gradients[0] is not None:
            gradients[0][len(target_N) :] = 0
        ctx.gradients = gradients
        return torch.cat(nats) if nats else hidden_NxH.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor | None, ...]:
        if len(gradient_N) > 1 and gradient_N.stride() != (0,):  # a sum hands all of them the same number
            raise RuntimeError("only the sum of these losses has a gradient; take the logits for any other")
        scale = gradient_N[:1].sum()
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if x is None else x.mul_(scale) for x in gradients), None, None


def _part(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    smoothing: float,
    at: int,
    gradients: list[Tensor | None],
) -> Tensor:
    """The nats of some targets, the first of which is number `at`; adds to the gradients that are wanted."""
    log_p = F.linear(hidden, weight, bias)[: len(target)].float().log_softmax(-1)
    nats = -log_p.gather(1, target[:, None]).squeeze(1)
    if smoothing:
        nats = (1 - smoothing) * nats - smoothing * log_p.mean(-1)
    of_hidden, of_weight, of_bias = gradients
    if of_hidden is not None or of_weight is not None or of_bias is not None:
        error = log_p.exp_()
        error.scatter_add_(1, target[:, None], error.new_full((len(target), 1), smoothing - 1.0))
        if smoothing:
            error -= smoothing / error.shape[1]
        if of_bias is not None:
            _add(of_bias, error.sum(0), at)
        error = error.to(hidden.dtype)
        if more := len(hidden) - len(target):
            error = F.pad(error, (0, 0, 0, more))
        if of_hidden is not None:
            of_hidden[at : at + len(hidden)] = error @ weight
        if of_weight is not None and of_weight.dtype == hidden.dtype:
            of_weight.addmm_(error.T, hidden, beta=min(at, 1))
        elif of_weight is not None:
            _add(of_weight, error.T @ hidden, at)
    return nats


def _room(x: Tensor, targets: int) -> Tensor:
    """For a gradient of `x`, which the first part of the targets fills: an embedding is too long to be zeroed first."""
    return torch.empty_like(x) if targets else torch.zeros_like(x)


def _add(total: Tensor, part: Tensor, at: int) -> None:
    """Add to what the earlier parts gave, if this is not the first."""
    if at:
        total += part
    else:
        total.copy_(part)
