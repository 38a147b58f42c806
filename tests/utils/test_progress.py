"""Progress in a file: few plain lines with true figures, and the bar of tqdm on a terminal alone."""

import sys
from types import SimpleNamespace

import pytest
from tqdm.auto import tqdm

from minilm.utils import progress
from minilm.utils.progress import ProgressLines, show_progress


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def run_for(clock, lines, count, *, seconds):
    """Count `count` pieces of work, each of which takes `seconds`."""
    for _ in range(count):
        clock.now += seconds
        lines.update()


def test_a_line_has_the_step_the_figures_the_rate_and_the_time_left(clock, capsys):
    lines = ProgressLines(total=1500, unit="step")
    lines.set_postfix_str("loss 4.000")
    run_for(clock, lines, 20, seconds=0.5)
    lines.set_postfix_str("loss 3.000")
    run_for(clock, lines, 40, seconds=0.25)
    assert capsys.readouterr().err.splitlines() == [
        "step 0/1,500",
        "step 20/1,500: loss 4.000, 2.0 steps/s, 12 min 20 s left",
        # The rate is that since the line before. The time left is that of all steps so far: 1,440 of 1/3 s.
        "step 60/1,500: loss 3.000, 4.0 steps/s, 8 min left",
    ]


def test_the_steps_before_a_resume_do_not_count_for_the_rate(clock, capsys):
    lines = ProgressLines(total=100, initial=80, unit="step")
    run_for(clock, lines, 10, seconds=1.0)
    assert capsys.readouterr().err.splitlines() == ["step 80/100", "step 90/100: 1.0 steps/s, 10 s left"]


@pytest.mark.parametrize(
    ("hours", "expected"),
    [(1 / 12, range(25, 33)), (1, range(70, 90)), (24, range(215, 235)), (240, range(1500, 1600))],
)
def test_lines_come_less_often_the_longer_a_run_takes_but_do_not_stop(hours, expected, clock, capsys):
    lines = ProgressLines(total=10**6, unit="step")
    run_for(clock, lines, int(hours * 3600), seconds=1.0)
    assert len(capsys.readouterr().err.splitlines()) in expected


def test_the_last_line_comes_at_the_end_and_once(clock, capsys):
    lines = ProgressLines(total=3, unit="step")
    run_for(clock, lines, 3, seconds=1.0)
    lines.close()
    lines.close()
    assert capsys.readouterr().err.splitlines() == ["step 0/3", "step 3/3: 1.0 steps/s, done in 3.0 s"]


def test_work_that_ends_soon_is_silent_and_slow_work_is_not(clock, capsys):
    assert list(show_progress([1, 2, 3], desc="evaluating", leave=False)) == [1, 2, 3]
    assert capsys.readouterr().err == ""
    for _ in show_progress([1, 2], desc="evaluating", leave=False):
        clock.now += 20.0
    assert capsys.readouterr().err.splitlines() == [
        "evaluating: 1/2, 0.050 items/s, 20 s left",
        "evaluating: 2/2, 0.050 items/s, done in 40 s",
    ]


def test_a_disabled_progress_writes_nothing(clock, capsys):
    lines = ProgressLines(total=2, disable=True)
    run_for(clock, lines, 2, seconds=30.0)
    lines.write("a text")
    lines.close()
    assert capsys.readouterr() == ("", "")


def test_an_error_in_the_work_still_leaves_the_last_line(clock, capsys):
    def work():
        with ProgressLines(total=2, unit="step") as lines:
            run_for(clock, lines, 1, seconds=2.0)
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert capsys.readouterr().err.splitlines() == ["step 0/2", "step 1/2: 0.50 steps/s, 2.0 s left"]


def test_a_terminal_shows_the_bar_of_tqdm(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with show_progress(total=2, unit="step", leave=False) as bar:
        assert isinstance(bar, tqdm)
