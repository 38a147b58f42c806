"""The optimizer, and the learning rate as a pure function of the step."""

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm.config import Optim
from minilm.depth import parameter_depths


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """Fused AdamW over groups: weights with weight decay, and those of `without_decay` without.

    With a layer decay there are two groups for each depth; a group's `scale` is its share of the learning rate. Raises
    ValueError where the model has no layers to tell apart.
    """
    scales = {} if optim.layer_decay == 1 else layer_scales(model, optim.layer_decay)
    exempt = without_decay(model)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((scales.get(parameter, 1.0), parameter not in exempt), []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": optim.weight_decay if decays else 0.0, "scale": scale}
        for (scale, decays), parameters in groups.items()
    ]
    return torch.optim.AdamW(settings, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


# Names of a norm, as transformers' Trainer knows them.
_NORM = re.compile(r"layernorm|rmsnorm|(^|_)norm$")


def without_decay(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that weight decay leaves alone: biases, norms, and all vectors.

    A bias or a norm is one by its own name or by the name or class of the module that holds it, whatever its shape: the
    biases of GPT-OSS's experts are matrices. That is the rule of transformers' Trainer but for two things. Trainer
    decays vectors of other names, such as attention sinks and Mamba's `A_log`. And it takes the names of all modules
    around into account, so that it decays nothing in `roberta_prelayernorm`, weights of linear layers included.
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
    """Each parameter's share of the learning rate, decay^depth (Clark et al. 2020, appendix B; Bao et al. 2022).

    The depth is that of `minilm.depth.parameter_depths`: 0 for what follows the layers (norms, poolers, heads), 1 to n
    for the n layers from the top, and n + 1 for the embeddings. Weights that a head shares with the embeddings are
    theirs, and weights that several models share are those of the model in which they lie deepest.
    """
    scales: dict[nn.Parameter, float] = {}
    for network in _networks(model):
        if any(parameter.requires_grad for parameter in network.parameters()):
            for parameter, depth in parameter_depths(network).items():
                scales[parameter] = min(decay**depth, scales.get(parameter, 1.0))
    return scales


def _networks(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The models of transformers inside `model`, those inside another one left out."""
    if isinstance(model, PreTrainedModel):
        yield model
        return
    for child in model.children():
        yield from _networks(child)


def skip_unless_finite(accelerator: Accelerator, optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> None:
    """Let the next `optimizer.step()` change nothing when the gradient's norm is infinite or not a number.

    A fused kernel looks at the flag on its device, so that nobody waits; another optimizer is left without gradients,
    which waits for the device. Under fp16 the scaler does the same.
    """
    if accelerator.scaler is not None:
        return
    if is_fused(optimizer):
        unwrapped(optimizer).found_inf = (~grad_norm.isfinite()).float()
    elif not grad_norm.isfinite():
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            parameter.grad = None


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its update is one kernel, which also clips and looks at whether the gradient is finite (not on MPS)."""
    group = optimizer.param_groups[0]
    return bool(group.get("fused")) and all(parameter.device.type != "mps" for parameter in group["params"])


def unwrapped(optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer inside accelerate's wrapper, if it is in one: what its fused kernel looks at must be set there."""
    return getattr(optimizer, "optimizer", optimizer)


def warmup_steps(optim: Optim, total: int) -> int:
    """Steps of the warm-up of a run of `total`."""
    return int(optim.warmup) if optim.warmup >= 1 else round(optim.warmup * total)


def learning_rate(optim: Optim, step: int, total: int) -> float:
    """The rate of the update from step `step` (from 0) of `total`.

    It rises linearly to `optim.lr` at the last step of the warm-up, then falls to reach zero after the last step of all
    along a line or a half cosine (Loshchilov and Hutter 2017, equation 5, without restarts), or stays.
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
