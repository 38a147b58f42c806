"""The best evaluation: kept, waited for, and loaded in the end."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from minilm import Config, Run
from minilm.runs.best_checkpoint import BestEvaluation
from minilm.runs.checkpoint import Progress
from minilm.train import train
from minilm.utils.errors import TrainingStopped
from tests.jobs import config_in, of_any_length
from tests.launch import read_log


def best_of(metric: str, values: list[float], patience: int | None = None) -> tuple[BestEvaluation, list[bool]]:
    best = BestEvaluation(Run(best_metric=metric, patience=patience), ["eval_loss", "accuracy"], Progress())
    return best, [best.update({metric: value}, step) for step, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("metric", "values", "better"),
    [
        ("eval_loss", [3.0, 2.0, 2.0, 2.5, 1.0], [True, True, False, False, True]),
        ("accuracy", [0.5, 0.4, 0.6, 0.6], [True, False, True, False]),
        ("eval_loss", [math.nan, 2.0, math.inf, 1.0], [False, True, False, True]),
    ],
)
def test_better_is_lower_for_losses_and_higher_for_all_else(metric, values, better) -> None:
    best, found = best_of(metric, values)
    assert found == better
    last = max(step for step, is_better in enumerate(better, start=1) if is_better)
    assert (best.step, best.value, best.stale) == (last, values[last - 1], len(values) - last)
    assert not best.out_of_patience


def test_patience_counts_evaluations_in_a_row_across_a_resume() -> None:
    best, _ = best_of("eval_loss", [2.0, 3.0, 1.0, 1.5], patience=2)
    assert not best.out_of_patience
    assert best.state_after(4) == {"figure": 1.5, "best": 1.0, "best_step": 3, "stale": 1}
    assert best.state_after(5)["figure"] is None
    resumed = BestEvaluation(Run(patience=2), ["eval_loss"], Progress(**best.state_after(4)))
    resumed.update({"eval_loss": 1.2}, 5)
    assert resumed.out_of_patience


def test_an_unknown_figure_is_refused(tmp_path: Path) -> None:
    config = config_in(tmp_path, steps=4)
    run = replace(config.run, output_dir=str(tmp_path / "out"), best_metric="eval_los")
    with pytest.raises(ValueError, match="'eval_los': did you mean 'eval_loss'"):
        train(replace(config, run=run))
    assert not (tmp_path / "out").exists()


def first_is_best(tmp_path: Path, **run: object) -> Config:
    """A run judged by a figure that never changes, so that nothing is better than its first evaluation."""
    settings = {"output_dir": str(tmp_path / "out"), "eval_every": 2, "save_every": 7, "keep_last": 1, **run}
    config = of_any_length(config_in(tmp_path, steps=20))
    return replace(config, run=replace(config.run, best_metric="unigram_bits_per_byte", **settings))


@pytest.mark.scorecard(16)
def test_the_best_weights_are_the_result_and_their_checkpoint_stays(tmp_path: Path) -> None:
    results = train(first_is_best(tmp_path, load_best=True)).figures
    evaluations = read_log(tmp_path / "out")[1]
    assert results["eval_loss"] == evaluations[0]["eval_loss"] != evaluations[-1]["eval_loss"]
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-20"]
    ours, best, last = (
        load_file(tmp_path / "out" / name / "model.safetensors") for name in ("", "checkpoint-2", "checkpoint-20")
    )
    assert all(torch.equal(ours[name], best[name]) for name in best)
    assert not all(torch.equal(ours[name], last[name]) for name in last)
    AutoModelForMaskedLM.from_pretrained(tmp_path / "out")


def test_a_run_without_improvement_ends_early_in_good_order(tmp_path: Path) -> None:
    config = first_is_best(tmp_path, patience=2)
    results = train(config).figures
    steps, evaluations = read_log(tmp_path / "out")
    assert [line["step"] for line in evaluations] == [2, 4, 6]
    assert results["steps"] == len(steps) == 6
    assert (tmp_path / "out" / "checkpoint-6").exists()
    again = replace(config, run=replace(config.run, resume="latest"))
    with pytest.raises(TrainingStopped, match=r"stopped by run\.patience\. A larger"):
        train(again)
    longer = train(replace(again, run=replace(again.run, patience=99))).figures
    assert longer["steps"] == 20


def test_a_resume_says_that_the_best_evaluation_has_no_checkpoint(tmp_path: Path) -> None:
    config = first_is_best(tmp_path)
    train(replace(config, run=replace(config.run, max_steps=8)))  # the best one is step 2, which is not saved
    before = sorted((tmp_path / "out").iterdir())
    again = replace(config, run=replace(config.run, resume="latest", load_best=True))
    with pytest.raises(ValueError, match=r"run\.load_best: .* step 2, .*: leave run\.load_best out[^\n]*$"):
        train(again)
    assert sorted((tmp_path / "out").iterdir()) == before
    assert train(replace(again, run=replace(again.run, load_best=False))).figures["steps"] == 20


def damage(folder: Path) -> None:
    weights = folder / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def take_anothers(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoint-2")
    shutil.copytree(folder / "checkpoint-7", folder / "checkpoint-2")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage, r"model\.safetensors is damaged: its size or hash is not the one in manifest\.json"),
        (take_anothers, "belongs to another run"),
    ],
)
def test_a_damaged_checkpoint_of_the_best_evaluation_is_refused_before_a_resume(
    spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    config = first_is_best(tmp_path, load_best=True, keep_last=2)
    train(replace(config, run=replace(config.run, max_steps=8)))
    spoil(tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    again = replace(config, run=replace(config.run, resume="latest"))
    with pytest.raises(
        ValueError, match=rf"^run\.load_best: .* step 2, .*{message}.*: leave run\.load_best out[^\n]*$"
    ):
        train(again)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    assert train(replace(again, run=replace(again.run, load_best=False))).figures["steps"] == 20


def test_a_run_without_a_finite_evaluation_ends_with_its_last_weights_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(BestEvaluation, "update", lambda self, figures, step: False)
    config = first_is_best(tmp_path)
    train(replace(config, run=replace(config.run, max_steps=8)))
    again = replace(config, run=replace(config.run, resume="latest", load_best=True))
    assert train(again).figures["steps"] == 20
    ours, last = (load_file(tmp_path / "out" / name / "model.safetensors") for name in ("", "checkpoint-20"))
    assert all(torch.equal(ours[name], last[name]) for name in last)
    assert any("run.load_best: no evaluation" in message for message in caplog.messages)
