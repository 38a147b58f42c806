"""Jobs that train a tiny model, to their end or until a test kills them: under a launcher, or forked without imports.

Dropout is on, each step is several micro-batches, and evaluations fall between the checkpoints.
"""

import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from accelerate.state import AcceleratorState

import minilm.distributed.launch
import minilm.train
from minilm import Batch, Config, Data, MaskedLM, Model, Optim, Run, Tokens
from minilm.commands.recipe import exit_on_error
from minilm.utils.signals import interrupt_on_signals
from tests.launch import ROOT

LAUNCHERS = ("accelerate", "torchrun")
STEPS = 20
WORDS = "the a quick brown fox returns list of names for each file in this folder and raises an error if there is none"
CONFIG = Config(
    tokens=Tokens(vocab_size=300),
    model=Model(
        type="bert",
        config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 32,
            "hidden_dropout_prob": 0.1,
        },
    ),
    objective=MaskedLM(rate=0.3, final_rate=0.2, unit="span"),
    batch=Batch(examples=8, max_length=24, micro_tokens=40),
    optim=Optim(lr=3e-3, schedule="cosine"),
    run=Run(max_steps=STEPS, eval_every=7, save_every=1, keep_last=STEPS, precision="fp32"),
)


def write_text(path: Path) -> str:
    """Documents of different lengths, enough for an epoch of 13 steps."""
    words = WORDS.split()
    lines = [" ".join(words[i * j % len(words)] for j in range(1, 3 + i * 7 % 15)) for i in range(110)]
    path.write_text("\n".join(lines))
    return str(path)


def config_in(place: Path, steps: int, save_every: int = 50) -> Config:
    """Return the configuration of a run of so many steps on a text in `place`."""
    run = replace(CONFIG.run, max_steps=steps, save_every=save_every, eval_every=70, keep_last=2)
    return replace(CONFIG, data=Data(source=write_text(place / "text.txt"), eval_fraction=0.1), run=run)


def in_folder(config: Config, folder: Path, **run: Any) -> Config:
    """Return the configuration with this output folder, and with these settings of `run`."""
    return replace(config, run=replace(config.run, output_dir=str(folder), **run))


def without_dropout(config: Config) -> Config:
    """Return the configuration of a model without dropout."""
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return replace(config, model=replace(config.model, config={**config.model.config, **rates}))


def of_any_length(config: Config) -> Config:
    """Return the configuration with rates that do not depend on the length of the run, which may then be longer."""
    optim = replace(config.optim, schedule="constant", warmup=0)
    return replace(config, optim=optim, objective=replace(config.objective, final_rate=None))


def end_of(folder: Path) -> dict[str, object]:
    """Return what must be the same to the bit: weights, moments, and the log without its times and memory."""
    timed = ("tokens_per_second", "mfu", "seconds", "memory_gb")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    return {
        "model": (folder / "model.safetensors").read_bytes(),
        "state": {path.name: path.read_bytes() for path in last.glob("*.safetensors")},
        "log": [{key: value for key, value in line.items() if key not in timed} for line in lines],
    }


@dataclass
class Job:
    """A running job: its launcher (None where it was forked), its processes, and the file of their standard error."""

    launcher: subprocess.Popen[bytes] | None
    processes: list[psutil.Process]
    stderr: Path

    def workers(self, count: int) -> list[psutil.Process]:
        """Wait for the processes that train, and return them by rank."""
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
        """Wait until these processes, or all of them, are gone; return whether that took at most `limit` seconds."""
        end = time.monotonic() + limit
        while any(map(_alive, processes or self.processes)):
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def status(self) -> int:
        """Return the exit status of the launcher, or the largest one of forked processes."""
        if self.launcher is not None:
            return self.launcher.wait()
        return max(abs(os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])) for process in self.processes)

    def kill(self) -> None:
        """Kill all processes of the job."""
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
    """Return the command line of a launcher on this host."""
    several = ("--multi_gpu", "--num_processes", str(processes)) if processes > 1 else ()
    module = {
        "python": (),
        "accelerate": ("accelerate.commands.launch", *several, "--main_process_port", "0"),
        "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
    }[launcher]
    return [sys.executable, *(("-m", *module) if module else ())]


def write_recipe(place: Path, config: Config, planted: str) -> Path:
    """Write the run as a recipe that first executes the code `planted`."""
    recipe = place / "recipe.py"
    imports = "import minilm.distributed.launch\nfrom minilm import *\nfrom minilm.commands.recipe import run_recipe\n"
    # The forked runs that this one is compared with have one thread too.
    one_thread = "minilm.distributed.launch.fair_threads = lambda environment: None\n"
    recipe.write_text(f"{imports}{one_thread}{planted}\nif __name__ == '__main__':\n    run_recipe({config!r})\n")
    return recipe


def start(
    launcher: str,
    config: Config,
    place: Path,
    *,
    processes: int = 2,
    planted: str = "",
    command: Sequence[str] = (),
    group: bool = False,
) -> Job:
    """Start the run `config` under `launcher`, or forked. Each process first executes the code `planted`.

    group: under a launcher, start a new process group.
    """
    stderr = place / f"stderr-{launcher}"
    if launcher == "fork":
        return Job(None, fork(lambda: _train(config, planted), stderr, processes), stderr)
    command = [*(command or words(launcher, processes)), str(write_recipe(place, config, planted))]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with stderr.open("wb") as file:
        job = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=file, start_new_session=group
        )
    return Job(job, [psutil.Process(job.pid)], stderr)


def finish(config: Config, place: Path, processes: int = 1, planted: str = "") -> None:
    """Run to the end, forked."""
    finish_all([(config, processes)], place, planted)


def finish_all(runs: Iterable[tuple[Config, int]], place: Path, planted: str = "", limit: float = 300) -> None:
    """Fork the runs (configuration, number of processes) and wait for them, as many at a time as there are processors.

    Raises AssertionError with the end of the standard error where a job fails, or where none ends in `limit` seconds.
    """
    free, running = os.cpu_count() or 1, list[Job]()

    def wait() -> int:
        """Wait until a job has ended, and return how many processes it had."""
        end = time.monotonic() + limit
        while not (gone := [job for job in running if job.gone(0)]):
            if time.monotonic() > end:
                errors = (
                    f"{job.stderr.parent.name}: {job.stderr.read_text(errors='replace')[-3000:]}" for job in running
                )
                raise AssertionError(f"no job ended within {limit} s; running were " + "\n".join(errors))
            time.sleep(0.01)
        running.remove(gone[0])
        assert gone[0].status() == 0, gone[0].stderr.read_text(errors="replace")[-3000:]
        return len(gone[0].processes)

    try:
        for number, (config, processes) in enumerate(runs):
            while running and free < processes:
                free += wait()
            here = place / f"job-{number}"
            here.mkdir(exist_ok=True)
            running.append(start("fork", config, here, processes=processes, planted=planted))
            free -= processes
        while running:
            wait()
    finally:
        for job in running:
            job.kill()


def launched(rank: int, processes: int = 2, port: str = "29500") -> dict[str, str]:
    """Return the environment variables that torchrun sets for a process."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def forget_other_tests() -> None:
    """Drop the state of accelerate and of runs that other tests have left in this process."""
    minilm.distributed.launch._undo.clear()
    AcceleratorState._reset_state(reset_partial_state=True)


def fork(work: Callable[[], int], stderr: Path, processes: int) -> list[psutil.Process]:
    """Fork processes with the environment of torchrun. Each does `work` and exits with the status that it returns."""
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
                sys.stdout, sys.stderr = (open(n, "w", 1, encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
                if processes > 1:
                    os.environ |= launched(rank, processes, port)
                    os.environ["TORCHELASTIC_ERROR_FILE"] = str(attempt / "0" / "error.json")
                os.environ["ACCELERATE_USE_CPU"] = "true"
                forget_other_tests()
                status = work()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(psutil.Process(child))
    return children


def _train(config: Config, planted: str) -> int:
    exec(planted, {})
    try:
        exit_on_error(interrupt_on_signals()(lambda: _discard(minilm.train.train(config))))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _discard(result: object) -> None:
    """Do nothing with the result: `exit_on_error` takes a function that returns nothing."""
