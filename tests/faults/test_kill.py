"""The short form of tests/faults/kill.py."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.launch import ROOT


@pytest.mark.scorecard(12)
def test_killed_at_any_moment_a_run_resumes_and_ends_the_same(figure: Callable[[str], None]) -> None:
    command = [sys.executable, "-m", "tests.faults.kill", "--times", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert "2/2 resumed, 2/2 bitwise equal" in done.stdout, done.stderr[-2000:]
    figure(done.stdout.strip())
