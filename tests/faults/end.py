"""Kill a run before and after each part of its end, resume it, and check that it leaves the same files.

python -m tests.faults.end
"""

import argparse
import json
import os
import re
import signal
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minilm import Config
from tests.jobs import config_in, end_of, finish, start

# The parts of the end, in their order.
WORK = (
    *(
        "Recorder.record_step",
        "Recorder.record_evaluation",
        "CheckpointSaver.save",
        "load_best_weights",
        "Recorder.record_results",
    ),
    *("save_model", "model_export.save_tokenizer", "write_samples", "write_card", "write_results"),
)
BOUNDARIES = tuple(f"{side} {work}" for work in WORK for side in ("before", "after"))
LAST, SAVED = 6, 4  # the step after which each run ends, and the step of an earlier checkpoint
ENDS: dict[str, dict[str, Any]] = {
    "all steps made": {"max_steps": LAST},
    "out of patience": {"max_steps": 60, "patience": 2},
    "out of patience, the best weights loaded": {"max_steps": 60, "patience": 2, "load_best": True},
}

KILL = """
import os, signal, time
from pathlib import Path
import minilm.train
from minilm.runs import model_export
from minilm.runs.checkpoint_saver import CheckpointSaver
from minilm.runs.recorder import Recorder

OWNERS = {{"": minilm.train, "model_export": model_export, "Recorder": Recorder, "CheckpointSaver": CheckpointSaver}}
steps = [0]

def killing(work, side):
    owner, _, name = work.rpartition(".")
    owner = OWNERS[owner]
    original = getattr(owner, name)

    def work(*args, **kwargs):
        if name == "record_step":
            steps[0] += 1
        last = steps[0] == {last}
        while last and not Path("{folder}", "checkpoint-{saved}", "manifest.json").exists():
            time.sleep(0.01)
        if last and side == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if last and side == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, work)

killing("Recorder.record_step", "{side}" if "{work}" == "Recorder.record_step" else "never")
if "{work}" != "Recorder.record_step":
    killing("{work}", "{side}")
"""


def config_of(end: str, place: Path) -> Config:
    """Return a run with this end after step LAST. Its figure never changes, so that no evaluation beats the first."""
    config = config_in(place, steps=LAST)
    run = replace(
        config.run, eval_every=2, save_every=SAVED, keep_last=3, best_metric="unigram_bits_per_byte", **ENDS[end]
    )
    optim = replace(config.optim, schedule="constant")
    return replace(config, run=replace(run, samples=("the quick [MASK]",)), optim=optim)


def left_by(folder: Path) -> dict[str, object]:
    """Return everything that a run leaves, without times and memory."""
    timed = ("tokens_per_second", "mfu", "train_seconds")
    results = json.loads((folder / "all_results.json").read_text())
    card = (folder / "README.md").read_text().replace(folder.name, "FOLDER").splitlines()
    return {
        **end_of(folder),
        "results": {name: value for name, value in results.items() if name not in timed},
        "card": [line for line in card if not re.search("tokens_per_second|mfu|seconds|output_dir|resume", line)],
        "names": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
    }


def trial(place: Path, end: str, boundaries: Iterable[str], processes: int = 1) -> tuple[int, list[str]]:
    """Kill and resume a run at each boundary; return how many there were, and those that changed what it leaves."""
    config = config_of(end, place)
    reference = place / "reference"
    finish(replace(config, run=replace(config.run, output_dir=str(reference))), place, processes)
    expected, tried, other = left_by(reference), 0, []
    for number, boundary in enumerate(boundaries):
        if "load_best_weights" in boundary and "load_best" not in ENDS[end]:
            continue
        side, work = boundary.split(" ", 1)
        folder = place / f"killed-{number}"
        asked = replace(config, run=replace(config.run, output_dir=str(folder)))
        (own := place / f"job-{number}").mkdir(exist_ok=True)
        planted = KILL.format(work=work, side=side, last=LAST, saved=SAVED, folder=folder)
        job = start("fork", asked, own, processes=processes, planted=planted)
        try:
            status = job.status()
        finally:
            job.kill()
        assert status == signal.SIGKILL, f"{end}, {boundary}: status {status}: {job.stderr.read_text()[-3000:]}"
        tried += 1
        if (folder / "all_results.json").exists():
            assert boundary == "after write_results"
        else:
            finish(replace(asked, run=replace(asked.run, resume="latest")), own, processes)
        found = left_by(folder)
        different = [name for name in expected if found[name] != expected[name]]
        if different:
            other.append(f"{boundary}: {', '.join(different)}")
    return tried, other


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)  # at these sizes a second one only waits
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for end in ENDS:
        with tempfile.TemporaryDirectory() as place:
            tried, other = trial(Path(place), end, BOUNDARIES, options.processes)
            print(f"{end}: {tried - len(other)}/{tried} the same {'; '.join(other)}", flush=True)


if __name__ == "__main__":
    main()
