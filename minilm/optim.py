"""The optimizer, and the learning rate as a pure function of the step."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from minilm.config import Optim


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """Fused AdamW over two groups: matrices and embeddings with weight decay, vectors (biases, norms) without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def skip_unless_finite(accelerator: Accelerator, optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> None:
    """Let the next `optimizer.step()` change nothing when the gradient's norm is infinite or not a number.

    The fused kernel looks at the flag on its device, so that nobody waits. Under fp16 the scaler does the same.
    """
    if accelerator.scaler is None:
        fused: Any = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
        fused.found_inf = (~grad_norm.isfinite()).float()


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
