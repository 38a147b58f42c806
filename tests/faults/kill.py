"""Kill a run with SIGKILL at a random moment, every other time inside a save, and resume it: does it end the same?

python -m tests.faults.kill --times 50 --processes 2
"""

import argparse
import os
import random
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from minilm import Config, Data
from tests.laws.resume_everywhere import CONFIG, end_of, run, write_text


def start(config: Config, processes: int) -> int:
    """Begin a run in a process group of its own, and return its id."""
    child = os.fork()
    if child == 0:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        status = 1
        try:
            run(config, processes)
            status = 0
        finally:
            os._exit(status)
    return child


def finish(config: Config, processes: int) -> bool:
    """Run to the end; whether it got there."""
    return os.waitpid(start(config, processes), 0)[1] == 0


def kill(config: Config, processes: int, folder: Path, delay: float, saving: bool) -> bool:
    """Begin a run and kill it after `delay` seconds, or then inside its next save; whether that was in a save."""
    child = start(config, processes)
    time.sleep(delay)
    while saving and not list(folder.glob(".checkpoint-*.writing")) and os.waitpid(child, os.WNOHANG) == (0, 0):
        pass
    inside = bool(list(folder.glob(".checkpoint-*.writing")))
    try:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass  # it was faster
    return inside


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        config = replace(CONFIG, data=Data(source=write_text(place / "text.txt"), eval_fraction=0.1))
        reference = place / "reference"
        finish(replace(config, run=replace(config.run, output_dir=str(reference))), options.processes)
        began = time.perf_counter()
        finish(replace(config, run=replace(config.run, output_dir=str(place / "timed"))), options.processes)
        seconds = time.perf_counter() - began
        resumed = same = inside = 0
        for time_number in range(options.times):
            folder = place / f"killed-{time_number}"
            asked = replace(config, run=replace(config.run, output_dir=str(folder)))
            delay = draw.uniform(0, seconds)
            inside += kill(asked, options.processes, folder, delay, saving=time_number % 2 == 0)
            begun = list(folder.glob("checkpoint-*/manifest.json"))
            # Before its first checkpoint there is nothing to resume, and it begins anew.
            again = {"resume": "latest"} if begun else {"overwrite": True}
            finish(replace(asked, run=replace(asked.run, **again)), options.processes)
            resumed += (folder / "all_results.json").exists()
            same += end_of(folder) == end_of(reference)
    print(
        f"{resumed}/{options.times} resumed, {same}/{options.times} bitwise equal, {inside} killed inside a save, "
        f"{options.processes} process(es)"
    )


if __name__ == "__main__":
    main()
