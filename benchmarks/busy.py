"""Measure the main job's steps per second on an idle machine, and while another program takes one processor.

    python benchmarks/busy.py

The rows are settings of GNU OpenMP: its own default, minilm's GOMP_SPINCOUNT, other values, and one thread. Each
measurement is a process of its own, since OpenMP reads its settings when torch loads it. The settings take turns. Run
it on a machine on which no other program runs.
"""

import argparse
import multiprocessing
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parents[1] / "recipes" / "mlm_pydocs.py"
WARM_UP_STEPS = 20
# The variables that a row sets. Without them, minilm sets GOMP_SPINCOUNT.
SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def measure(seconds: float, folder: str) -> None:
    """Train for some seconds, print the steps per second, and end the process."""
    from minilm.train import train

    config = runpy.run_path(str(RECIPE))["CONFIG"]
    begin = 0.0

    def after_step(step: int, figures: dict[str, Any], network: Any) -> None:
        nonlocal begin
        float(figures["loss"])
        if step == WARM_UP_STEPS:
            begin = time.perf_counter()
        if begin and (passed := time.perf_counter() - begin) > seconds:
            print((step - WARM_UP_STEPS) / passed, flush=True)
            os._exit(0)

    train(replace(config, run=replace(config.run, output_dir=folder)), after_step=after_step)


def run_setting(setting: dict[str, str], seconds: float) -> float:
    """Return the steps per second with these variables."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | setting
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--measure", f"{folder}/run", "--seconds", str(seconds)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-2000:])
    return float(done.stdout)


def _burn() -> None:
    while True:
        pass


@contextmanager
def other_program() -> Iterator[None]:
    """Keep one processor busy in the block."""
    process = multiprocessing.Process(target=_burn, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds of steps of one measurement (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each row and column (default: 3)")
    parser.add_argument("--spins", type=int, nargs="*", default=[1000], help="other values (default: 1000)")
    options = parser.parse_args()
    if options.measure:
        measure(options.seconds, options.measure)
        return
    rows: dict[str, dict[str, str]] = {
        "OpenMP's default": {"GOMP_SPINCOUNT": "300000"},
        "minilm": {},
        **{f"GOMP_SPINCOUNT={spins}": {"GOMP_SPINCOUNT": str(spins)} for spins in options.spins},
        "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
        "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
    }
    states: dict[str, Callable[[], AbstractContextManager[None]]] = {"idle": nullcontext, "busy": other_program}
    taken: dict[tuple[str, str], list[float]] = {(row, state): [] for row in rows for state in states}
    for _ in range(options.rounds):
        for state, load in states.items():
            with load():
                for row, setting in rows.items():
                    taken[row, state].append(run_setting(setting, options.seconds))
    print(f"steps per second of the main job, median of {options.rounds} (least to most)")
    print(f"{'':<26}{'idle':<24}one processor taken")
    for row in rows:
        cells = [taken[row, state] for state in states]
        print(
            f"{row:<26}"
            + "".join(f"{statistics.median(c):5.1f} ({min(c):.1f} to {max(c):.1f})".ljust(24) for c in cells)
        )


if __name__ == "__main__":
    main()
