"""The optimizer, and the learning rate as a function of the step alone."""

import math
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
    """Return fused AdamW with a group of parameters that weight decay shrinks, and a group that it leaves alone.

    With a layer decay there are two groups for each depth, and a group's `scale` is its share of the learning rate.
    Raises ValueError if the model then has no layers.
    """
    scales = {} if optim.layer_decay == 1 else layer_scales(model, optim.layer_decay)
    exempt = find_undecayed(model)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((scales.get(parameter, 1.0), parameter not in exempt), []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": optim.weight_decay if decays else 0.0, "scale": scale}
        for (scale, decays), parameters in groups.items()
    ]
    return torch.optim.AdamW(settings, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


# Names of norms in transformers' Trainer.
_NORM = re.compile(r"layernorm|rmsnorm|(^|_)norm$")


def find_undecayed(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that weight decay leaves alone: biases, norms, and all vectors.

    A parameter counts as a bias or a norm by its own name, or by the name or class of the module that holds it. Its
    shape does not matter: the biases of GPT-OSS's experts are matrices. The rule of transformers' Trainer differs in
    two points. It decays vectors with other names, such as attention sinks and Mamba's `A_log`. And it looks at the
    names of all modules above a parameter, so that it decays no weight of a linear layer in `roberta_prelayernorm`.
    """
    exempt = set()
    for path, module in model.named_modules(remove_duplicate=False):
        own, kind = path.rpartition(".")[2].lower(), type(module).__name__.lower()
        role = "bias" in own or _NORM.search(own) or re.search(r"norm(\dd)?$", kind)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.ndim < 2 or role or "bias" in name.lower() or _NORM.search(name.lower()):
                exempt.add(parameter)
    return exempt


def layer_scales(model: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Return each parameter's share of the learning rate, decay^depth (Clark et al. 2020, appendix B; Bao et al. 2022).

    `minilm.optim.parameter_depth.parameter_depths` gives the depth: 0 after the layers (norms, poolers, heads), 1 to n
    for the n layers from the top, and n + 1 for the embeddings. A weight that a head shares with the embeddings has
    their depth. A weight that several models share has the largest of its depths.
    """
    scales: dict[nn.Parameter, float] = {}
    for network in _networks(model):
        if any(parameter.requires_grad for parameter in network.parameters()):
            for parameter, depth in parameter_depths(network).items():
                scales[parameter] = min(decay**depth, scales.get(parameter, 1.0))
    return scales


def _networks(model: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the models of transformers inside `model`, but not the models inside those."""
    if isinstance(model, PreTrainedModel):
        yield model
        return
    for child in model.children():
        yield from _networks(child)


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
        optimizer.zero_grad()
    optimizer.step()
    return grad_norm


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the update is one kernel that can also clip, and skip a non-finite gradient (not on MPS)."""
    group = optimizer.param_groups[0]
    return bool(group.get("fused")) and all(parameter.device.type != "mps" for parameter in group["params"])


def unwrap_optimizer(optimizer: torch.optim.Optimizer) -> Any:
    """Return the optimizer inside accelerate's wrapper, if any: a fused kernel reads attributes of the inner one."""
    return getattr(optimizer, "optimizer", optimizer)


def warmup_steps(optim: Optim, total: int) -> int:
    """Return the number of warm-up steps in a run of `total` steps."""
    return int(optim.warmup) if optim.warmup >= 1 else round(optim.warmup * total)


def learning_rate(optim: Optim, step: int, total: int) -> float:
    """Return the learning rate of step `step`, counted from 0, of `total`.

    The rate rises linearly to `optim.lr` at the last step of the warm-up. Then it stays, or falls to reach zero after
    the last step, along a line or a half cosine (Loshchilov and Hutter 2017, equation 5, without restarts).
    """
    warmup = warmup_steps(optim, total)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return optim.lr * max(0.0, 1 - done)
