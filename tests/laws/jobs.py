"""Train in several processes that are forked from one interpreter, which imports torch once for all of them.

    python -m tests.laws.jobs JOBS.json WRITES

WRITES gets a line for each file that a process opens to write below minilm's cache, and each folder that it makes or
renames there: "<process> <event> <path>". Forking wants an interpreter that has not computed anything yet, so the tests
run this one beside their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import debug_launcher
from accelerate.utils import patch_environment

from minilm import Config
from minilm.cache import cache_folder
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
            debug_launcher(train_as_launched, (config,), num_processes=processes)


def train_as_launched(config: Config) -> None:
    """`train` with the ranks in the environment, as launchers give them and `debug_launcher` does not."""
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())
    train(config)


def note_writes(folder: str, notes: Path) -> None:
    """Have this process and those that it forks write down what they write below `folder`."""
    descriptor = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.mkdir", "os.rename") or (event == "open" and not writing(*arguments[1:])):
            return
        path = str(arguments[1] if event == "os.rename" else arguments[0])
        if path.startswith(folder):
            os.write(descriptor, f"{os.getpid()} {event} {path}\n".encode())

    def writing(mode: str | None, flags: int) -> bool:
        return flags & os.O_ACCMODE != os.O_RDONLY

    sys.addaudithook(note)


def run_all(jobs: list[tuple[int, Config]], folder: Path, **environment: str) -> None:
    """Run (processes, config) after each other; `folder` gets the list of them, and of what they wrote to the cache."""
    path = folder / "jobs.json"
    path.write_text(json.dumps([(processes, to_dict(config)) for processes, config in jobs]))
    command = [sys.executable, "-m", "tests.laws.jobs", str(path), str(folder / "writes.txt")]
    settings = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    note_writes(str(cache_folder()), Path(sys.argv[2]))
    for processes, tree in json.loads(Path(sys.argv[1]).read_text()):
        run(from_dict(tree), processes)
