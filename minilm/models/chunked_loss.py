"""The cross entropy of a linear head, computed for some targets at a time, so that few logits are in memory.

Axes: N targets, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Number of logits in memory at a time on a GPU, which is 512 MiB of float32.
_LOGITS = 2**27
# Size of the logits in memory at a time on a CPU. Each part of the targets takes a pass over the weight's gradient, and
# with fewer logits these passes would last as long as the products.
_BYTES_ON_CPU = 2**27
# A CPU computes the cross entropy of this many logits at a time (2 MiB of float32), so that they stay in its caches.
_BLOCK_ON_CPU = 2**19
# On GPUs the vocabulary is padded to a multiple of this. Products of other sizes take several times as long.
_VOCABULARY_MULTIPLE = 64

# A function like `eager_cross_entropy`.
CrossEntropy = Callable[[Tensor, int, Tensor, float, float, bool], tuple[Tensor, Tensor | None]]


def linear_cross_entropy(
    hidden_NxH: Tensor,
    weight_VxH: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    smoothing: float = 0.0,
    cross_entropy: CrossEntropy | None = None,
    *,
    z_loss: float = 0.0,
) -> Tensor:
    """Return -log softmax(hidden weight^T + bias) at each target, in nats, float32[N].

    hidden_NxH: may have more than N rows, the rest of which is ignored.
    smoothing: the share of the loss that is the mean over the vocabulary (label smoothing, Szegedy et al. 2016,
    section 7).
    cross_entropy: computes the same as `eager_cross_entropy`, which is the default.
    z_loss: this number times log(Z)^2 is added at each target, where Z is the denominator of the softmax (Chowdhery et
    al. 2022, "PaLM", section 5).

    Products have the dtype of autocast, or else that of `hidden_NxH`. The forward also computes the gradients of the
    sum over the targets, because the logits are in memory then. So backward works only through `result.sum()`. Through
    any other function of the result, even its mean, it raises RuntimeError.
    """
    # An autograd function checks whether its inputs need a gradient, but not whether gradients are enabled.
    if not torch.is_grad_enabled():
        hidden_NxH, weight_VxH = hidden_NxH.detach(), weight_VxH.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    result: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NxH, weight_VxH, bias_V, target_N, smoothing, z_loss, cross_entropy or eager_cross_entropy
    )
    return result


def eager_cross_entropy(
    logits: Tensor, vocabulary: int, target: Tensor, smoothing: float, z_loss: float, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """Return -log p of each target, float32[N], and if `trained` the gradient of their sum, float32[N, V], else None.

    `smoothing` and `z_loss` change both as `linear_cross_entropy` says. Columns of the logits after the first V =
    `vocabulary` are ignored.
    """
    logits = logits[:, :vocabulary].float()
    p = logits.softmax(-1)
    # The exponentials are computed only once. The logarithm of the largest p is accurate, and differences of logits
    # give the other logarithms.
    largest, log_largest = logits.amax(-1, keepdim=True), p.amax(-1, keepdim=True).log_()
    nats = (largest - logits.gather(1, target[:, None]) - log_largest).squeeze(1)
    if smoothing:
        nats = (1 - smoothing) * nats + smoothing * (largest - log_largest - logits.mean(-1, keepdim=True)).squeeze(1)
    log_z = largest - log_largest
    if z_loss:
        nats = nats + z_loss * log_z.squeeze(1) ** 2
    if not trained:
        return nats, None
    if z_loss:
        p *= 1 + 2 * z_loss * log_z
    error = p.scatter_add_(1, target[:, None], p.new_full((len(target), 1), smoothing - 1.0))
    if smoothing:
        error -= smoothing / vocabulary
    return nats, error


def compilable_cross_entropy(
    logits: Tensor, vocabulary: int, target: Tensor, smoothing: float, z_loss: float, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the same as `eager_cross_entropy`, by operations that torch.compile fuses.

    The gradient has the shape and dtype of the logits, with zeros after column V.
    """
    column = torch.arange(logits.shape[1], device=logits.device)
    real, hit = column < vocabulary, column == target[:, None]
    logits_of_real = torch.where(real, logits.float(), -torch.inf)
    log_p = logits_of_real.log_softmax(-1)
    nats, p = -log_p.gather(1, target[:, None]).squeeze(1), log_p.exp()
    if smoothing:
        nats = (1 - smoothing) * nats - smoothing * torch.where(real, log_p, 0).sum(-1) / vocabulary
    if z_loss:
        log_z = logits_of_real.logsumexp(-1, keepdim=True)
        nats, p = nats + z_loss * log_z.squeeze(1) ** 2, p * (1 + 2 * z_loss * log_z)
    error = p - (1 - smoothing) * hit
    if smoothing:
        error = error - torch.where(real, smoothing / vocabulary, 0)
    return nats, error.to(logits.dtype) if trained else None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NxH: Tensor,
        weight_VxH: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        smoothing: float,
        z_loss: float,
        cross_entropy: CrossEntropy,
    ) -> Tensor:
        inputs = (hidden_NxH, weight_VxH, bias_V)
        gradients = [
            _allocate_gradient(x, len(target_N)) if x is not None and needed else None
            for x, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        device = hidden_NxH.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NxH.dtype
        with torch.autocast(device, enabled=False):
            vocabulary, hidden, weight = len(weight_VxH), hidden_NxH.to(kind), _pad_vocabulary(weight_VxH.to(kind))
            bias = None if bias_V is None else _pad_vocabulary(bias_V.to(kind))
            on_cpu, trained = device == "cpu", any(ctx.needs_input_grad)
            rows = max(1, (_BYTES_ON_CPU // hidden.element_size() if on_cpu else _LOGITS) // vocabulary)
            block_rows = max(1, _BLOCK_ON_CPU // vocabulary) if on_cpu else rows
            nats: list[Tensor] = []
            for at in range(0, len(target_N), rows):
                part, target = hidden[at : at + rows], target_N[at : at + rows]
                logits = F.linear(part, weight, bias)
                blocks = zip(
                    torch.split(logits[: len(target)], block_rows), torch.split(target, block_rows), strict=True
                )
                for block, of_block in blocks:
                    block_nats, error = cross_entropy(block, vocabulary, of_block, smoothing, z_loss, trained)
                    if error is not None:
                        if gradients[2] is not None:
                            _add(gradients[2], error[:, :vocabulary].sum(0, dtype=torch.float32), bool(nats))
                        if error.shape == logits.shape and error.dtype == logits.dtype:
                            logits = error
                        else:  # the gradient takes the place of the logits
                            block[:, : error.shape[1]] = error
                    nats.append(block_nats)
                if trained:
                    logits[len(target) :] = 0
                    _add_gradients(gradients, part, weight, logits, at)
        if gradients[0] is not None:
            gradients[0][len(target_N) :] = 0
        ctx.gradients = gradients
        return torch.cat(nats) if nats else hidden_NxH.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient of a sum is one number, expanded to all targets.
        if len(gradient_N) > 1 and gradient_N.stride() != (0,):
            raise RuntimeError("only the sum of these losses has a gradient: compute other functions from `logits`")
        scale = gradient_N[:1].sum()
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if x is None else x.mul_(scale) for x in gradients), None, None, None, None


def _add_gradients(gradients: list[Tensor | None], hidden: Tensor, weight: Tensor, error: Tensor, at: int) -> None:
    """Add the gradients of the hidden states and the weight from one part of the targets, which begins at target `at`.

    error: the gradient of the sum with respect to the logits of this part.
    """
    of_hidden, of_weight, _ = gradients
    if of_hidden is not None:
        of_hidden[at : at + len(hidden)] = error @ weight
    if of_weight is not None and of_weight.dtype == hidden.dtype and len(of_weight) == len(weight):
        of_weight.addmm_(error.T, hidden, beta=min(at, 1))
    elif of_weight is not None:
        _add(of_weight, (error.T @ hidden)[: len(of_weight)], at > 0)


def _pad_vocabulary(x_VxH: Tensor) -> Tensor:
    """Return `x`. On a GPU, append rows of zeros up to a multiple of `_VOCABULARY_MULTIPLE`."""
    more = -len(x_VxH) % _VOCABULARY_MULTIPLE if x_VxH.device.type == "cuda" else 0
    return F.pad(x_VxH, (0, 0) * (x_VxH.ndim - 1) + (0, more)) if more else x_VxH


def _allocate_gradient(x: Tensor, targets: int) -> Tensor:
    """Return memory for the gradient of `x`. If there are targets, their parts overwrite it, so it is not zeroed."""
    return torch.empty_like(x) if targets else torch.zeros_like(x)


def _add(total: Tensor, part: Tensor, begun: bool) -> None:
    """Add `part` to `total`, or overwrite `total` if it has not begun."""
    if begun:
        total += part
    else:
        total.copy_(part)
