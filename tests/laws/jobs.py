"""Train in several processes that are forked from one interpreter, which imports torch once for all of them.

    python -m tests.laws.jobs JOBS.json

Forking wants an interpreter that has not computed anything yet, so the tests run this one beside their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import debug_launcher
from accelerate.utils import patch_environment

from minilm import Config
from minilm.config import from_dict, to_dict
from minilm.train import train
from tests.launch import ROOT


def run(config: Config, processes: int) -> None:
    """Train on that many processes, which share the processors."""
    if processes == 1:
        torch.set_num_threads(1)  # at these sizes a second one only waits
        train(config)
    else:
        with patch_environment(omp_num_threads=1, local_world_size=processes):  # as launchers set them
            debug_launcher(train, (config,), num_processes=processes)


def run_all(jobs: list[tuple[int, Config]], folder: Path, **environment: str) -> None:
    """Run (processes, config) after each other; `folder` is for the list of them."""
    path = folder / "jobs.json"
    path.write_text(json.dumps([(processes, to_dict(config)) for processes, config in jobs]))
    command = [sys.executable, "-m", "tests.laws.jobs", str(path)]
    settings = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    for processes, tree in json.loads(Path(sys.argv[1]).read_text()):
        run(from_dict(tree), processes)
