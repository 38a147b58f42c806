"""The optimizer, and the learning rate as a pure function of the step."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm.config import Optim


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """Fused AdamW over groups: matrices and embeddings with weight decay, vectors (biases, norms) without.

    With a layer decay there are two groups for each depth; a group's `scale` is its share of the learning rate. Raises
    ValueError where the model has no layers to tell apart.
    """
    scales = {} if optim.layer_decay == 1 else layer_scales(model, optim.layer_decay)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((scales.get(parameter, 1.0), parameter.ndim >= 2), []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": optim.weight_decay if decays else 0.0, "scale": scale}
        for (scale, decays), parameters in groups.items()
    ]
    return torch.optim.AdamW(settings, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def layer_scales(model: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Each parameter's share of the learning rate, decay^depth (Clark et al. 2020, appendix B; Bao et al. 2022).

    The depth is 0 for what follows the layers (norms, poolers, heads), 1 to n for the n layers from the top, and n + 1
    for what comes before them, the embeddings. Weights that a head shares with the embeddings are theirs.
    """
    network = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    count: int = getattr(network.config.get_text_config(), "num_hidden_layers", -1)
    lists = [m for m in network.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ValueError(f"{type(network).__name__} has no list of layers: leave optim.layer_decay at 1")
    below = {parameter: count - number for number, layer in enumerate(lists[0]) for parameter in layer.parameters()}
    depth, scales = count + 1, {}
    for parameter in network.base_model.parameters():  # in the order in which they are used
        depth = below.get(parameter, depth if depth > count else 0)
        scales[parameter] = decay**depth
    return scales


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
