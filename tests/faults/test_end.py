"""The short form of tests/faults/end.py."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.end import trial


@pytest.mark.scorecard(12)
def test_killed_while_it_ends_a_run_leaves_after_a_resume_what_an_undisturbed_one_leaves(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    end = "out of patience, the best weights loaded"
    tried, other = trial(
        tmp_path, end, ["before CheckpointSaver.save", "before load_best_weights", "before write_results"]
    )
    assert not other
    figure(f"{end}: killed at {tried} places of its end, {tried} the same to the bit")
