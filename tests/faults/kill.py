"""Kill a run with SIGKILL at a random moment, every other time inside a save, and resume it: does it end the same?

python -m tests.faults.kill --times 50 --processes 2

With --streaming, the run reads a stream in windows, and every other kill is at the edge of a window.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minilm import Config, Data
from tests.jobs import CONFIG, end_of, finish, start, write_text

# Windows of a few steps.
WINDOW_TOKENS = 500
# Code with which a process of its own encodes each window ahead of time, although they are small.
ENCODE_AHEAD = "import minilm.data.window_encoder; minilm.data.window_encoder._LEAST_TOKENS = 0"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run to kill, in a folder of its own."""

    config: Config
    processes: int
    place: Path
    planted: str = ""
    """Code that each process executes first."""

    @property
    def folder(self) -> Path:
        return Path(self.config.run.output_dir or "")

    def finish(self, **run: Any) -> None:
        """Make the run to its end."""
        config = replace(self.config, run=replace(self.config.run, **run))
        finish(config, self.place, self.processes, planted=self.planted)

    def kill(self, delay: float, moment: Callable[["Trial"], bool], *, wait: bool, planted: str = "") -> bool:
        """Begin the run and kill it after `delay` seconds; return whether that was at the moment.

        wait: then wait for the moment before the kill. planted: more code that each process executes first.
        """
        job = start("fork", self.config, self.place, processes=self.processes, planted=self.planted + planted)
        time.sleep(delay)
        while wait and not moment(self) and not job.gone(0):
            pass
        hit = moment(self)
        job.kill()
        job.status()
        return hit


def is_saving(run: Trial) -> bool:
    """Whether a checkpoint is being written."""
    return bool(list(run.folder.glob(".checkpoint-*.writing")))


def is_at_edge(run: Trial) -> bool:
    """Whether the run has made the last step of a window, and not the first of the next."""
    log = run.folder / "log.jsonl"
    steps = log.read_bytes().count(b'"loss"') if log.exists() else 0
    indices = (run.place / "hf" / "minilm").glob("windows-*.jsonl")
    return steps in [json.loads(line)["step"] for index in indices for line in index.read_text().splitlines()]


def trial(place: Path, processes: int, times: int, draw: random.Random, *, streaming: bool = False) -> str:
    """So many kills, as a line of figures. streaming: of a run that reads a stream in windows."""
    data = Data(source=write_text(place / "text.txt"), eval_fraction=0.1)
    if streaming:
        data = replace(data, streaming=True, window_tokens=WINDOW_TOKENS)
    moment = is_at_edge if streaming else is_saving

    def make_trial(name: str) -> Trial:
        own = place / name
        own.mkdir()
        config = replace(CONFIG, data=data, run=replace(CONFIG.run, output_dir=str(own / "out")))
        # A cache of its own, in which the kill leaves what it may.
        cache = f"import os; os.environ['HF_HOME'] = {str(own / 'hf')!r}\n" if streaming else ""
        return Trial(config=config, processes=processes, place=own, planted=cache)

    reference = make_trial("reference")
    reference.finish()
    timed = make_trial("timed")
    began = time.perf_counter()
    timed.finish()
    seconds = time.perf_counter() - began
    resumed = same = hits = 0
    for attempt in range(times):
        run = make_trial(f"killed-{attempt}")
        planted = ENCODE_AHEAD if streaming and attempt % 4 < 2 else ""
        hits += run.kill(draw.uniform(0, seconds), moment, wait=attempt % 2 == 0, planted=planted)
        begun = list(run.folder.glob("checkpoint-*/manifest.json"))
        # Before its first checkpoint there is nothing to resume, and it begins anew.
        run.finish(**({"resume": "latest"} if begun else {"overwrite": True}))
        resumed += (run.folder / "all_results.json").exists()
        same += end_of(run.folder) == end_of(reference.folder)
    where = "at the edge of a window" if streaming else "inside a save"
    return f"{resumed}/{times} resumed, {same}/{times} bitwise equal, {hits} killed {where}, {processes} process(es)"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streaming", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # at these sizes a second one only waits
    with tempfile.TemporaryDirectory() as place:
        draw = random.Random(options.seed)
        print(trial(Path(place), options.processes, options.times, draw, streaming=options.streaming))


if __name__ == "__main__":
    main()
