"""Tell a run to end at a random moment, every third time inside a save, and resume it: does it end the same?

python -m tests.faults.signals --times 20
"""

import argparse
import itertools
import random
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from minilm import Config
from tests.jobs import LAUNCHERS, config_in, end_of, finish, start

STEPS = 60
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def told_to_end(
    config: Config, place: Path, launcher: str, processes: int, number: signal.Signals, delay: float, saving: bool
) -> tuple[float, bool, str]:
    """Begin a run and send it a signal after `delay` seconds, or then inside its next save.

    Returns (seconds until every process was gone, whether that was inside a save, what was told).
    """
    folder = Path(config.run.output_dir or "")
    job = start(launcher, config, place, processes=processes)
    try:
        workers = job.workers(processes)
        time.sleep(delay)
        while saving and not job.gone(0, workers) and not list(folder.glob(".checkpoint-*.writing")):
            pass
        inside = bool(list(folder.glob(".checkpoint-*.writing")))
        began = time.monotonic()
        for process in workers if launcher == "fork" else job.processes[:1]:
            if process.is_running():
                process.send_signal(number)
        assert job.gone(60), f"left behind after {number.name}: {job.stderr.read_text(errors='replace')[-3000:]}"
        return time.monotonic() - began, inside, job.stderr.read_text(errors="replace")
    finally:
        job.kill()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--launchers", nargs="+", default=LAUNCHERS, help="of accelerate, torchrun, fork")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(options.seed)
    for launcher, processes in itertools.product(options.launchers, options.processes):
        with tempfile.TemporaryDirectory() as temporary:
            print(f"{launcher}, {processes} process(es): ", end="", flush=True)
            place = Path(temporary)
            print(trial(place, launcher, processes, options.times, draw), flush=True)


def trial(place: Path, launcher: str, processes: int, times: int, draw: random.Random) -> str:
    """So many signals, as a line of figures."""
    config = config_in(place, STEPS, save_every=20)
    reference = place / "reference"
    began = time.monotonic()
    job = start(
        launcher, replace(config, run=replace(config.run, output_dir=str(reference))), place, processes=processes
    )
    job.workers(processes)
    assert job.status() == 0, job.stderr.read_text(errors="replace")[-3000:]
    whole = time.monotonic() - began
    same = saved = inside = finished = 0
    slowest = 0.0
    for attempt in range(times):
        folder = place / f"told-{attempt}"
        asked = replace(config, run=replace(config.run, output_dir=str(folder)))
        delay, number = draw.uniform(0, whole), SIGNALS[attempt % 2]
        seconds, in_save, told = told_to_end(asked, place, launcher, processes, number, delay, attempt % 3 == 0)
        slowest, inside = max(slowest, seconds), inside + in_save
        steps = (folder / "log.jsonl").read_bytes().count(b'"loss"') if (folder / "log.jsonl").exists() else 0
        checkpoints = list(folder.glob("checkpoint-*/manifest.json"))
        finished += (folder / "all_results.json").exists()
        saved += bool(checkpoints)
        assert bool(steps) == bool(checkpoints), f"{steps} steps, {checkpoints}: {told[-3000:]}"
        assert not list(folder.glob(".*")), f"half-written: {list(folder.glob('.*'))}"
        assert "in exit_on_error" not in told, told[-3000:]  # a traceback of ours
        again = {"resume": "latest"} if checkpoints else {"overwrite": True}
        if not (folder / "all_results.json").exists():
            finish(replace(asked, run=replace(asked.run, **again)), place, processes)
        same += end_of(folder) == end_of(reference)
    return (
        f"{same}/{times} bitwise equal; {times - saved} before the first step, {inside} inside a save, {finished} at "
        f"the end; gone after at most {slowest:.1f} s"
    )


if __name__ == "__main__":
    main()
