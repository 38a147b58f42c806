"""Faster modules in place of others, which compute the same up to rounding."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import FastGELUActivation, GELUActivation, NewGELUActivation

from minilm.models.dropout import FastDropout
from minilm.models.rotary import install_fast_rotary


class ContiguousGELU(nn.Module):
    """GELU (Hendrycks and Gimpel 2016, section 2). On a CPU it first copies an input that is a part of a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x.contiguous() if x.device.type == "cpu" else x)


def _exact_gelu(module: Any) -> nn.Module:
    return ContiguousGELU() if module.act is F.gelu else module


def _gelu(module: nn.Module) -> nn.Module:
    """Return GELU by tanh (Hendrycks and Gimpel 2016, section 2), which takes one pass over memory and keeps its input.

    For GPT-2 and others transformers writes the formula out: eight passes, and six results that the gradient needs.
    """
    return nn.GELU(approximate="tanh")


def _dropout(module: Any) -> nn.Module:
    return FastDropout(module.p).train(module.training)


FAST_MODULES: dict[type, Callable[[nn.Module], nn.Module]] = {
    nn.Dropout: _dropout,
    GELUActivation: _exact_gelu,
    NewGELUActivation: _gelu,
    FastGELUActivation: _gelu,
}


def install_fast_modules(model: nn.Module) -> None:
    """Replace modules of `model` by faster ones, and its function for rotary embeddings (`minilm.models.rotary`)."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) in FAST_MODULES:
                setattr(module, name, FAST_MODULES[type(child)](child))
    install_fast_rotary(model)
