"""A long run does not grow."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch import ROOT


@pytest.mark.scorecard(25)
def test_memory_does_not_grow_with_the_steps(tmp_path: Path, figure: Callable[[str], None]) -> None:
    command = [sys.executable, "-m", "tests.laws.memory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    found = re.search(r"2000 steps: .* (\S+)%$", done.stdout, re.MULTILINE)
    assert found, done.stderr[-2000:]
    figure(found[0])
    assert float(found[1]) < 5
