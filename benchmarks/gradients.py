"""Compare the gradient of a contender's first step with the exact one, in fp32.

The exact gradient is that of the mean loss over all targets of the step. transformers' plain model computes it, with
the same weights and examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from comparison import Contender, Rounds, Task, TurnResult, build_parts, compare, run_minilm, take_turns
from hf_trainer import TurnTrainer, find_rows
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from minilm.objectives.factory import build_network

SCALE, ERROR = "gradient_scale", "gradient_error"


@dataclass(frozen=True, kw_only=True)
class GradientCheck:
    """How a gradient differs from the exact one."""

    scale: float
    """Length of the gradient in the direction of the exact one, as a multiple of the exact one's length."""
    error: float
    """Length of what is left after division by the scale, as a share of the exact gradient's length."""

    def __str__(self) -> str:
        return f"{self.scale:5.2f}x  {self.error:7.1e}"


def compute_exact_gradient(model: Any, batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the gradient of the mean loss over all targets of some padded batches, by the name of the parameter."""
    # Causal LMs of transformers shift the labels by themselves.
    shift = int(type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    losses, targets = [], 0
    for batch in batches:
        labels = batch["labels"]
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        if labels.dim() > 1:
            labels, logits = labels[:, shift:], logits[:, : logits.shape[1] - shift]
        losses.append(nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum"))
        targets += int((labels != -100).sum())
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(torch.stack(losses).sum() / targets, [*named.values()], allow_unused=True)
    return {name: found for name, found in zip(named, gradients, strict=True) if found is not None}


def check_gradient(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Return the scale and the error of a gradient."""
    theirs, ours = (torch.cat([part[name].flatten() for name in exact]).double() for part in (exact, found))
    scale = float(ours @ theirs / (theirs @ theirs))
    return {SCALE: scale, ERROR: float((ours / scale - theirs).norm() / theirs.norm())}


class CheckedTrainer(TurnTrainer):
    """A Trainer that checks the gradient of its steps before it clips it."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.batches: list[dict[str, Tensor]] = []

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Make Trainer's own pass over a micro-batch. After the last one, check the gradient."""
        self.batches.append(dict(inputs))
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:
            found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            self.turns.figures = check_gradient(found, compute_exact_gradient(model, self.batches))
            self.batches = []
        return loss


def run_checked_minilm(task: Task) -> None:
    """Run minilm, and check the gradient of its first step."""
    # A gradient that is not clipped stays as it was until the optimizer's step.
    parts = build_parts(replace(task.config, optim=replace(task.config.optim, max_grad_norm=0.0)))
    update, found = parts.optimizer.step, dict[str, Tensor]()

    def step(*arguments: Any) -> Any:
        named = parts.network.named_parameters()
        found.update({name: p.grad.clone() for name, p in named if p.grad is not None})
        return update(*arguments)

    parts.optimizer.step = step  # type: ignore[method-assign, assignment]
    task.connection.send(parts.work)
    turns = take_turns(parts, task.turns)
    task.connection.recv()
    turn = next(turns)
    plain = build_network(task.config, parts.prepared)
    data, collate, size = find_rows(task.config, parts.prepared, 1, in_order=True)
    exact = compute_exact_gradient(plain, [collate([data[row] for row in range(size)])])
    task.connection.send(replace(turn, evaluation=check_gradient(found, exact)))
    task.connection.recv()


def checked(contender: Contender) -> Contender:
    """Return the contender with one step, whose gradient is checked."""
    run: Any = contender.run
    return replace(contender, run=run_checked_minilm if run is run_minilm else partial(run, kind=CheckedTrainer))


def read_check(turns: list[TurnResult]) -> GradientCheck:
    """Return the check that a contender sent with its first turn."""
    figures = turns[0].evaluation
    return GradientCheck(scale=figures[SCALE], error=figures[ERROR])


def check_gradients(contenders: Sequence[Contender]) -> list[GradientCheck | None]:
    """Return the check of each contender's first step. The batches of `group=epoch` are not checked."""
    sides = [side for side in contenders if not (side.run is run_minilm and side.biased)]
    turns = iter(compare([checked(side) for side in sides], "fp32", Rounds(count=1, warm_up=0)))
    return [read_check(next(turns)) if side in sides else None for side in contenders]
