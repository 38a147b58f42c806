"""The optimizer, AdamW or Muon, and its groups of parameters for weight decay and layer decay."""

import logging
import math
import re
from collections.abc import Collection
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minilm.config import Optim
from minilm.optim.forward_probe import find_networks
from minilm.optim.muon import Muon
from minilm.optim.parameter_depth import parameter_depths
from minilm.optim.weight_matrices import MatrixLayout, find_matrices

log = logging.getLogger("minilm")


def build_optimizer(model: nn.Module, optim: Optim, precision: str = "fp32") -> torch.optim.Optimizer:
    """Return fused AdamW with two groups of parameters, one with weight decay and one without; or Muon.

    With a layer decay there are two groups for each depth. The entry `scale` of a group is its share of the
    learning rate; `train_step` multiplies the rate of the step by it. With Muon, the matrices inside the layers are
    in groups of their own (`minilm.optim.weight_matrices`). precision: that of the run. Muon's iteration uses bf16
    if it is `bf16`, else fp32. Raises ValueError for a layer decay if the depths of the parameters cannot be found,
    and for Muon if the model trains no matrix inside a layer.
    """
    scales = {} if optim.layer_decay == 1 else compute_layer_scales(model, optim.layer_decay)
    no_decay = find_no_decay_parameters(model)
    layouts = find_muon_matrices(model, no_decay) if optim.name == "muon" else {}
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = (scales.get(parameter, 1.0), parameter not in no_decay, parameter in layouts)
            groups.setdefault(kind, []).append(parameter)
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for (scale, decays, is_matrix), parameters in groups.items():
        group = {"params": parameters, "weight_decay": optim.weight_decay if decays else 0.0, "scale": scale}
        if is_matrix:
            matrices.append(group | {"layouts": [layouts[parameter] for parameter in parameters]})
        else:
            others.append(group)
    if not layouts:
        return torch.optim.AdamW(others, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    return Muon(
        matrices,
        others,
        lr=optim.lr,
        momentum=optim.muon_momentum,
        iterations=optim.muon_iterations,
        scale=optim.muon_scale,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        betas=optim.betas,
        eps=optim.eps,
    )


def find_muon_matrices(model: nn.Module, exclude: Collection[nn.Parameter]) -> dict[nn.Parameter, MatrixLayout]:
    """Return the layouts of the matrices that Muon trains, and log what it trains and what it leaves to AdamW.

    Raises ValueError if there are none.
    """
    layouts, unknown = find_matrices(model, exclude)
    if not layouts:
        raise ValueError(
            f"optim.name muon trains matrices inside the layers, and this model trains none{unknown and f': {unknown}'}"
            ": take optim.name adamw"
        )
    count = sum(len(layout.sizes) * math.prod(p.shape[:-2]) for p, layout in layouts.items())
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info(
        f"Muon trains {count:,} matrices of {sum(p.numel() for p in layouts):,} parameters, and AdamW the other "
        f"{total - sum(p.numel() for p in layouts):,}"
    )
    if unknown:
        log.info(f"of the matrices inside the layers, AdamW trains {unknown}")
    return layouts


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
    for network in find_networks(model):
        if any(parameter.requires_grad for parameter in network.parameters()):
            for parameter, depth in parameter_depths(network).items():
                scales[parameter] = min(decay**depth, scales.get(parameter, 1.0))
    return scales


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
    """Return whether the update can also clip, and skip a non-finite gradient, as fused kernels do (not on MPS)."""
    group = optimizer.param_groups[0]
    return bool(group.get("fused")) and all(parameter.device.type != "mps" for parameter in group["params"])


def unwrap_optimizer(optimizer: torch.optim.Optimizer) -> Any:
    """Return the optimizer inside accelerate's wrapper, if any: a fused kernel reads attributes of the inner one."""
    return getattr(optimizer, "optimizer", optimizer)
