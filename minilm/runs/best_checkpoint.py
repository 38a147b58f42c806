"""The best evaluation so far, whose checkpoint is kept, and the patience of a run that does not improve."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from minilm.config import Run
from minilm.objectives.metrics import lower_is_better
from minilm.runs.checkpoint import Progress
from minilm.utils.validation import suggest_name


class BestEvaluation:
    """The best evaluation so far by `run.best_metric`. A resumed run continues from `progress`.

    names: the names of the figures of an evaluation. Raises ValueError if `run.best_metric` is not one of them.
    """

    def __init__(self, run: Run, names: Sequence[str], progress: Progress) -> None:
        if run.best_metric not in names:
            raise ValueError(f"run.best_metric {suggest_name(run.best_metric, names)}")
        self.metric, self.patience = run.best_metric, run.patience
        self.value, self.step, self.stale = progress.best, progress.best_step, progress.stale
        self._last: tuple[int, float | None] = (0, None)

    def update(self, figures: Mapping[str, float], step: int) -> bool:
        """Record the evaluation after `step`, and return whether it is better than all before it."""
        value = figures[self.metric]
        finite = value if math.isfinite(value) else None
        self._last = (step, finite)
        sign = -1 if lower_is_better(self.metric) else 1
        better = finite is not None and (self.value is None or sign * finite > sign * self.value)
        if better:
            self.value, self.step, self.stale = finite, step, 0
        else:
            self.stale += 1
        return better

    @property
    def out_of_patience(self) -> bool:
        """Whether none of the last `run.patience` evaluations was better than those before."""
        return self.patience is not None and self.stale >= self.patience

    def state_after(self, step: int) -> dict[str, Any]:
        """Return the fields of `Progress` about evaluations, as they are after `step`."""
        figure = self._last[1] if self._last[0] == step else None
        return {"figure": figure, "best": self.value, "best_step": self.step, "stale": self.stale}
