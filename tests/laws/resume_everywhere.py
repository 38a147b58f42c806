"""Stop a run after each of its steps and resume it: how many end as the run that was never stopped, to the bit?

python -m tests.laws.resume_everywhere --processes 2
"""

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from minilm import Data
from tests.jobs import CONFIG, STEPS, end_of, finish, finish_all, write_text


def stopped_after(step: int, reference: Path, folder: Path) -> Path:
    """What the reference run's folder was when it had just written the checkpoint of `step`."""
    shutil.copytree(reference, folder, ignore=shutil.ignore_patterns("checkpoint-*", "all_results.json"))
    shutil.copytree(reference / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


def resume_everywhere(place: Path, processes: int, every: int) -> str:
    """Stop after every so many steps; how many of the resumed runs are equal to the one that was never stopped."""
    config = replace(CONFIG, data=Data(source=write_text(place / "text.txt"), eval_fraction=0.1))
    reference = place / "reference"
    finish(replace(config, run=replace(config.run, output_dir=str(reference))), place, processes)
    folders = [stopped_after(step, reference, place / f"stopped-{step}") for step in range(1, STEPS + 1, every)]
    runs = [replace(config, run=replace(config.run, output_dir=str(folder), resume="latest")) for folder in folders]
    finish_all([(run, processes) for run in runs], place)
    same = sum(end_of(folder) == end_of(reference) for folder in folders)
    return f"{same}/{len(folders)} resumed runs bitwise equal, {processes} process(es)"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="try every so many steps only")
    options = parser.parse_args()
    torch.set_num_threads(1)  # at these sizes a second one only waits
    with tempfile.TemporaryDirectory() as place:
        print(resume_everywhere(Path(place), options.processes, options.every))


if __name__ == "__main__":
    main()
