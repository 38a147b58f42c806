"""The short form of tests/faults/kill.py."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.kill import trial


@pytest.mark.scorecard(12)
def test_killed_at_any_moment_a_run_resumes_and_ends_the_same(tmp_path: Path, figure: Callable[[str], None]) -> None:
    told = trial(tmp_path, processes=1, times=2, draw=random.Random(0))
    assert told.startswith("2/2 resumed, 2/2 bitwise equal")
    figure(told)
