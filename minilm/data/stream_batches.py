"""The steps of a run over a stream: the plan, the rows and the collator of its windows, one after the other.

Each window has a plan of its own, as if it were an epoch, and a collator of its own. The loop does not see where a
window ends. The number of an example is that of its window and its place in the window, in one integer.
"""

import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from minilm.data.batch_plan import Plan, Step
from minilm.data.corpus import Examples
from minilm.data.micro_batch import Collator, MicroBatch
from minilm.data.phased_batches import PlanPart, RunPlan
from minilm.data.stream_windows import StreamWindows
from minilm.data.window_encoder import encode_ahead, end_starved_encoders, has_encoder
from minilm.utils.launch_variables import is_local_main_process

log = logging.getLogger("minilm")

# The number of bits for an example's place in its window.
_PLACE_BITS = 32


@dataclass(frozen=True, kw_only=True)
class _OpenWindow:
    """A window that this process reads."""

    start: int
    """Its first step."""
    examples: Examples
    plan: Plan


class WindowReader:
    """Opens the windows of a stream where a step or an example needs them, and lets the next one be encoded.

    make_plan: returns the plan of a window's examples, for an epoch of a number. A window counts as an epoch, so that
        its order and its masks differ from those of all other windows.
    check: called with the number and the examples of each window before its first step.
    steps: the steps of the run. No window is encoded ahead that begins after them.
    """

    def __init__(
        self,
        windows: StreamWindows,
        make_plan: Callable[[Examples, int], Plan],
        check: Callable[[int, Examples], None],
        steps: int,
    ) -> None:
        self._windows, self._make_plan, self._check, self._steps = windows, make_plan, check, steps
        self._open = dict[int, _OpenWindow]()

    def at_step(self, step: int) -> tuple[int, _OpenWindow]:
        """Return the number of the window that holds a step, and the window."""
        self._wait_for_encoder(step)
        number = self._windows.find(step).number
        return number, self.window(number)

    def _wait_for_encoder(self, step: int) -> None:
        """Wait for its encoder if the window of a step is not encoded yet, and log that all hosts wait for this one."""
        if not self._open or not has_encoder(self._windows):
            return
        following = max(self._open) + 1
        if step < self._windows.start_of(following).step or self._windows.is_encoded(following):
            return
        if is_local_main_process(os.environ):
            # An error, since processes other than the main one show only these.
            log.error(
                f"host {socket.gethostname()}: training waits for window {following + 1} of the stream, which this "
                "host has not encoded yet"
            )
        end_starved_encoders(self._windows, following)

    def passes_before(self, step: int) -> int:
        """Return the number of complete passes over the stream before the window of the step before."""
        return min(pool.passes for pool in self._windows.find(max(0, step - 1)).pools)

    def window(self, number: int) -> _OpenWindow:
        """Return the window of a number."""
        if number not in self._open:
            examples = self._windows.open(number)
            self._check(number, examples)
            window = _OpenWindow(
                start=self._windows.start_of(number).step, examples=examples, plan=self._make_plan(examples, number)
            )
            # Loader workers may be a few steps ahead of each other, so the window before stays open.
            self._open = {other: kept for other, kept in self._open.items() if other == number - 1} | {number: window}
            if self._windows.start_of(number + 1).step < self._steps:
                encode_ahead(self._windows, number + 1)
        return self._open[number]


class StreamPlan(RunPlan):
    """The steps of a stream. What a message or a file says about all steps comes from the sample of the stream.

    sample: the plan of the sample.
    """

    def __init__(self, sample: Plan, reader: WindowReader, steps: int) -> None:
        super().__init__([PlanPart(start=0, plan=sample, first_number=0)])
        # A stream may end long after the run. So the run counts as its epoch.
        self.steps_per_epoch = steps
        self.reader = reader

    def step(self, index: int) -> Step:
        number, window = self.reader.at_step(index)
        step = window.plan.step(index - window.start)
        first = number << _PLACE_BITS
        return replace(step, micro_batches=[[ids + first for ids in ids_] for ids_ in step.micro_batches])

    def epochs_after(self, steps: int) -> float:
        """Return the number of complete passes over the stream after the first `steps` steps."""
        return self.reader.passes_before(steps)


class StreamRows:
    """The training examples of a stream by their numbers."""

    def __init__(self, reader: WindowReader) -> None:
        self._reader = reader

    def __getitem__(self, index: int, /) -> NDArray[np.int64]:
        number, place = divmod(index, 1 << _PLACE_BITS)
        return self._reader.window(number).examples[place]


class StreamCollator:
    """The collators of a stream's windows (a `minilm.data.micro_batch.Collator`).

    sample: the collator of the sample. make_collator: returns the collator of a window's examples.
    """

    def __init__(self, reader: WindowReader, sample: Collator, make_collator: Callable[[Examples], Collator]) -> None:
        self._reader, self._sample, self._make_collator = reader, sample, make_collator
        self.padded, self.multiple = sample.padded, sample.multiple
        self._current: tuple[int, Collator] | None = None

    def rate(self, progress: float = 0.0) -> float:
        """Return the share of the tokens that are targets when the share `progress` of the run's steps is done."""
        return self._sample.rate(progress)

    def __call__(
        self, rows: Sequence[NDArray[np.int64]], examples: NDArray[np.int64], epoch: int, progress: float = 0.0
    ) -> MicroBatch:
        """Make a batch of `rows` of token ids. `examples` are the numbers of their examples, int64[R]."""
        if not len(examples):
            return self._sample(rows, examples, epoch, progress)
        # All examples of a step are in one window.
        number = int(examples[0]) >> _PLACE_BITS
        if self._current is None or self._current[0] != number:
            self._current = number, self._make_collator(self._reader.window(number).examples)
        return self._current[1](rows, examples - (number << _PLACE_BITS), epoch, progress)
