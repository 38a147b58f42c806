"""Variables of a launcher that are left in the environment: they neither silence a run nor make it wait for others."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from minilm.commands.recipe import exit_on_error
from minilm.train import train
from tests.jobs import config_in, fork, launched

SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}
SINGLE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
TRAINS: dict[str, dict[str, str]] = {
    "nothing": {},
    "a rank": {"RANK": "1"},
    "a local rank": {"LOCAL_RANK": "0"},
    "ranks": {"RANK": "1", "LOCAL_RANK": "1"},
    "a rank that is not a number": {"RANK": "first"},
    "an address": {"MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "29500"},
    "a number of processes here": {"LOCAL_WORLD_SIZE": "8", "OMP_NUM_THREADS": "1"},
    "one process without an address": SINGLE,
    "a rank beyond the only process": {**SINGLE, "RANK": "1"},
    "SLURM": SLURM,
    "a rank within SLURM": {**SLURM, "RANK": "1"},
    "an error file of a job that has ended": {"RANK": "1", "TORCHELASTIC_ERROR_FILE": "/nowhere/0/error.json"},
}
REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "a number of processes": ({"WORLD_SIZE": "2"}, "WORLD_SIZE"),
    "a number of processes that is not a number": ({"WORLD_SIZE": "many"}, "WORLD_SIZE"),
    "a rank and a number of processes": ({"RANK": "1", "WORLD_SIZE": "2"}, "WORLD_SIZE"),
    "no address": ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE"),
    "a rank beyond the last": ({**launched(0), "RANK": "5"}, "WORLD_SIZE"),
    "a rank below 0": ({**launched(0), "RANK": "-1"}, "WORLD_SIZE"),
    "MPI without an address": ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "PMI_SIZE"),
}
ALL = TRAINS | {situation: environment for situation, (environment, _) in REFUSED.items()}


def run(place: Path, environment: dict[str, str], work: Callable[[], None]) -> tuple[int, list[str]]:
    """Run `work` in a process with these variables. Return its exit status and the lines of its stderr."""

    def begin() -> int:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        os.environ |= environment
        try:
            exit_on_error(work)
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    (child,) = fork(begin, place / "stderr", 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    return status, (place / "stderr").read_text().splitlines()


@pytest.mark.parametrize("situation", ALL)
def test_an_error_is_printed_once_whatever_is_left_in_the_environment(situation: str, tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("column 'x'")

    assert run(tmp_path, ALL[situation], fail) == (2, ["error: column 'x'"])


@pytest.mark.parametrize("situation", TRAINS)
def test_a_run_trains_whatever_is_left_in_the_environment(situation: str, tmp_path: Path) -> None:
    config = config_in(tmp_path, 1)
    config = replace(config, run=replace(config.run, output_dir=str(tmp_path / "out")))
    status, lines = run(tmp_path, TRAINS[situation], lambda: print(train(config)))
    assert (status, [line for line in lines if line.startswith(("error", "Traceback"))]) == (0, [])
    assert (tmp_path / "out" / "all_results.json").is_file()


@pytest.mark.parametrize("situation", REFUSED)
def test_an_incomplete_job_is_refused_by_the_name_of_its_variable(situation: str, tmp_path: Path) -> None:
    environment, name = REFUSED[situation]
    config = config_in(tmp_path, 1)
    status, (line,) = run(tmp_path, environment, lambda: print(train(config)))
    assert status == 2
    assert line.startswith("error: ")
    assert f"unset {name} " in line
