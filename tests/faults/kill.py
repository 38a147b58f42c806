"""Kill a run with SIGKILL at a random moment, every other time inside a save, and resume it: does it end the same?

python -m tests.faults.kill --times 50 --processes 2
"""

import argparse
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from minilm import Config, Data
from tests.jobs import CONFIG, end_of, finish, start, write_text


def kill(config: Config, processes: int, place: Path, delay: float, saving: bool) -> bool:
    """Begin a run and kill it after `delay` seconds, or then inside its next save; whether that was in a save."""
    folder = Path(config.run.output_dir or "")
    job = start("fork", config, place, processes=processes)
    time.sleep(delay)
    while saving and not list(folder.glob(".checkpoint-*.writing")) and not job.gone(0):
        pass
    inside = bool(list(folder.glob(".checkpoint-*.writing")))
    job.kill()
    job.status()
    return inside


def trial(place: Path, processes: int, times: int, draw: random.Random) -> str:
    """So many kills, as a line of figures."""
    config = replace(CONFIG, data=Data(source=write_text(place / "text.txt"), eval_fraction=0.1))
    reference = place / "reference"
    finish(replace(config, run=replace(config.run, output_dir=str(reference))), place, processes)
    began = time.perf_counter()
    finish(replace(config, run=replace(config.run, output_dir=str(place / "timed"))), place, processes)
    seconds = time.perf_counter() - began
    resumed = same = inside = 0
    for attempt in range(times):
        folder = place / f"killed-{attempt}"
        asked = replace(config, run=replace(config.run, output_dir=str(folder)))
        inside += kill(asked, processes, place, draw.uniform(0, seconds), saving=attempt % 2 == 0)
        begun = list(folder.glob("checkpoint-*/manifest.json"))
        # Before its first checkpoint there is nothing to resume, and it begins anew.
        again = {"resume": "latest"} if begun else {"overwrite": True}
        finish(replace(asked, run=replace(asked.run, **again)), place, processes)
        resumed += (folder / "all_results.json").exists()
        same += end_of(folder) == end_of(reference)
    return (
        f"{resumed}/{times} resumed, {same}/{times} bitwise equal, {inside} killed inside a save, "
        f"{processes} process(es)"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # at these sizes a second one only waits
    with tempfile.TemporaryDirectory() as place:
        print(trial(Path(place), options.processes, options.times, random.Random(options.seed)))


if __name__ == "__main__":
    main()
