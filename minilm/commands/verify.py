"""`minilm verify`: make steps of a run again, from one of its checkpoints to the next, and compare the results.

Order, masks, rates and dropout follow from the configuration and the step. So the same machine must give the same bits.
"""

import json
import logging
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache

from minilm.commands.recipe import exit_on_error
from minilm.config import Config
from minilm.config.serialization import read_checkpoint_config
from minilm.distributed.hardware import describe
from minilm.distributed.launch import lost_peer_as_error, one_job
from minilm.runs.checkpoint import (
    ADAPTER,
    MANIFEST,
    OPTIMIZER,
    WEIGHTS,
    Checkpoint,
    find_complete_checkpoints,
    read_checkpoint,
)
from minilm.runs.checkpoint_parts import find_parts
from minilm.runs.model_card import write_verification
from minilm.runs.resume import SET_BACK, read_precision
from minilm.runs.run_inputs import compare_environments, compare_inputs, compare_periods
from minilm.train import train
from minilm.utils.atomic_files import write_atomically
from minilm.utils.errors import TrainingStopped
from minilm.utils.launch_variables import is_distributed, is_main_process
from minilm.utils.log import show_log
from minilm.utils.signals import interrupt_on_signals

log = logging.getLogger("minilm")

_FILES = {WEIGHTS: "the weights differ", ADAPTER: "the adapter differs", OPTIMIZER: "the optimizer state differs"}
# Fields of log.jsonl that depend on the time, not on the steps.
_TIMED = {"tokens_per_second", "mfu", "seconds", "memory_gb"}
_PROBLEMS = "problems.json"


@dataclass(frozen=True, kw_only=True, order=True)
class StepWindow:
    """The steps of a run between two checkpoints."""

    start: int
    """The step of the first checkpoint, or 0 for the beginning of the run."""
    stop: int
    """The step of the second checkpoint, and the last of the window. Its first step is `start` + 1."""

    def __str__(self) -> str:
        return f"steps {self.start + 1:,} to {self.stop:,}"


@dataclass(frozen=True, kw_only=True)
class WindowResult:
    """What the repetition of a window gave."""

    window: StepWindow
    differences: tuple[str, ...]
    """A phrase for each difference from the run; empty if all bits are equal."""
    environment: tuple[str, ...] = ()
    """A phrase for each library and each fact of the machine that has changed since."""
    losses: int = 0
    """The number of steps in the window."""
    largest_gap: float = math.nan
    """The largest difference between the losses of a step, in nats."""

    def __str__(self) -> str:
        if not self.differences:
            return f"{self.window}: equal to the bit: weights, optimizer state and {self.losses:,} losses"
        text = f"{self.window}: not equal: {'; '.join(self.differences)}"
        if self.environment and not math.isnan(self.largest_gap):
            changes = "; ".join(self.environment)
            text += (
                f"; the losses differ by at most {self.largest_gap:.2g} nats, and the machine has changed: {changes}"
            )
        return text


def verify_run(folder: Path, count: int) -> list[WindowResult]:
    """Repeat `count` random windows of a run, or as many as its checkpoints allow, and return the results.

    They are repeated in a temporary folder, on as many processes as the run had. Where all are equal, the model card
    says so. Raise ValueError if the run has no window; OSError if the processes cannot be started.
    """
    if is_distributed(os.environ):
        raise ValueError("minilm verify starts the processes itself: start it without a launcher")
    windows = choose_windows(folder, count)
    if len(windows) < count:
        log.warning(f"{folder} keeps the checkpoints of {len(windows)} of {count} windows: see run.keep_last")
    # The facts of the newest checkpoint stand for those of the others.
    machine = _read_machine(folder / f"checkpoint-{windows[-1].stop}")
    with tempfile.TemporaryDirectory(prefix="minilm-verify-") as place:
        problems = _start_job(folder, windows, Path(place), machine)
        results = [_compare(folder, window, Path(place), problems.get(str(window))) for window in windows]
    equal = not any(result.differences for result in results)
    text = _describe(results, read_checkpoint(folder / f"checkpoint-{windows[-1].stop}")) if equal else None
    if equal or not any(result.environment for result in results):
        # The results are worth more than the card, which may be on a disk that is full or read-only.
        try:
            write_verification(folder, text)
        except OSError as error:
            log.warning(f"the result is not in {folder / 'README.md'}, which cannot be written: {error.strerror}")
    return results


def choose_windows(folder: Path, count: int) -> list[StepWindow]:
    """Return at most `count` random windows of a run, in their order. Raise ValueError if it has none.

    The steps between two kept checkpoints are a window if no checkpoint between them was removed.
    """
    paths = find_complete_checkpoints(folder)
    if not paths:
        raise ValueError(f"{folder} has no checkpoint: give the output folder of a run with run.save_every above 0")
    every = read_checkpoint_config(paths[-1]).run.save_every
    steps = [0, *(int(path.name.removeprefix("checkpoint-")) for path in paths)]
    windows = [StepWindow(start=start, stop=stop) for start, stop in pairwise(steps) if stop - start <= every]
    if not windows:
        raise ValueError(
            f"{folder} has no two checkpoints that are at most run.save_every={every:,} steps apart: train with "
            f"--run.keep-last {count + 1}"
        )
    return sorted(random.sample(windows, min(count, len(windows))))


def repeat_windows(folder: Path, windows: Sequence[StepWindow], place: Path) -> dict[str, str]:
    """Make the steps of the windows again, each in a folder of `place`. Every process of a job calls it.

    Return why a window cannot be repeated, by its text.
    """
    problems = {}
    for window in windows:
        log.info(f"repeating {window} …")
        config = _build_config(folder, window, place)
        try:
            with _quietly():
                train(config, after_step=lambda step, *_, stop=window.stop: step + 1 == stop)
        except ValueError as error:
            problems[str(window)] = str(error).removesuffix(f"; {SET_BACK}")
        except TrainingStopped as stopped:
            # The run itself may have ended here by bad gradients. A signal ends the verification.
            if stopped.status != 1:
                raise
        clear_device_cache(garbage_collection=True)
    return problems


def _build_config(folder: Path, window: StepWindow, place: Path) -> Config:
    """Return the configuration of the run, for a branch that keeps the checkpoint at the end of the window."""
    end = folder / f"checkpoint-{window.stop}"
    config = read_checkpoint_config(end)
    run = replace(
        config.run,
        output_dir=str(place / str(window.stop)),
        resume=str(folder / f"checkpoint-{window.start}") if window.start else None,
        precision=read_precision(folder) or config.run.precision,
        ledger=False,
        train_ledger=False,
        load_best=False,
        patience=None,
        trackers=(),
        samples=(),
    )
    return replace(config, run=run)


@contextmanager
def _quietly() -> Iterator[None]:
    """Show only warnings of the log in the block, and keep the lines of evaluations out of the output."""
    level = log.level
    log.setLevel(max(level, logging.WARNING))
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        log.setLevel(level)


@contextmanager
def _process_settings(threads: int, environment: dict[str, str]) -> Iterator[None]:
    """Set the number of threads and variables of the environment in the block."""
    before, own_threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(threads)
    os.environ |= environment
    try:
        yield
    finally:
        torch.set_num_threads(own_threads)
        for name in environment:
            os.environ.pop(name)
        os.environ |= before


def _read_machine(folder: Path) -> dict[str, Any]:
    machine: dict[str, Any] = read_checkpoint(folder).inputs.get("machine", {})
    return machine


def _start_job(folder: Path, windows: Sequence[StepWindow], place: Path, machine: dict[str, Any]) -> dict[str, str]:
    """Repeat the windows with the number of processes and threads of the run, and return the problems."""
    processes, threads = machine.get("processes", 1), machine.get("threads_per_process", torch.get_num_threads())
    on_cpu = machine.get("device") == describe(torch.device("cpu"))["device"]
    environment = {"ACCELERATE_USE_CPU": "true"} if on_cpu else {}
    if processes == 1:
        with _process_settings(threads, environment):
            return repeat_windows(folder, windows, place)
    words = [str(folder), str(place), *(f"{window.start}-{window.stop}" for window in windows)]
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    command = [sys.executable, "-m", *launcher, "-m", "minilm.commands.verify", *words]
    environment = {**os.environ, **environment, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise OSError(f"the steps could not be repeated on {processes} processes: the lines above say why")
    problems: dict[str, str] = json.loads((place / _PROBLEMS).read_text(encoding="utf-8"))
    return problems


def _join_and_repeat() -> None:
    """Repeat the windows as one of several processes, which `_start_job` has started with these arguments."""
    folder, place, *words = sys.argv[1:]
    windows = [StepWindow(start=int(start), stop=int(stop)) for start, stop in (word.split("-") for word in words)]
    # torch has read the number of threads. minilm would take 1 for the launcher's default and replace it.
    del os.environ["OMP_NUM_THREADS"]
    show_log()
    with lost_peer_as_error(), one_job():
        problems = repeat_windows(Path(folder), windows, Path(place))
    if is_main_process(os.environ):
        write_atomically(Path(place, _PROBLEMS), json.dumps(problems))


def _compare(folder: Path, window: StepWindow, place: Path, problem: str | None) -> WindowResult:
    """Return the result of a window. problem: why it could not be repeated, if so."""
    if problem is not None:
        return WindowResult(window=window, differences=(problem,))
    name = f"checkpoint-{window.stop}"
    try:
        before, now = (read_checkpoint(path / name) for path in (folder, place / str(window.stop)))
    except ValueError as error:
        return WindowResult(window=window, differences=(str(error),))
    # A changed row is a difference also where these steps do not use it.
    differences = compare_inputs(before.inputs, now.inputs, origin=True, base=True)
    differences += compare_periods(before.inputs, now.inputs, len(now.inputs["training examples of the phases"]))
    hashes = [json.loads((checkpoint.folder / MANIFEST).read_text(encoding="utf-8")) for checkpoint in (before, now)]
    for file, text in _FILES.items():
        ours, theirs = ([files[part] for part in find_parts(files, file)] for files in hashes)
        if ours != theirs:
            differences.append(
                text if len(ours) == len(theirs) else f"{file} has {len(theirs)} part(s), not {len(ours)}"
            )
    if (before.scaler, before.optimizer) != (now.scaler, now.optimizer):
        differences.append("the loss scaling or the settings of the optimizer differ")
    logs = [_read_log(path, window) for path in (folder, place / str(window.stop))]
    if (difference := _find_first_difference(*logs)) is not None:
        differences.append(difference)
    pairs = [(line["loss"], logs[1].get(key, {}).get("loss")) for key, line in logs[0].items() if "loss" in line]
    gaps = [abs(ours - theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    return WindowResult(
        window=window,
        differences=tuple(differences),
        environment=tuple(compare_environments(before.inputs, now.inputs)),
        losses=len(pairs),
        largest_gap=max(gaps, default=math.nan),
    )


def _read_log(folder: Path, window: StepWindow) -> dict[tuple[int, str], dict[str, Any]]:
    """Return the lines of log.jsonl about the steps and the evaluations of a window, without times and memory."""
    lines = []
    for text in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        # A killed process leaves half a line.
        with suppress(ValueError):
            lines.append(json.loads(text))
    return {
        (line["step"], "step" if "loss" in line else "evaluation after step"): {
            name: value for name, value in line.items() if name not in _TIMED
        }
        for line in lines
        if window.start < line["step"] <= window.stop and not {"spike_loss", "sample"} & line.keys()
    }


def _find_first_difference(
    before: dict[tuple[int, str], dict[str, Any]], now: dict[tuple[int, str], dict[str, Any]]
) -> str | None:
    """Return the first figure that differs between two logs, in words, or None."""
    for step, kind in sorted(before.keys() | now.keys()):
        ours, theirs = before.get((step, kind), {}), now.get((step, kind), {})
        for name in ours | theirs:
            if ours.get(name) != theirs.get(name):
                return f"{name} of the {kind} {step:,} was {ours.get(name)}, is {theirs.get(name)}"
    return None


def _describe(results: Sequence[WindowResult], checkpoint: Checkpoint) -> str:
    """Return the sentence of the model card about windows that are all equal."""
    machine, versions = checkpoint.inputs["machine"], checkpoint.inputs["versions"]
    steps = ", ".join(str(result.window).removeprefix("steps ") for result in results)
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"`minilm verify` made the steps {steps} again, and got the same weights, optimizer state and losses to the "
        f"bit, on {machine['device']}, {machine['processes']} process(es), with {libraries}."
    )


if __name__ == "__main__":
    exit_on_error(interrupt_on_signals()(_join_and_repeat))
