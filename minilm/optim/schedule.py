"""The learning rate as a function of the step."""

import math

from minilm.config import Optim


def count_warmup_steps(optim: Optim, total: int) -> int:
    """Return the number of warm-up steps in a run of `total` steps."""
    return int(optim.warmup) if optim.warmup >= 1 else round(optim.warmup * total)


def learning_rate(optim: Optim, step: int, total: int) -> float:
    """Return the learning rate of step `step`, counted from 0, in a run of `total` steps.

    The rate rises linearly to `optim.lr` at the last step of the warm-up. With the schedule `constant` it stays there.
    Otherwise it falls, and would reach 0 one step after the last: `linear` follows a line, and `cosine` half a cosine
    (Loshchilov and Hutter 2017, equation 5, without restarts).
    """
    warmup = count_warmup_steps(optim, total)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optim.lr * max(0.0, 1 - progress)
