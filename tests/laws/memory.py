"""Train a tiny model for many steps, with evaluations and checkpoints, and say how the resident memory grew.

python -m tests.laws.memory FOLDER --steps 2000
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from minilm import Data
from minilm.runs.recorder import Recorder
from minilm.train import train
from tests.jobs import CONFIG, write_text

WARM_UP = 0.2  # share of the steps, several evaluations and checkpoints among them


def sizes(folder: Path, steps: int) -> list[int]:
    """Resident bytes of this process after each step."""
    seen: list[int] = []
    process, original = psutil.Process(), Recorder.record_step

    def step(self: Recorder, **figures: Any) -> None:
        original(self, **figures)
        seen.append(process.memory_info().rss)

    Recorder.record_step = step  # type: ignore[method-assign]
    torch.set_num_threads(1)  # at these sizes a second one only waits
    text = write_text(folder / "text.txt")
    every = max(1, steps // 20)
    run = replace(CONFIG.run, max_steps=steps, eval_every=every, save_every=every, keep_last=1)
    run = replace(run, output_dir=str(folder / "out"))
    batch = replace(CONFIG.batch, examples=4, micro_tokens=100)
    model = replace(CONFIG.model, config={**CONFIG.model.config, "num_hidden_layers": 1})
    train(replace(CONFIG, data=Data(source=text, eval_fraction=0.1), model=model, batch=batch, run=run))
    return seen


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="an empty folder to work in")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    seen = sizes(options.folder, options.steps)
    warm = int(WARM_UP * len(seen))
    window = max(1, len(seen) // 10)
    before, after = statistics.median(seen[warm : warm + window]), statistics.median(seen[-window:])
    print(f"{len(seen)} steps: {before / 1e6:.0f} MB after the first {warm}, {after / 1e6:.0f} MB at the end, ", end="")
    print(f"{after / before - 1:+.1%}")


if __name__ == "__main__":
    main()
