"""Faster versions of some modules. They compute the same result up to rounding, but dropout draws other masks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import FastGELUActivation, GELUActivation, NewGELUActivation

from minilm.models.dropout import FastDropout
from minilm.models.rotary import install_fast_rotary


class ContiguousGELU(nn.Module):
    """GELU (Hendrycks and Gimpel 2016, section 2). On a CPU it first copies an input that is not contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x.contiguous() if x.device.type == "cpu" else x)


def _make_exact_gelu(module: Any) -> nn.Module:
    return ContiguousGELU() if module.act is F.gelu else module


def _make_tanh_gelu(module: nn.Module) -> nn.Module:
    """Return the tanh approximation of GELU (Hendrycks and Gimpel 2016, section 2) as one operation.

    It takes one pass over memory and keeps its input for the gradient. For GPT-2 and others, transformers computes the
    formula step by step, which takes eight passes and keeps six results.
    """
    return nn.GELU(approximate="tanh")


def _make_dropout(module: Any) -> nn.Module:
    return FastDropout(module.p).train(module.training)


# For each class of modules, the function that makes the faster module from the original.
FAST_MODULES: dict[type, Callable[[nn.Module], nn.Module]] = {
    nn.Dropout: _make_dropout,
    GELUActivation: _make_exact_gelu,
    NewGELUActivation: _make_tanh_gelu,
    FastGELUActivation: _make_tanh_gelu,
}


def install_fast_modules(model: nn.Module) -> None:
    """Replace modules of `model`, and its function for rotary embeddings, by faster ones."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) in FAST_MODULES:
                setattr(module, name, FAST_MODULES[type(child)](child))
    install_fast_rotary(model)
