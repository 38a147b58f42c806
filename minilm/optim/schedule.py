"""The learning rate as a function of the step."""

import math
from collections.abc import Callable

from minilm.config import Optim
from minilm.config.step_counts import count_steps

# For each shape of a decay, the share of the way that is left at `progress`, from 1 at 0 to 0 at 1.
_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}


def count_warmup_steps(optim: Optim, total: int) -> int:
    """Return the number of warm-up steps in a run of `total` steps."""
    return count_steps(optim.warmup, total)


def count_decay_steps(optim: Optim, total: int) -> int:
    """Return the number of steps in a run of `total` steps that `optim.decay` asks for."""
    return count_steps(optim.decay, total)


def find_schedule_problems(optim: Optim, total: int) -> list[str]:
    """Return a sentence for each part of the schedule that a run of `total` steps is too short for."""
    warmup, decay = count_warmup_steps(optim, total), count_decay_steps(optim, total)
    rest = total - warmup
    if rest <= 0:
        return [f"optim.warmup is {warmup} steps and the run has {total}: the learning rate never reaches optim.lr"]
    if optim.schedule == "wsd" and decay > rest:
        return [f"optim.decay is {decay} steps and the run has {rest} after its warm-up: the decay takes all those"]
    return []


def learning_rate(optim: Optim, step: int, total: int) -> float:
    """Return the learning rate of step `step`, counted from 0, in a run of `total` steps.

    The rate rises linearly to `optim.lr` at step w - 1, the last one of a warm-up of w steps. `optim.schedule` decides
    what follows. A decay from step `first` on would reach its end one step after the last:

        rate(step) = lr * (f + (1 - f) * shape(p)),    p = (step - first) / (total - first),    f = optim.final_lr

    - `constant`: the rate stays at `lr`.
    - `linear`: the decay begins after the warm-up, and shape(p) = 1 - p.
    - `cosine`: as `linear` with shape(p) = (1 + cos(pi p)) / 2 (Loshchilov and Hutter 2017, "SGDR", equation 5,
      without restarts).
    - `wsd` (warm-up, stable, decay): the rate stays at `lr`, and the last `optim.decay` of the steps decay (Hu et al.
      2024, "MiniCPM", section 4; Hägele et al. 2024, "Scaling laws and compute-optimal training beyond fixed training
      durations", section 3). The shape is `optim.decay_shape`: `linear`, `cosine` or `1-sqrt`, which is
      shape(p) = 1 - sqrt(p) (Hägele et al. 2024, section 3.2). The rates before the decay do not depend on `total` if
      the warm-up is given in steps. A decay that is longer than the steps after the warm-up takes all of those.
    - `inverse-sqrt`: lr * sqrt(w / step), but at least lr * f (Vaswani et al. 2017, "Attention is all you need",
      equation 3). It does not depend on `total` if the warm-up is given in steps. A w of 0 counts as 1.
    """
    warmup = count_warmup_steps(optim, total)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "inverse-sqrt":
        return optim.lr * max(optim.final_lr, math.sqrt(max(1, warmup) / max(1, step)))
    first, shape = warmup, str(optim.schedule)
    if optim.schedule == "wsd":
        first, shape = max(warmup, total - count_decay_steps(optim, total)), optim.decay_shape
    if optim.schedule == "constant" or step <= first:
        return optim.lr
    progress = min(1.0, (step - first) / max(1, total - first))
    return optim.lr * (optim.final_lr + (1 - optim.final_lr) * _SHAPES[shape](progress))
