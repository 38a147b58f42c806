"""The steps of a run whose settings change: one plan, one numbering of the examples and one collator for all of them.

`minilm.config.phases.list_periods` says where the settings change. Each period has a plan, examples and a collator of
its own; the classes here put them together. So the loop does not see where a period ends. A later period does not
change an earlier step.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from minilm.data.batch_plan import Plan, Step
from minilm.data.corpus import Examples, PreparedData
from minilm.data.micro_batch import Collator, MicroBatch


class TokenRows(Protocol):
    """Rows of token ids by the number of their example."""

    def __getitem__(self, index: int, /) -> NDArray[np.int64]: ...


class StepPlan(Protocol):
    """Steps by their index, as in a `Plan` or a `RunPlan`."""

    def step(self, index: int) -> Step:
        """Return step `index`, counted from 0."""


class JoinedExamples:
    """The training examples of all periods under one numbering. Periods with the same examples share their numbers."""

    def __init__(self, prepared: PreparedData) -> None:
        self._parts = prepared.all_train
        self._starts = np.cumsum([0, *map(len, self._parts)]).tolist()

    def first_number(self, examples: Examples) -> int:
        """Return the number of the first of these examples."""
        (part,) = (part for part, others in enumerate(self._parts) if others is examples)
        return int(self._starts[part])

    def __getitem__(self, index: int, /) -> NDArray[np.int64]:
        part = bisect_right(self._starts, index) - 1
        return self._parts[part][index - self._starts[part]]


@dataclass(frozen=True, kw_only=True)
class PlanPart:
    """A plan that holds from a step on."""

    start: int
    """The first step of the plan, counted from 0."""
    plan: Plan
    first_number: int
    """The number of the plan's example 0."""


class RunPlan:
    """The plans of a run, one after the other. All steps are a pure function of the parts and of the step.

    parts: in their order. The first begins at step 0.
    """

    def __init__(self, parts: Sequence[PlanPart]) -> None:
        self.parts = parts
        # What a message or a file says about all steps holds for the first ones.
        first = parts[0].plan
        self.padded, self.multiple = first.padded, first.multiple
        self.examples, self.unit, self.rows = first.examples, first.unit, first.rows
        self.steps_per_epoch = first.steps_per_epoch
        self._starts = [part.start for part in parts]

    def step(self, index: int) -> Step:
        """Return step `index` of the run, counted from 0."""
        part = self._part_of(index)
        step = part.plan.step(index - part.start)
        if part.first_number == 0:
            return step
        return replace(step, micro_batches=[[ids + part.first_number for ids in ids_] for ids_ in step.micro_batches])

    def epoch_of(self, index: int) -> int:
        """Return the epoch of step `index`, from 0."""
        part = self._part_of(index)
        return part.plan.epoch_of(index - part.start)

    def examples_of(self, index: int) -> NDArray[np.int64]:
        """Return the examples of step `index`, which is faster than `step`."""
        part = self._part_of(index)
        return part.plan.examples_of(index - part.start) + part.first_number

    def largest_micro_batch_tokens(self, index: int) -> int:
        """Return the number of tokens in the largest micro-batch of step `index`, with padding."""
        part = self._part_of(index)
        return part.plan.largest_micro_batch_tokens(index - part.start)

    def epochs_after(self, steps: int) -> float:
        """Return the number of passes over the examples after the first `steps` steps."""
        stops = [*self._starts[1:], steps]
        return sum(
            max(0, min(stop, steps) - part.start) / part.plan.steps_per_epoch
            for part, stop in zip(self.parts, stops, strict=True)
        )

    def padding_share(self) -> float:
        """Return the share of the tokens that are padding, in the first steps of the first part."""
        return self.parts[0].plan.padding_share()

    def _part_of(self, index: int) -> PlanPart:
        return self.parts[bisect_right(self._starts, index) - 1]


@dataclass(frozen=True, kw_only=True)
class CollatorPart:
    """A collator that holds from a step on."""

    start: float
    """The share of the run's steps that are done when it begins."""
    collator: Collator
    first_number: int
    """The number of the collator's example 0."""


class RunCollator:
    """The collators of a run, one after the other (a `minilm.data.micro_batch.Collator`).

    parts: in their order. The first begins at 0.
    """

    def __init__(self, parts: Sequence[CollatorPart]) -> None:
        self._parts = parts
        self._starts = [part.start for part in parts]
        self.padded, self.multiple = parts[0].collator.padded, parts[0].collator.multiple

    def rate(self, progress: float = 0.0) -> float:
        """Return the share of the tokens that are targets when the share `progress` of the run's steps is done."""
        return self._part_at(progress).collator.rate(progress)

    def __call__(
        self, rows: Sequence[NDArray[np.int64]], examples: NDArray[np.int64], epoch: int, progress: float = 0.0
    ) -> MicroBatch:
        """Make a batch of `rows` of token ids. `examples` are the numbers of their examples, int64[R]."""
        part = self._part_at(progress)
        return part.collator(rows, examples - part.first_number, epoch, progress)

    def _part_at(self, progress: float) -> CollatorPart:
        return self._parts[bisect_right(self._starts, progress) - 1]
