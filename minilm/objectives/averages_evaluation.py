"""The evaluation of a model with its last weights and with the averages of its weights."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from minilm.objectives.evaluator import Evaluator
from minilm.objectives.example_evaluation import FigureTable
from minilm.objectives.objective import Objective
from minilm.optim.averages import averaged_weights

PREFIX = "ema_"
"""The beginning of the names of the averages' figures: "ema_eval_loss"."""


@dataclass(frozen=True, kw_only=True)
class AveragesEvaluator:
    """Evaluates the last weights, and then the averages that `minilm.optim.averages.average_weights` keeps."""

    evaluator: Evaluator
    optimizer: torch.optim.Optimizer

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.evaluator.names, *(PREFIX + name for name in self.evaluator.names))

    def __call__(self, accelerator: Accelerator, model: nn.Module) -> FigureTable:
        last = self.evaluator(accelerator, model)
        with averaged_weights(model, self.optimizer):
            averages = self.evaluator(accelerator, model)
        return FigureTable(
            values=last.figures() | {PREFIX + name: value for name, value in averages.figures().items()},
            per_example={**last.per_example, **{PREFIX + name: own for name, own in averages.per_example.items()}},
        )


def format_all_figures(objective: Objective, figures: dict[str, float]) -> str:
    """Return the figures of an evaluation as one line for the log, first those of the last weights."""
    text = objective.format_figures({name: value for name, value in figures.items() if not name.startswith(PREFIX)})
    averages = {name.removeprefix(PREFIX): value for name, value in figures.items() if name.startswith(PREFIX)}
    return f"{text}; averaged weights: {objective.format_figures(averages)}" if averages else text
