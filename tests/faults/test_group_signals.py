"""The short form of tests/faults/groups.py."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.groups import Case, trial

CASES: list[Case] = [
    ("fork", 1, 2, signal.SIGTERM),
    ("fork", 2, 2, signal.SIGUSR1),
]


@pytest.mark.scorecard(42)
def test_a_signal_to_every_process_leaves_a_checkpoint_that_resumes_to_the_same_end(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    tried, wrong = trial(tmp_path, CASES)
    assert not wrong
    figure(f"{tried}/{tried} with a checkpoint (by launchers, 30: python -m tests.faults.groups)")
