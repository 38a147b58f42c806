"""`--seeds`: each run is the run of its seed alone; the summary of all seeds; how they end early."""

import json
import math
import os
import signal
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator

import minilm.utils.signals
from minilm import Config, Data
from minilm.commands.recipe import run_recipe
from minilm.commands.seeds import summarise_seeds, train_seeds
from minilm.runs.early_stopping import StopRequest
from minilm.runs.train_result import TrainResult
from minilm.train import train
from minilm.utils.errors import TrainingStopped
from tests.jobs import CONFIG, end_of, finish_all, write_text


@pytest.fixture
def config(tmp_path: Path) -> Config:
    run = replace(CONFIG.run, max_steps=3, save_every=3, output_dir=str(tmp_path / "out"))
    return replace(CONFIG, data=Data(source=write_text(tmp_path / "text.txt"), eval_fraction=0.1), run=run)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Run a recipe on these flags, and return its exit status."""
    monkeypatch.setattr("minilm.commands.recipe.interrupt_on_signals", lambda: lambda work: work)
    monkeypatch.setattr("minilm.commands.recipe.show_log", lambda: None)

    def run(config: Config, *flags: str, train_function: Callable[..., dict[str, float]] | None = None) -> object:
        monkeypatch.setattr(sys, "argv", ["recipes/mine.py", *flags])
        try:
            run_recipe(config, "", train_function)
        except SystemExit as end:
            return end.code
        return 0

    return run


def test_each_run_of_several_seeds_is_that_of_its_seed_alone(
    config: Config, recipe: Callable[..., object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe(config, "--seeds", "3", "1", "--optim.lr", "1e-3") == 0
    message, out = capsys.readouterr().out, tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["seed-1", "seed-3", "seeds.json"]
    figures = {seed: json.loads((out / f"seed-{seed}" / "all_results.json").read_text()) for seed in (3, 1)}
    summary = json.loads((out / "seeds.json").read_text())
    assert summary == summarise_seeds(figures)
    assert figures[3]["eval_loss"] != figures[1]["eval_loss"]
    assert f"{summary['eval_loss']['mean']:.5g}" in message

    run = replace(config.run, seed=1, output_dir=str(tmp_path / "alone"))
    train(replace(config, run=run, optim=replace(config.optim, lr=1e-3)))
    assert end_of(out / "seed-1") == end_of(tmp_path / "alone")


SEEDS_SCRIPT = """
import minilm.train
import torch.distributed as dist
from minilm.commands.seeds import train_seeds
train, groups = minilm.train.train, []

def train_function(config, name):
    groups.append(dist.group.WORLD)
    return train(config)

def swept(config):
    train_seeds(config, "mine", [3, 1], train_function)
    assert groups[0] is groups[1] is not None
    assert not dist.is_initialized()

minilm.train.train = swept
"""


def test_two_processes_stay_together_from_seed_to_seed_and_part_after_the_last(config: Config, tmp_path: Path) -> None:
    finish_all([(config, 2)], tmp_path, SEEDS_SCRIPT)
    summary = json.loads((tmp_path / "out" / "seeds.json").read_text())
    assert list(summary["eval_loss"]["values"]) == ["3", "1"]
    assert json.loads((tmp_path / "out" / "seed-1" / "run.json").read_text())["processes"] == 2


def test_the_summary_has_the_mean_and_the_deviation_of_a_sample() -> None:
    values = {5: 2.0, 7: 3.5, 0: 2.75}
    figure = summarise_seeds({seed: {"loss": value} for seed, value in values.items()})["loss"]
    assert figure["mean"] == pytest.approx(statistics.mean(values.values()))
    assert figure["std"] == pytest.approx(statistics.stdev(values.values()))
    assert figure["values"] == {"5": 2.0, "7": 3.5, "0": 2.75}
    assert summarise_seeds({4: {"loss": 2.0}})["loss"] == {"mean": 2.0, "std": None, "values": {"4": 2.0}}
    far = summarise_seeds({4: {"loss": math.inf}, 5: {"loss": 1.0, "f1": 0.5}})
    assert far["loss"] == {"mean": None, "std": None, "values": {"4": None, "5": 1.0}}
    assert far["f1"]["values"] == {"5": 0.5}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seeds", "--seeds needs numbers"),
        ("--seeds --batch.examples 3", "--seeds needs numbers"),
        ("--seeds 0 x", "not 'x'"),
        ("--seeds 0 1.5", "not '1.5'"),
        ("--seeds=0 -1", "run.seed must be 0 or more"),
        ("--seeds 1 2 01", "has 1 twice"),
        ("--seeds 1 2 --run.seed 3", "--run.seed exclude each other"),
        ("--run.seed=3 --seeds 1 2", "--run.seed exclude each other"),
        ("--seeds 1 2 --run.resume latest", "--run.resume exclude each other"),
        ("--seeds 1 2 --dry-run", "--dry-run exclude each other"),
    ],
)
def test_wrong_seeds_are_refused_in_one_line(
    flags: str,
    message: str,
    config: Config,
    recipe: Callable[..., object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert recipe(config, *flags.split(), train_function=pytest.fail) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_taken_is_refused_before_the_first_seed(config: Config, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match="is not empty"):
        train_seeds(config, "mine", [0, 1], pytest.fail)


def test_a_signal_too_late_for_its_run_ends_the_seeds(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minilm.utils.signals, "_last_signal", [0])

    def train_function(config: Config, name: str) -> TrainResult:
        Path(str(config.run.output_dir)).mkdir(parents=True)
        with StopRequest(Accelerator(cpu=True), saves=False):
            os.kill(os.getpid(), signal.SIGTERM)
        return TrainResult(folder=Path(), figures={"eval_loss": 1.0}, model_class=None)

    with pytest.raises(TrainingStopped, match="SIGTERM between seeds; finished seeds: 3") as caught:
        train_seeds(config, "mine", [3, 1], train_function)
    assert caught.value.status == 128 + signal.SIGTERM
    assert json.loads((tmp_path / "out" / "seeds.json").read_text())["eval_loss"]["values"] == {"3": 1.0}


def test_a_run_that_is_stopped_ends_the_seeds_and_says_how_to_resume(config: Config, tmp_path: Path) -> None:
    def train_function(config: Config, name: str) -> TrainResult:
        raise TrainingStopped("SIGTERM after step 2; --run.resume latest continues", 143)

    alone = f"--run.seed 3 --run.output-dir {tmp_path / 'out' / 'seed-3'} in place of --seeds"
    with pytest.raises(TrainingStopped, match=rf"continues \(with {alone}\); finished seeds: none") as caught:
        train_seeds(config, "mine", [3, 1], train_function)
    assert caught.value.status == 143
