"""The history of a run: what it says after each kind of end, what the report makes of it, and that it harms no run."""

import json
import os
import signal
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from minilm import Config
from minilm.commands.recipe import run_recipe
from minilm.runs.run_history import HISTORY, RunHistory, read_history, runs_of_recipe
from minilm.runs.run_log import read_runs
from minilm.train import train
from minilm.utils.errors import TrainingStopped
from minilm.utils.folder_lock import is_locked, lock_folder, unlock_folder
from tests.jobs import config_in

RECORDS = [{"step": n, "loss": 1.0, "tokens": 10 * n, "seconds": float(n)} for n in (1, 2, 3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run that has made 3 of 9 steps."""
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in RECORDS))
    (tmp_path / "run.json").write_text('{"steps": 9}')
    return tmp_path


def begin(folder: Path, step: int = 0) -> RunHistory:
    history = RunHistory()
    history.start(folder, step, {"optim": {"lr": 0.5}})
    return history


def status(folder: Path) -> tuple[str, str]:
    (run,) = read_runs([str(folder)])
    return run.status.kind, run.status.text


def test_a_run_of_a_recipe_records_its_command_and_what_differs_from_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minilm.commands.recipe.interrupt_on_signals", lambda: lambda work: work)
    monkeypatch.setattr("minilm.commands.recipe.show_log", lambda: None)
    flags = [
        "--optim.lr",
        "0.25",
        "--model.config.hidden-dropout-prob",
        "0.0",
        "--run.output-dir",
        str(tmp_path / "my run"),
    ]
    monkeypatch.setattr(sys, "argv", ["recipes/mine.py", *flags])
    before = datetime.now(UTC) - timedelta(seconds=1)
    run_recipe(config_in(tmp_path, 3))
    (run,) = read_runs([str(tmp_path / "my run")])
    start, end = run.history
    assert (start["event"], start["step"], end["event"], end["status"]) == ("start", 0, "end", "finished")
    assert run.command == f"python recipes/mine.py {' '.join(flags[:-1])} '{flags[-1]}'"
    assert run.changed == {"optim.lr": [3e-3, 0.25], "model.config.hidden_dropout_prob": [0.1, 0.0]}
    assert run.started is not None
    assert before < run.started <= datetime.now(UTC)
    assert run.duration is not None
    assert 0 <= run.duration < 60
    assert (run.status.kind, run.resumed) == ("finished", [])


def test_an_error_in_the_loop_is_the_reason_and_a_resume_adds_to_the_history(tmp_path: Path) -> None:
    config: Config = config_in(tmp_path, 4, save_every=2)
    config = replace(config, run=replace(config.run, output_dir=str(tmp_path / "out")))

    def fail(step: int, *_: object) -> None:
        if step == 2:
            raise RuntimeError("the disk\nis on fire")

    with pytest.raises(RuntimeError):
        train(config, after_step=fail)
    assert status(tmp_path / "out") == ("failed", "at step 3 of 4: RuntimeError: the disk is on fire")
    train(replace(config, run=replace(config.run, resume="latest")))
    (run,) = read_runs([str(tmp_path / "out")])
    assert (run.status.kind, run.resumed, run.changed) == ("finished", [2], None)
    assert [event.get("status") for event in run.history] == [None, "failed", None, "finished"]


def test_a_signal_stops_a_run_with_the_reason(tmp_path: Path) -> None:
    config: Config = config_in(tmp_path, 4, save_every=2)

    def interrupt(step: int, *_: object) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingStopped):
        train(replace(config, run=replace(config.run, output_dir=str(tmp_path / "out"))), after_step=interrupt)
    expected = "at step 3 of 4: SIGINT after step 3; --run.resume latest continues the run"
    assert status(tmp_path / "out") == ("stopped", expected)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            TrainingStopped("SIGINT after step 3; resume", 130),
            ("stopped", "at step 3 of 9: SIGINT after step 3; resume"),
        ),
        (TrainingStopped("no finite gradient", 1), ("failed", "at step 3 of 9: no finite gradient")),
        (KeyboardInterrupt(2), ("stopped", "at step 3 of 9: interrupted")),
        (ValueError("a bad row"), ("failed", "at step 3 of 9: a bad row")),
        (MemoryError(), ("failed", "at step 3 of 9: MemoryError: ")),
    ],
)
def test_each_end_has_its_status(error: BaseException, expected: tuple[str, str], folder: Path) -> None:
    begin(folder).end(error)
    assert status(folder) == expected


def test_a_run_without_an_end_is_running_while_its_folder_is_locked_and_killed_afterwards(folder: Path) -> None:
    assert status(folder) == ("unknown", "not finished, at step 3 of 9")
    begin(folder)
    lock_folder(folder)
    assert is_locked(folder)
    assert status(folder) == ("running", "step 3 of 9")
    unlock_folder(folder)
    assert not is_locked(folder)
    assert status(folder)[0] == "killed"


def test_a_new_run_drops_the_history_of_the_one_before(folder: Path) -> None:
    begin(folder).end()
    begin(folder, step=3)
    assert len(read_history(folder)) == 3
    begin(folder)
    assert [event["event"] for event in read_history(folder)] == ["start"]


def test_a_run_that_never_began_writes_no_end(folder: Path) -> None:
    RunHistory().end(ValueError("refused"))
    assert not (folder / HISTORY).exists()


def test_a_history_that_cannot_be_written_hides_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []

    def refuse(*arguments: object) -> None:
        tried.append(arguments)
        raise OSError("no space left")

    history = begin(folder)
    monkeypatch.setattr("minilm.runs.run_history.write_atomically", refuse)
    history.end(ValueError("the error itself"))
    assert len(tried) == 1
    assert [event["event"] for event in read_history(folder)] == ["start"]


def test_a_link_in_place_of_the_history_is_not_followed(folder: Path) -> None:
    (folder / "outside.txt").write_text("precious")
    (folder / HISTORY).symlink_to(folder / "outside.txt")
    begin(folder, step=2)
    assert (folder / "outside.txt").read_text() == "precious"


@pytest.mark.parametrize(
    "content",
    ["{", "[]\n3\nnull", '{"event": "start"}', '{"event": "start", "time": 3, "step": "x", "changed": [1]}', "\udcff"],
)
def test_a_damaged_history_does_not_stop_the_report(content: str, folder: Path) -> None:
    (folder / HISTORY).write_text(content, errors="surrogateescape")
    (run,) = read_runs([str(folder)])
    assert (run.resumed, run.changed, run.started) == ([], None, None)
    assert run.duration in (None, 0.0)
    assert run.status.kind in ("unknown", "killed")


def test_durations_of_all_starts_add_up_without_the_time_between(folder: Path) -> None:
    def at(second: int, event: str, **facts: object) -> str:
        return json.dumps({"event": event, "time": f"2026-11-29T12:00:{second:02d}+00:00", **facts}) + "\n"

    lines = [
        at(0, "start", step=0),
        at(10, "end", status="stopped"),
        at(30, "start", step=2),
        at(35, "end", status="x"),
    ]
    (folder / HISTORY).write_text("".join(lines))
    (run,) = read_runs([str(folder)])
    assert run.duration == 15.0


def test_the_settings_of_a_recipe_are_forgotten_after_it(folder: Path) -> None:
    with runs_of_recipe(Config()):
        begin(folder)
    assert "changed" in read_history(folder)[0]
    begin(folder)
    assert "changed" not in read_history(folder)[0]


@pytest.mark.parametrize("damage", [b'{"event": "end", "ti', b"\xff\xfe\x00"])
def test_a_damaged_line_costs_no_other_line(damage: bytes, folder: Path) -> None:
    begin(folder).end()
    with (folder / HISTORY).open("ab") as file:
        file.write(damage)
    begin(folder, step=3).end()
    assert [event["event"] for event in read_history(folder)] == ["start", "end", "start", "end"]
