"""Whether a run with other settings would have made the same steps as the run that wrote a checkpoint.

The learning rate, the mask rate and the phase of a step are functions of the settings, the step and the number of
steps. So a run may be resumed with other values of these settings if they change no step before the checkpoint. The
result is then the run that had these settings from its start.
"""

import json
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from minilm.config import Config, MaskedLM
from minilm.config.phases import list_periods
from minilm.objectives.objective import Objective
from minilm.optim.schedule import learning_rate

_LENGTH = ("run.epochs", "run.max_steps", "run.phases")
_LEARNING_RATE = tuple(f"optim.{name}" for name in ("lr", "schedule", "warmup", "decay", "decay_shape", "final_lr"))
_MASK_RATE = tuple(f"objective.{name}" for name in ("rate", "final_rate", "rate_decay"))


@dataclass(frozen=True, kw_only=True)
class StepChange:
    """The first step that differs between two configurations."""

    step: int
    """The number of the step, from 1 as in log.jsonl."""
    what: str
    """What differs, such as "learning rate"."""
    before: str
    now: str


def compared_settings(config: Config) -> tuple[str, ...]:
    """Return the names of the settings that `find_first_change` compares."""
    return (*_LENGTH, *_LEARNING_RATE, *(_MASK_RATE if isinstance(config.objective, MaskedLM) else ()))


def find_first_change(
    before: Config,
    now: Config,
    *,
    steps: int,
    steps_per_epoch: int,
    own_rate: Callable[[int, int], float] | None = None,
) -> StepChange | None:
    """Return the first of `steps` steps that differs between two configurations.

    Only the settings in `compared_settings` may differ. The learning rate, the mask rate and the settings that phases
    change are compared to the bit. If the user's objective has a collator of its own, which may use the progress of the
    run, that is compared too.

    own_rate: the user's function that gives the learning rate of a step in place of `optim`.
    """
    if before == now:
        return None
    courses = [_follow(config, config.run.count_steps(steps_per_epoch), own_rate) for config in (before, now)]
    for step in range(steps):
        old, new = (settings_of(step) for settings_of in courses)
        for what in old:
            if old[what] != new[what]:
                return StepChange(step=step + 1, what=what, before=_write(old[what]), now=_write(new[what]))
    return None


def _follow(
    config: Config, total: int, own_rate: Callable[[int, int], float] | None
) -> Callable[[int], dict[str, Any]]:
    """Return a function that gives what a step depends on, of what may change between two configurations."""
    rate_of, periods = own_rate or partial(learning_rate, config.optim), list_periods(config)
    starts = [period.start for period in periods]

    def settings_of(step: int) -> dict[str, Any]:
        current = periods[bisect_right(starts, step) - 1].config
        return {
            "learning rate": rate_of(step, total),
            "mask rate": _mask_rate(current, step / total),
            "progress": step / total if _has_own_collator(config) else 0.0,
            "batch.max_length": current.batch.max_length,
            "batch.examples": current.batch.examples,
            "data.weights": current.data.weights,
        }

    return settings_of


def _write(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


def _has_own_collator(config: Config) -> bool:
    return isinstance(config.objective, Objective) and type(config.objective).collator is not Objective.collator


def _mask_rate(config: Config, progress: float) -> float:
    return config.objective.rate_at(progress) if isinstance(config.objective, MaskedLM) else 0.0
