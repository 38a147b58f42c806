"""The short form of tests/faults/end.py."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.end import trial


@pytest.mark.scorecard(12)
@pytest.mark.parametrize(
    ("end", "boundaries"),
    [
        ("out of patience", ["after Recorder.conclude"]),
        (
            "out of patience, the best weights loaded",
            ["before Saver.save", "before load_step", "after output.save_tokenizer", "before write_results"],
        ),
    ],
)
def test_killed_while_it_ends_a_run_leaves_after_a_resume_what_an_undisturbed_one_leaves(
    end: str, boundaries: list[str], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    tried, other = trial(tmp_path, end, boundaries)
    assert not other
    figure(f"{end}: killed at {tried} places of its end, {tried} the same to the bit")
