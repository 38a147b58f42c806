"""The short form of tests/faults/signals.py, most of it without a launcher."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.signals import trial
from tests.jobs import config_in, end_of, finish_all, start
from tests.launch import ROOT, read_log


@pytest.mark.scorecard(17)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_gets_a_signal_at_any_moment_saves_and_resumes_to_the_same_end(
    processes: int, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    told = trial(tmp_path, "fork", processes, times=2, draw=random.Random(processes))
    assert told.startswith("2/2 bitwise equal")
    figure(f"{processes} process(es): {told}")


@pytest.mark.scorecard(17)
@pytest.mark.parametrize(("launcher", "processes"), [("accelerate", 1), ("torchrun", 2)])
def test_a_launched_run_that_gets_a_signal_saves_and_resumes_to_the_same_end(
    launcher: str, processes: int, tmp_path: Path
) -> None:
    # More steps than a fast machine makes between the fifth one and the signal.
    steps = 300
    config = config_in(tmp_path, steps=steps)
    stopped, whole = (
        replace(config, run=replace(config.run, output_dir=str(tmp_path / name))) for name in ("stopped", "whole")
    )
    folder = tmp_path / "stopped"
    job = start(launcher, stopped, tmp_path, processes=processes)
    try:
        job.workers(processes)
        job.wait_for_steps(folder, 5)
        job.processes[0].send_signal(signal.SIGTERM)
        assert job.gone(40), job.stderr.read_text()[-3000:]
        assert job.status() != 0
    finally:
        job.kill()
    assert 5 <= len(read_log(folder)[0]) < steps
    assert list(folder.glob("checkpoint-*/manifest.json")), job.stderr.read_text()[-3000:]
    assert not (folder / "all_results.json").exists()
    resumed = replace(stopped, run=replace(stopped.run, resume="latest"))
    finish_all([(resumed, processes), (whole, processes)], tmp_path)
    assert end_of(folder) == end_of(tmp_path / "whole")


ORPHAN = """
import os, time
if os.fork() == 0:
    while os.getppid() == int(os.environ["LAUNCHER"]):
        time.sleep(0.01)
    from minilm.utils.signals import interrupt_on_signals
    try:
        with interrupt_on_signals():
            time.sleep(2 * (os.getppid() == 1))
        print("never told" if os.getppid() == 1 else "not init's")
    except KeyboardInterrupt as error:
        print("told", *error.args)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
def test_a_worker_whose_launcher_died_while_it_was_being_imported_ends() -> None:
    code = 'import os; os.environ["LAUNCHER"] = str(os.getpid())' + ORPHAN
    launched = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_MODE": "default", "PYTHONPATH": str(ROOT)}
    worker = [sys.executable, "-c", code]
    output = subprocess.run(worker, env={**os.environ, **launched}, capture_output=True, text=True, timeout=60).stdout
    if "not init's" in output:
        pytest.skip("something other than init takes care of orphans here")
    assert output == f"told {signal.SIGTERM.value}\n"


# The first process takes long; the other waits for it, here in a barrier, there inside a library.
BEFORE_THE_FIRST_STEP = {
    "while encoding": """
import time
from pathlib import Path
import minilm.runs.session
def prepare_run(config, memory):
    Path(config.run.output_dir).with_name("begun").touch()
    time.sleep(100)
minilm.runs.session.prepare_run = prepare_run
""",
    "before the processes have met": """
import os, time
from pathlib import Path
import minilm.runs.session
meet = minilm.runs.session.start
def start(run):
    if os.environ.get("RANK", "0") == "0":
        Path(run.output_dir).with_name("begun").touch()
        time.sleep(100)
    return meet(run)
minilm.runs.session.start = start
""",
}


@pytest.mark.scorecard(17)
@pytest.mark.parametrize("moment", BEFORE_THE_FIRST_STEP)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_gets_a_signal_before_its_first_step_ends_at_once_in_one_line(
    number: signal.Signals, processes: int, moment: str, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    folder = tmp_path / "out"
    config = config_in(tmp_path, steps=3)
    config = replace(config, run=replace(config.run, output_dir=str(folder)))
    job = start("fork", config, tmp_path, processes=processes, planted=BEFORE_THE_FIRST_STEP[moment])
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.5)  # the other process waits for this one by now
        began = time.monotonic()
        for process in job.processes:
            process.send_signal(number)
        assert job.gone(10)
        seconds = time.monotonic() - began
    finally:
        job.kill()
    told = [line for line in job.stderr.read_text().splitlines() if "arning" not in line and "warn" not in line]
    assert [line for line in told if "Distributed" not in line] == [
        "interrupted" if number == signal.SIGINT else f"interrupted by {number.name}"
    ]
    assert not folder.exists()
    figure(f"{number.name} {moment}, {processes} process(es): gone after {seconds:.1f} s, one line")
