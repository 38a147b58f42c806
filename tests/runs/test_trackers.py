"""Trackers get what log.jsonl gets, read back here by each one's own reader; none of them can stop a run."""

import importlib.util
import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from minilm import Config, Run
from minilm.config.serialization import read_run_config
from minilm.runs import trackers
from minilm.runs.trackers import start_trackers
from minilm.train import train
from tests.jobs import config_in, finish, of_any_length
from tests.launch import read_log

SECRET = "c0ffee" * 6 + "cafe"  # as long as a key of wandb is
Found = dict[str, dict[int, float]]


def run_with(place: Path, *names: str, steps: int = 4) -> Config:
    """A tiny run on a text in `place`, to its folder `out`, with these trackers."""
    config = of_any_length(config_in(place, steps, save_every=2))
    run = replace(config.run, output_dir=str(place / "out"), eval_every=4, keep_last=9, trackers=names)
    return replace(config, run=run)


def from_tensorboard(out: Path) -> tuple[Found, str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    settings = [path.read_text() for path in (out / "tensorboard").rglob("hparams.yml")]
    assert len(settings) == 1
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}, settings[0]


def from_wandb(out: Path) -> tuple[Found, str]:
    found: Found = {}
    settings = ""
    ids = set()
    for path in sorted((out / "wandb").glob("offline-run-*/*.wandb")):  # a file for each part of the run
        reader = Path(sys.executable).with_name("wandb")
        message = subprocess.run(
            [reader, "leet", "inspect", "--json", path], capture_output=True, text=True, check=True
        )
        for line in map(json.loads, message.stdout.splitlines()):
            if line["type"] == "run":
                ids.add(line["run"]["run_id"])
            if line["type"] == "config":
                settings += json.dumps(line)
            if line["type"] == "history":
                values = line["history"]["item"]
                for name in values.keys() - {"_step"}:
                    found.setdefault(name, {})[values["_step"]] = values[name]
    assert len(ids) == 1
    return found, settings


def from_trackio(out: Path) -> tuple[Found, str]:
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("minilm")
    found: Found = {}
    for line in SQLiteStorage.get_logs("minilm", name):
        for key, value in line.items():
            found.setdefault(key, {})[line["step"]] = value
    return found, json.dumps(SQLiteStorage.get_run_config("minilm", name))


def from_mlflow(out: Path) -> tuple[Found, str]:
    from mlflow import MlflowClient

    client = MlflowClient()
    (experiment,) = [experiment for experiment in client.search_experiments() if experiment.name == "minilm"]
    (run,) = client.search_runs([experiment.experiment_id])
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    assert run.info.status == "FINISHED"
    return {name: {m.step: m.value for m in values} for name, values in history.items()}, json.dumps(run.data.params)


READERS = {"tensorboard": from_tensorboard, "wandb": from_wandb, "trackio": from_trackio, "mlflow": from_mlflow}


INSTALLED = [name for name in READERS if importlib.util.find_spec(name)]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, float]]]:
    """The folder and the results of a run with all trackers, offline and with secrets about, that was resumed."""
    place = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trackers' own
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("MLFLOW_TRACKING_URI", f"file://{place}/mlruns")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        for name in ("WANDB_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
            patch.setenv(name, SECRET)
        if "trackio" in INSTALLED:
            patch.setattr("trackio.sqlite_storage.TRACKIO_DIR", place / "trackio")
        config = run_with(place, *INSTALLED)
        train(config)
        shutil.rmtree(place / "out" / "checkpoint-4")  # as if killed after step 3
        yield place, train(replace(config, run=replace(config.run, resume="latest", max_steps=5))).figures


@pytest.mark.parametrize("name", READERS)
def test_a_tracker_has_all_figures_and_settings_of_a_run_that_was_resumed(
    name: str, tracked: tuple[Path, dict[str, float]]
) -> None:
    pytest.importorskip(name, reason=f"takes pip install {name}; mlflow is too big for the test extra")
    (place, results), expected = tracked, {}
    found, settings = READERS[name](place / "out")
    for part, lines in zip(("train", "eval"), read_log(place / "out"), strict=True):
        for key in lines[0].keys() - {"step", "tokens_per_second", "mfu", "seconds"}:
            figures = {line["step"]: pytest.approx(line[key], rel=1e-6) for line in lines}
            expected[f"{part}/{key.removeprefix('eval_')}"] = figures
    assert {"train/loss", "train/lr", "train/grad_norm", "eval/loss", "eval/bits_per_byte"} <= expected.keys()
    assert {name: found[name] for name in expected} == expected
    assert found["train/mfu"].keys() == {1, 2, 3, 4, 5}
    assert found["final/loss"][5] == pytest.approx(results["eval_loss"], rel=1e-6)
    assert found["final/tokens"][5] == results["tokens"]
    assert "optim.layer_decay" in settings
    assert "constant" in settings


def test_no_secret_is_in_any_file(tracked: tuple[Path, dict[str, float]]) -> None:
    for path in tracked[0].rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


class Stub:
    """A tracker that fails or hangs in the call that a test chooses. All of them record their calls in one list."""

    told: list[Any]
    fails: str = ""
    hangs: str = ""

    def __init__(self, **arguments: Any) -> None:
        Stub.told = []

    def _do(self, what: str, *more: Any) -> None:
        Stub.told.append((what, *more))
        if what == Stub.fails:
            raise SystemExit("no\nroute")
        if what == Stub.hangs:
            time.sleep(60)

    def start(self) -> None:
        self._do("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._do("store")

    def log(self, values: dict[str, float], step: int) -> None:
        self._do("log", step)

    def finish(self) -> None:
        self._do("finish")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[Stub]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Stub)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "wandb" or None)
    monkeypatch.setattr(trackers, "_PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(trackers, "_name_of_run", lambda name, tracker: name)
    monkeypatch.setattr(Stub, "fails", "")
    monkeypatch.setattr(Stub, "hangs", "")
    return Stub


def feed(place: Path, *names: str, steps: int = 4, after: int = 0) -> None:
    """Open these trackers, log so many steps, and finish."""
    accelerator = SimpleNamespace(trackers=[])
    start_trackers(accelerator, names, {"run.seed": 0}, place, after)
    for step in range(1, steps + 1):
        for tracker in accelerator.trackers:
            tracker.log({"train/loss": 1.0}, step=step)
    for tracker in accelerator.trackers:
        tracker.finish()


def warnings_of_trackers(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line.removeprefix("run.trackers ") for line in caplog.messages if line.startswith("run.trackers")]


CONTINUES = "; the run continues without it, and log.jsonl has all figures"


@pytest.mark.parametrize(
    ("kind", "at", "message"),
    [
        ("fails", "start", "no route"),
        ("fails", "store", "no route"),
        ("fails", "log", "no route"),
        ("fails", "finish", "no route"),
        ("hangs", "start", "it did not start in time"),
        ("hangs", "log", "it did not finish in time"),
    ],
)
def test_a_tracker_that_fails_or_hangs_is_dropped_with_one_warning(
    kind: str, at: str, message: str, stub: type[Stub], tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stub, kind, at)
    feed(tmp_path, "tensorboard")
    assert warnings_of_trackers(caplog) == [f"tensorboard: {message}{CONTINUES}"]
    assert stub.told[-1][0] == at
    assert (tmp_path / trackers.RUNS).exists() == (at in ("log", "finish"))


def test_one_that_does_not_keep_up_is_dropped(
    stub: type[Stub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stub, "hangs", "log")
    monkeypatch.setattr(trackers, "_BACKLOG_LINES", 2)
    feed(tmp_path, "tensorboard")
    assert warnings_of_trackers(caplog) == [f"tensorboard: it is 2 lines behind{CONTINUES}"]


def test_a_tracker_that_is_not_installed_is_named_with_the_command_and_the_others_continue(
    stub: type[Stub], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    feed(tmp_path, "wandb", "tensorboard", "tensorboard", steps=2)
    assert warnings_of_trackers(caplog) == [
        "wandb is not installed, and the run continues without it: pip install wandb"
    ]
    assert stub.told == [("start",), ("store",), ("log", 1), ("log", 2), ("finish",)]


def test_a_run_ends_as_ever_when_its_tracker_fails(
    stub: type[Stub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stub, "fails", "log")
    train(run_with(tmp_path, "tensorboard"))
    assert warnings_of_trackers(caplog) == [f"tensorboard: no route{CONTINUES}"]
    assert [step["step"] for step in read_log(tmp_path / "out")[0]] == [1, 2, 3, 4]
    assert (tmp_path / "out" / "all_results.json").exists()
    assert read_run_config(str(tmp_path / "out" / "run.json")).run.trackers == ("tensorboard",)


def test_a_new_run_in_the_folder_of_another_does_not_continue_its_trackers(stub: type[Stub], tmp_path: Path) -> None:
    feed(tmp_path, "tensorboard")
    assert json.loads((tmp_path / trackers.RUNS).read_text()) == {"tensorboard": "tensorboard"}
    feed(tmp_path, after=4)  # continues without any
    feed(tmp_path, "tensorboard", after=4)
    assert ("store",) not in stub.told
    feed(tmp_path)
    assert not (tmp_path / trackers.RUNS).exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"tensorboard": 1}', "\udcff"])
def test_a_damaged_record_of_the_trackers_runs_starts_new_ones_with_a_warning(
    content: str, stub: type[Stub], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = tmp_path / trackers.RUNS
    record.write_bytes(content.encode("utf-8", "surrogateescape"))
    feed(tmp_path, "tensorboard", after=4)
    assert f"{record} cannot be read, so each tracker starts a new run" in caplog.messages
    assert ("store",) in stub.told
    assert json.loads(record.read_text()) == {"tensorboard": "tensorboard"}


def test_only_the_main_process_of_a_job_tracks(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    finish(run_with(tmp_path, "tensorboard"), tmp_path, processes=2)
    assert len(list((tmp_path / "out" / "tensorboard").glob("events*"))) == 1
    found, _ = from_tensorboard(tmp_path / "out")
    assert found["train/tokens"] == {line["step"]: line["tokens"] for line in read_log(tmp_path / "out")[0]}


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^run\.trackers must be one of tensorboard, .*, mlflow, not wandbb$"):
        Run(trackers=("tensorboard", "wandbb"))
