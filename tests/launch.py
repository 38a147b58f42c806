"""Start a recipe as a user does, through `accelerate launch`, and read what it wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# A model and a text so small that starting the processes is most of the time.
TINY = [
    *("--tokens.vocab-size", "400", "--run.precision", "fp32"),
    *("--model.config.hidden-size", "32", "--model.config.num-hidden-layers", "2"),
    *("--model.config.num-attention-heads", "2", "--model.config.intermediate-size", "48"),
    *("--model.config.layer-types", "full_attention", "sliding_attention"),
]


def configured(name: str) -> tuple[str, ...]:
    """The words of `accelerate launch` with this file of recipes/accelerate."""
    path = ROOT / "recipes" / "accelerate" / name
    return ("accelerate.commands.launch", "--config_file", str(path), "--main_process_port", "0")


def launch(
    recipe: str, *flags: str, processes: int = 1, launcher: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `recipes/RECIPE` with `flags` on `processes` CPU processes, or under another launcher's words."""
    if not launcher:
        several = ("--multi_gpu", "--num_processes", str(processes)) if processes > 1 else ()
        launcher = ("accelerate.commands.launch", *several, "--main_process_port", "0")
        environment = {"ACCELERATE_USE_CPU": "true", **environment}
    command = [sys.executable, "-m", *launcher, str(ROOT / "recipes" / recipe), *flags]
    settings = {**os.environ, **environment}
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=240, cwd=ROOT, check=False)


def read_log(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(steps, evaluations) of a run's log.jsonl."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]
