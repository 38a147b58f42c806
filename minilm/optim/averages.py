"""Exponential averages of the weights (Polyak and Juditsky 1992; Izmailov et al. 2018 use equal weights).

The average of a parameter is a part of the optimizer's state, its slot `ema`. So checkpoints hold it, a resumed run
continues it to the bit, and FSDP2 divides it as it divides the moments.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from minilm.optim.muon import get_local
from minilm.optim.optimizer import unwrap_optimizer

SLOT = "ema"


def average_weights(optimizer: torch.optim.Optimizer, decay: float | None) -> None:
    """Let each step of the optimizer update the average of each trained parameter; do nothing if `decay` is None.

    After a step that leaves the weights w, the average a becomes decay * a + (1 - decay) * w. It begins as the weights
    before the first step. A step that is skipped changes no average.
    """
    if decay is None:
        return
    first: dict[Tensor, Tensor] = {}

    def remember(inner: torch.optim.Optimizer, *_: Any) -> None:
        # An optimizer fills the state of a parameter at its first step only if the state is empty then.
        for parameter in _parameters(inner):
            if parameter.grad is not None and not inner.state.get(parameter):
                first[parameter] = parameter.detach().clone()

    def update(inner: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, weights in first.items():
            inner.state[parameter][SLOT] = weights
        first.clear()
        if all(parameter.grad is None for parameter in _parameters(inner)):
            return
        # A fused step changes nothing if the gradient is not finite, and then the averages stay too.
        found_inf = getattr(inner, "found_inf", None)
        share: Any = 1 - decay if found_inf is None else (1 - decay) * (1 - found_inf)
        with torch.no_grad():
            for average, weights in _pair_weights(inner):
                average.lerp_(weights, share)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(update)


@contextmanager
def averaged_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Exchange the weights with their averages in the block.

    Weights that were never trained have no average and stay as they are.

    model: the module whose forward uses the weights, in DDP or FSDP2 if the run is.
    """
    _exchange(model, optimizer)
    try:
        yield
    finally:
        _exchange(model, optimizer)


def _pair_weights(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Return this process's part of each average and of its weights."""
    averages = [(optimizer.state.get(parameter, {}).get(SLOT), parameter) for parameter in _parameters(optimizer)]
    return [(get_local(average), get_local(weights.detach())) for average, weights in averages if average is not None]


@torch.no_grad()
def _exchange(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A forward without gradients may leave whole weights behind, which the next one would use.
            module.reshard()
    for average, weights in _pair_weights(unwrap_optimizer(optimizer)):
        before = weights.clone()
        weights.copy_(average)
        average.copy_(before)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
