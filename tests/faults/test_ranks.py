"""The short form of tests/faults/ranks.py, without a launcher. Slow work before the first step ends no run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.ranks import FAULTS, TIMEOUT, hurt
from tests.jobs import config_in, start

LIMITS = {"raises": 15, "is killed": 15, "is stopped": TIMEOUT + 3}


@pytest.mark.scorecard(18)
@pytest.mark.parametrize("fault", FAULTS)
def test_when_a_process_is_gone_the_other_ends_and_the_reason_is_printed_once(
    fault: str, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    outcome = hurt("fork", fault, tmp_path)
    assert outcome.other is not None
    assert outcome.every is not None
    assert outcome.other < LIMITS[fault]
    (reason,) = outcome.reasons
    if fault == "raises":
        assert reason == "KeyError: 'planted'"
    else:
        assert reason.startswith("error: lost contact with another process of the job (")
        assert reason.endswith("); --run.resume latest continues from checkpoint-50")
    timeout = f" with run.timeout {TIMEOUT}" if fault == "is stopped" else ""
    figure(f"one {fault}: the other is gone after {outcome.other:.1f} s{timeout}, one reason")


SLOW = """
import os, time
import minilm.runs.session
original = minilm.runs.session.prepare_run
def prepare_run(config, memory):
    time.sleep(4 if os.environ["RANK"] == "0" else 0)
    return original(config, memory)
minilm.runs.session.prepare_run = prepare_run
"""


def test_preparing_the_examples_may_take_longer_than_processes_wait_in_a_step(tmp_path: Path) -> None:
    config = config_in(tmp_path, steps=3)
    run = replace(config.run, output_dir=str(tmp_path / "out"), timeout=2)
    job = start("fork", replace(config, run=run), tmp_path, planted=SLOW)
    assert job.status() == 0, job.stderr.read_text()
    assert (tmp_path / "out" / "all_results.json").exists()
