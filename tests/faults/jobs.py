"""Jobs of a tiny run that can be hurt: under a launcher; or forked, without the seconds that importing torch takes."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from minilm import Config, Data
from minilm.cli import guarded
from minilm.signals import ended_by_signals
from tests.launch import ROOT
from tests.laws.resume_everywhere import CONFIG, write_text

LAUNCHERS = ("accelerate", "torchrun")


def config_in(place: Path, steps: int, save_every: int = 50) -> Config:
    """A run of so many steps on a text in `place`."""
    run = replace(CONFIG.run, max_steps=steps, save_every=save_every, eval_every=70, keep_last=2)
    return replace(CONFIG, data=Data(source=write_text(place / "text.txt"), eval_fraction=0.1), run=run)


@dataclass
class Job:
    """A job that was started: its launcher, None where it was forked, its processes, and what they write to stderr."""

    launcher: subprocess.Popen[bytes] | None
    processes: list[psutil.Process]
    stderr: Path

    def workers(self, count: int) -> list[psutil.Process]:
        """The processes that train, by rank; waits until they are there."""
        if self.launcher is None:
            return self.processes
        found: dict[int, psutil.Process] = {}
        while len(found) < count and self.launcher.poll() is None:
            for child in psutil.Process(self.launcher.pid).children(recursive=True):
                try:
                    if "recipe.py" in " ".join(child.cmdline()):
                        found[int(child.environ().get("RANK", "0"))] = child
                except psutil.Error:
                    pass
            time.sleep(0.02)
        self.processes += [found[rank] for rank in sorted(found)]
        return self.processes[-len(found) :]

    def wait_for_steps(self, folder: Path, steps: int, limit: float = 120) -> None:
        """Wait until the run in `folder` has logged so many steps."""
        log, end = folder / "log.jsonl", time.monotonic() + limit
        while not log.exists() or log.read_bytes().count(b'"loss"') < steps:
            assert time.monotonic() < end, f"no {steps} steps in {limit} s: {self.stderr.read_text()[-3000:]}"
            time.sleep(0.02)

    def gone(self, limit: float, processes: Sequence[psutil.Process] = ()) -> bool:
        """Wait until these processes, or all of them, are gone; whether they are within `limit` seconds."""
        end = time.monotonic() + limit
        while any(map(_alive, processes or self.processes)):
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def status(self) -> int:
        """Exit status of the launcher, or the worst one of forked processes, as shells give it."""
        if self.launcher is not None:
            return self.launcher.wait()
        return max(abs(os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])) for process in self.processes)

    def kill(self) -> None:
        """Leave nothing behind."""
        for process in self.processes:
            if _alive(process):
                process.kill()
        self.gone(10)


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def words(launcher: str, processes: int) -> list[str]:
    """The command line of a launcher on this host."""
    several = ("--multi_gpu", "--num_processes", str(processes)) if processes > 1 else ()
    module = {
        "accelerate": ("accelerate.commands.launch", *several, "--main_process_port", "0"),
        "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
    }[launcher]
    return [sys.executable, "-m", *module]


def write_recipe(place: Path, config: Config, planted: str) -> Path:
    """The run as a recipe that first does what is `planted`."""
    recipe = place / "recipe.py"
    imports = "from minilm import *\nfrom minilm.cli import run_recipe\n"
    recipe.write_text(f"{imports}{planted}\nif __name__ == '__main__':\n    run_recipe({config!r})\n")
    return recipe


def start(
    launcher: str, config: Config, place: Path, *, processes: int = 2, planted: str = "", command: Sequence[str] = ()
) -> Job:
    """Begin the run `config` under `launcher`, or forked; each process first does what is `planted`."""
    stderr = place / f"stderr-{launcher}"
    if launcher == "fork":
        return Job(None, _fork(config, stderr, processes, planted), stderr)
    command = [*(command or words(launcher, processes)), str(write_recipe(place, config, planted))]
    # One thread, as the forked runs have that it is compared with; from 1, which launchers set, minilm would take more.
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "01", "PYTHONPATH": str(ROOT)}
    with stderr.open("wb") as file:
        job = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=file)
    return Job(job, [psutil.Process(job.pid)], stderr)


def _fork(config: Config, stderr: Path, processes: int, planted: str) -> list[psutil.Process]:
    """One process of this kind for each rank, with what torchrun would have put in its environment."""
    attempt = stderr.with_name(f"{stderr.name}-attempt")
    (attempt / "0").mkdir(parents=True, exist_ok=True)
    (attempt / "told").unlink(missing_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    stderr.write_bytes(b"")
    children = []
    for rank in range(processes):
        if (child := os.fork()) == 0:
            status = 1
            try:
                for number, path in ((1, os.devnull), (2, str(stderr))):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                if processes > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(processes)}
                    os.environ["TORCHELASTIC_ERROR_FILE"] = str(attempt / "0" / "error.json")
                os.environ["ACCELERATE_USE_CPU"] = "true"
                exec(planted, {})
                status = _train(config)
            finally:
                os._exit(status)
        children.append(psutil.Process(child))
    return children


def _train(config: Config) -> int:
    import minilm.train

    try:
        guarded(ended_by_signals()(lambda: _discard(minilm.train.train(config))))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _discard(result: object) -> None:
    """A function that returns nothing is wanted."""
