"""Early stopping of a run: by a signal, and after gradients that are not finite."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType

import torch
from accelerate import Accelerator
from torch import Tensor

from minilm.config import Run
from minilm.data.phased_batches import RunPlan
from minilm.runs.recorder import Recorder
from minilm.utils.errors import TrainingStopped
from minilm.utils.signals import STOP_SIGNALS, die_with_parent, get_last_signal, record_signal

# torchrun forwards a signal within milliseconds. A person takes longer to press ctrl-C again.
ECHO_SECONDS = 2.0


class StopRequest(contextlib.AbstractContextManager["StopRequest"]):
    """A context in which STOP_SIGNALS request a stop after the current step. A second SIGINT ends the process at once.

    Under torchrun, ctrl-C reaches a process twice: from the terminal, and forwarded by the launcher. So a second SIGINT
    within `ECHO_SECONDS` does not count there.

    The processes of a job receive a signal at different moments. `agree_on_stop` makes them stop after the same step.
    `saves` says whether the run then writes a checkpoint. A signal that comes after the last call of `agree_on_stop`
    remains available from `minilm.utils.signals.get_last_signal`.
    """

    def __init__(self, accelerator: Accelerator, *, saves: bool) -> None:
        self.accelerator, self.saves = accelerator, saves
        self.signal, self._answered = get_last_signal(), False
        self._last_signal = -ECHO_SECONDS  # seconds of the monotonic clock
        self._gathered: Tensor | None = None
        self._copied = torch.Event("cuda") if accelerator.device.type == "cuda" else None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle_signal) for number in STOP_SIGNALS}
            die_with_parent()
        return self

    def __exit__(self, *args: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self.signal and not self._answered:
            record_signal(self.signal)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        echo = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._last_signal < ECHO_SECONDS
        if self.signal and number == signal.SIGINT and not echo:
            self._answered = True
            raise KeyboardInterrupt
        self.signal = number
        self._last_signal = time.monotonic()

    def agree_on_stop(self, step: int) -> TrainingStopped | None:
        """Return the exception that ends the run after `step`, or None to continue. All processes get the same.

        Every process calls it after each step. With several processes a signal takes effect one step later, so that no
        step waits for the exchange.
        """
        number = self.signal
        if self.accelerator.num_processes > 1:
            if self._copied is not None:
                self._copied.synchronize()
            number = 0 if self._gathered is None else int(self._gathered.max())
            # torch.full fills on the device. torch.tensor would copy from the host and wait.
            mine = torch.full((1,), self.signal, device=self.accelerator.device)
            self._gathered = self.accelerator.gather(mine).to("cpu", non_blocking=True)
            if self._copied is not None:
                self._copied.record()
        if not number:
            return None
        self._answered = True
        name = signal.Signals(number).name
        hint = (
            "--run.resume latest continues the run" if self.saves else "nothing was saved because run.save_every is 0"
        )
        return TrainingStopped(f"{name} after step {step}; {hint}", 128 + number)


def any_process(accelerator: Accelerator, wish: bool) -> bool:
    """Return whether `wish` is true on any process. All processes call it, and get the same answer."""
    if accelerator.num_processes == 1:
        return wish
    return bool(accelerator.gather(torch.tensor([wish], device=accelerator.device)).any())


def stop_on_bad_gradients(recorder: Recorder, plan: RunPlan, run: Run) -> TrainingStopped | None:
    """Return the exception that ends the run after `run.max_bad_steps` steps in a row without a finite gradient.

    Returns None if there were fewer. The message names the first of these steps and its examples.
    """
    if recorder.bad_steps < run.max_bad_steps:
        return None
    first = recorder.first_bad_step()
    ids = plan.step(first).examples.tolist()
    listed = ", ".join(map(str, ids[:8])) + (", …" if len(ids) > 8 else "")
    saved = (
        f"checkpoint-{recorder.steps} has the last good weights" if run.save_every else "no checkpoint was asked for"
    )
    return TrainingStopped(
        f"no finite gradient in {recorder.bad_steps} steps in a row, since step {first + 1} (examples {listed}); these "
        f"steps changed nothing, and {saved}: look at the examples, or start again with a lower optim.lr",
        1,
    )
