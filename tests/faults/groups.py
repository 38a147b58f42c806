"""Signal every process of a run, as process managers do, and check that it saves and resumes to the same end.

python -m tests.faults.groups
"""

import argparse
import itertools
import os
import re
import signal
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from minilm import Config
from minilm.utils.signals import STOP_SIGNALS
from tests.jobs import LAUNCHERS, config_in, end_of, finish_all, start

STEPS = 120
Case = tuple[str, int, int, signal.Signals]
"""Launcher (or "fork"), processes, loader workers of each process, signal."""
CASES: list[Case] = [
    case
    for case in itertools.product(("python", "accelerate", "torchrun"), (1, 2), (0, 2), STOP_SIGNALS)
    if case[:2] != ("python", 2)
]


def interrupted(config: Config, place: Path, case: Case) -> str:
    """Start a run, signal its processes after a few steps, and return a complaint about its end, or nothing.

    The processes of one group get the signal at once, as from a terminal. A launcher puts its processes into separate
    groups, and so does this function with forked ones.
    """
    launcher, processes, workers, number = case
    place.mkdir()
    folder = Path(config.run.output_dir or "")
    own_group = "import os; os.setpgid(0, 0)" if launcher == "fork" else ""
    job = start(launcher, config, place, processes=processes, planted=own_group, group=True)
    try:
        job.wait_for_steps(folder, 5)
        job.processes = [one for first in job.processes for one in (first, *first.children(recursive=True))]
        assert len(job.processes) >= processes * (1 + workers)
        began = time.monotonic()
        for group in {os.getpgid(process.pid) for process in job.processes}:
            os.killpg(group, number)
        if not job.gone(60):
            return "left behind"
        seconds = time.monotonic() - began
    finally:
        job.kill()
    output = job.stderr.read_text(errors="replace")
    if seconds > 20:
        return f"gone after {seconds:.0f} s"
    if not list(folder.glob("checkpoint-*/manifest.json")):
        return f"no checkpoint: {output[-1500:]}"
    if list(folder.glob(".*")) or (folder / "all_results.json").exists():
        return "half-written, or finished"
    # A launcher that dies of the signal sends SIGTERM to its processes.
    reasons = re.findall(r"(?:stopped: |interrupted by |error: )(\w+)", output)
    if reasons not in ([number.name], ["SIGTERM"] if launcher in LAUNCHERS else []):
        return f"reasons given: {reasons} {output[-1500:]}"
    return ""


def trial(place: Path, cases: Iterable[Case]) -> tuple[int, list[str]]:
    """Return the number of cases, and a complaint for each one that went wrong."""
    cases = list(cases)
    config = config_in(place, STEPS)
    whole = {processes: place / f"whole-{processes}" for _, processes, _, _ in cases}
    runs = [
        (replace(config, run=replace(config.run, output_dir=str(folder))), processes)
        for processes, folder in whole.items()
    ]
    wrong: dict[Case, str] = {}
    folders = {case: place / f"out-{number}" for number, case in enumerate(cases)}
    for number, (case, folder) in enumerate(folders.items()):
        batch = replace(config.batch, workers=case[2])
        asked = replace(config, batch=batch, run=replace(config.run, output_dir=str(folder)))
        wrong[case] = interrupted(asked, place / f"job-{number}", case)
        if not wrong[case]:
            runs.append((replace(asked, run=replace(asked.run, resume="latest")), case[1]))
    finish_all(runs, place)
    for case, folder in folders.items():
        if not wrong[case] and end_of(folder) != end_of(whole[case[1]]):
            wrong[case] = "the resumed run ends differently"
    named = [
        f"{launcher}, {processes} process(es), {workers} worker(s), {number.name}: {wrong[case]}"
        for case in cases
        if wrong[case]
        for launcher, processes, workers, number in (case,)
    ]
    return len(cases), named


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--launchers", nargs="+", default=("python", "accelerate", "torchrun"))
    parser.add_argument("--workers", nargs="+", type=int, default=(0, 2))
    options = parser.parse_args()
    torch.set_num_threads(1)  # at these sizes a second one only waits
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cases = [case for case in CASES if case[0] in options.launchers and case[2] in options.workers]
    with tempfile.TemporaryDirectory() as place:
        tried, wrong = trial(Path(place), cases)
    print(f"{tried - len(wrong)}/{tried} with a checkpoint and resumed to the same end to the bit")
    print("\n".join(wrong))


if __name__ == "__main__":
    main()
