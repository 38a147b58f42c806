"""The short form of tests/faults/signals.py, without a launcher."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.signals import trial


@pytest.mark.scorecard(17)
@pytest.mark.parametrize("processes", [1, 2])
def test_told_to_end_at_any_moment_a_run_saves_and_goes_on_to_the_same_end(
    processes: int, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    told = trial(tmp_path, "fork", processes, times=2, draw=random.Random(processes))
    assert told.startswith("2/2 bitwise equal")
    figure(f"{processes} process(es): {told}")
