"""AdamW, and its groups of parameters for weight decay and layer decay."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from minilm.config import Optim
from minilm.optim.parameter_depth import parameter_depths


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """Return fused AdamW with two groups of parameters: one with weight decay and one without.

    With a layer decay there are two groups for each depth. The entry `scale` of a group is its share of the learning
    rate; `train_step` multiplies the rate of the step by it. Raises ValueError for a layer decay if the depths of the
    parameters cannot be found.
    """
    scales = {} if optim.layer_decay == 1 else compute_layer_scales(model, optim.layer_decay)
    no_decay = find_no_decay_parameters(model)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((scales.get(parameter, 1.0), parameter not in no_decay), []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": optim.weight_decay if decays else 0.0, "scale": scale}
        for (scale, decays), parameters in groups.items()
    ]
    return torch.optim.AdamW(settings, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


# The names of norms by which transformers' Trainer leaves parameters out of weight decay.
_NORM = re.compile(r"layernorm|rmsnorm|(^|_)norm$")


def find_no_decay_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that get no weight decay: biases, norms and all vectors.

    A parameter counts as a bias or a norm by its own name, or by the name or class of the module that holds it. Its
    shape does not matter: the biases of GPT-OSS's experts are matrices. transformers' Trainer differs in two points. It
    decays vectors with other names, such as attention sinks and Mamba's `A_log`. It also looks at the names of all
    modules above a parameter, so that in `roberta_prelayernorm` it decays no weight of a linear layer.
    """
    no_decay = set()
    for path, module in model.named_modules(remove_duplicate=False):
        own, kind = path.rpartition(".")[2].lower(), type(module).__name__.lower()
        role = "bias" in own or _NORM.search(own) or re.search(r"norm(\dd)?$", kind)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.ndim < 2 or role or "bias" in name.lower() or _NORM.search(name.lower()):
                no_decay.add(parameter)
    return no_decay


def compute_layer_scales(model: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Return each parameter's share of the learning rate, decay^depth (Clark et al. 2020, appendix B; Bao et al. 2022).

    `minilm.optim.parameter_depth.parameter_depths` gives the depth: 0 after the layers (norms, poolers, heads), 1 to n
    for the n layers from the top, and n + 1 for the embeddings. A weight that a head shares with the embeddings has the
    depth of the embeddings. If several models share a weight, the largest of its depths counts.
    """
    scales: dict[nn.Parameter, float] = {}
    for network in _find_networks(model):
        if any(parameter.requires_grad for parameter in network.parameters()):
            for parameter, depth in parameter_depths(network).items():
                scales[parameter] = min(decay**depth, scales.get(parameter, 1.0))
    return scales


def _find_networks(model: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield each model of transformers in `model` that is not inside another one."""
    if isinstance(model, PreTrainedModel):
        yield model
        return
    for child in model.children():
        yield from _find_networks(child)


def apply_update(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> Tensor:
    """Clip the gradient to `max_grad_norm`, make one step, and return the gradient's norm before clipping.

    Returns a float32 scalar on the device. The step changes nothing if the norm is infinite or NaN. A fused kernel
    clips by itself (it divides gradients by `grad_scale`) and skips by itself (if `found_inf` is not 0), which spares a
    pass over the gradients and a wait for the device. Other optimizers do neither, so that the CPU waits for the norm.
    Under fp16 the scaler decides whether to skip.
    """
    inner, fused = unwrap_optimizer(optimizer), is_fused(optimizer)
    if fused and accelerator.scaler is None and not accelerator.is_fsdp2:
        gradients = [p.grad for group in inner.param_groups for p in group["params"] if p.grad is not None]
        grad_norm = nn.utils.get_total_norm(gradients)
        # The divisor of torch's clip_grad_norm_.
        inner.grad_scale = ((grad_norm + 1e-6) / max_grad_norm).clamp(min=1)
    else:
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
    if fused and accelerator.scaler is None:
        inner.found_inf = (~grad_norm.isfinite()).float()
    elif accelerator.scaler is None and not grad_norm.isfinite():
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            parameter.grad = None
    optimizer.step()
    return grad_norm


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the update is one kernel that can also clip, and skip a non-finite gradient (not on MPS)."""
    group = optimizer.param_groups[0]
    return bool(group.get("fused")) and all(parameter.device.type != "mps" for parameter in group["params"])


def unwrap_optimizer(optimizer: torch.optim.Optimizer) -> Any:
    """Return the optimizer inside accelerate's wrapper, if any: a fused kernel reads attributes of the inner one."""
    return getattr(optimizer, "optimizer", optimizer)
