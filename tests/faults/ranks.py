"""One process of two raises, is killed, or is stopped while they train: when are both gone, and what was told?

python -m tests.faults.ranks
"""

import argparse
import re
import signal
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tests.jobs import LAUNCHERS, config_in, start

FAULTS = ("raises", "is killed", "is stopped")
TIMEOUT = 5  # run.timeout, seconds
RAISES = """
import os
import minilm.train
original, calls = minilm.train.train_step, []
def train_step(*args, **kwargs):
    calls.append(1)
    if len(calls) == 60 and os.environ["RANK"] == "1":
        raise KeyError("planted")
    return original(*args, **kwargs)
minilm.train.train_step = train_step
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a job."""

    other: float | None
    """Seconds from the fault until the process that was not hurt was gone; None where that did not happen."""
    every: float | None
    """Seconds until every process was gone. A launcher gives a stopped one 30 s before it kills it."""
    reasons: list[str]
    """The lines that tell why."""


def hurt(launcher: str, fault: str, place: Path) -> Outcome:
    """Run a job, do that to its process 1 while it trains, and watch it end."""
    folder = place / "out"
    config = config_in(place, steps=100_000)
    config = replace(config, run=replace(config.run, output_dir=str(folder), timeout=TIMEOUT, eval_every=100_000))
    job = start(launcher, config, place, planted=RAISES if fault == "raises" else "")
    try:
        other, victim = job.workers(2)
        job.wait_for_steps(folder, 58)
        began = time.monotonic()
        if fault != "raises":
            victim.send_signal(signal.SIGKILL if fault == "is killed" else signal.SIGSTOP)
        first = time.monotonic() - began if job.gone(60, [other]) else None
        if launcher == "fork" and fault == "is stopped":
            victim.kill()  # there is no launcher to do it
        every = time.monotonic() - began if job.gone(60) else None
    finally:
        job.kill()
    told = re.findall(r"^(?:error: .*|\w+Error: .*)$", job.stderr.read_text(errors="replace"), re.MULTILINE)
    return Outcome(other=first, every=every, reasons=told)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--launchers", nargs="+", default=LAUNCHERS, help="of accelerate, torchrun, fork")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"run.timeout is {TIMEOUT} s; seconds until the other process was gone, and until every process was")
    for launcher in options.launchers:
        for fault in FAULTS:
            with tempfile.TemporaryDirectory() as place:
                outcome = hurt(launcher, fault, Path(place))
            other, every = ("never" if s is None else f"{s:.1f}" for s in (outcome.other, outcome.every))
            print(f"{launcher:<11} {fault:<11} {other:>6} {every:>6}  {' | '.join(outcome.reasons)}", flush=True)


if __name__ == "__main__":
    main()
