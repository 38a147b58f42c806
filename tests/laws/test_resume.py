"""Laws 1 and 2 under interruption: a checkpoint is the whole state, and a resumed run is the run that never stopped."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from minilm import Config, Data
from minilm.train import train
from minilm.utils.errors import TrainingStopped
from tests.jobs import CONFIG, STEPS, end_of, finish_all, of_any_length, without_dropout, write_text
from tests.launch import read_log
from tests.laws.resume_everywhere import resume_everywhere, stopped_after


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    return replace(CONFIG, data=Data(source=text, eval_fraction=0.1))


@pytest.fixture(scope="module")
def reference(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("out") / "reference"
    train(changed(config, run={"output_dir": str(folder)}))
    return folder


@pytest.fixture
def stopped(reference: Path, tmp_path: Path) -> Callable[[int], Path]:
    return lambda step: stopped_after(step, reference, tmp_path / f"stopped-{step}")


def changed(config: Config, **groups: dict[str, object]) -> Config:
    return replace(config, **{group: replace(getattr(config, group), **fields) for group, fields in groups.items()})


@pytest.mark.scorecard(2)
@pytest.mark.parametrize(("processes", "every", "tried"), [(1, 1, 20), (2, 9, 3)])
def test_resumed_after_any_step_a_run_ends_the_same_to_the_bit(
    processes: int, every: int, tried: int, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    found = resume_everywhere(tmp_path, processes, every)
    assert found.startswith(f"{tried}/{tried} resumed runs bitwise equal")
    some = (
        ""
        if every == 1
        else f" (steps 1, {1 + every}, …; all 20: python -m tests.laws.resume_everywhere --processes 2)"
    )
    figure(f"{tried}/{tried} bitwise equal on {processes} process(es){some}")


def expect_the_same_losses(resumed: Path, reference: Path) -> float:
    """The largest relative difference of a step's loss or gradient norm."""
    lines = zip(*(read_log(folder)[0] for folder in (resumed, reference)), strict=True)
    apart = max(abs(ours[key] / theirs[key] - 1) for ours, theirs in lines for key in ("loss", "grad_norm"))
    assert apart <= 1e-5
    return apart


@pytest.fixture(scope="module")
def plain(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without dropout that was never stopped."""
    folder = tmp_path_factory.mktemp("out") / "plain"
    train(changed(without_dropout(config), run={"output_dir": str(folder)}))
    return folder


@pytest.mark.scorecard(22)
@pytest.mark.parametrize("changes", [{"micro_tokens": 4096}, {"micro_tokens": 24}, {"workers": 1}])
def test_settings_that_do_not_change_the_mathematics_may_change_at_a_resume(
    changes: dict[str, object], config: Config, plain: Path, tmp_path: Path
) -> None:
    half = stopped_after(9, plain, tmp_path / "half")
    train(changed(without_dropout(config), batch=changes, run={"output_dir": str(half), "resume": "latest"}))
    expect_the_same_losses(half, plain)


@pytest.mark.scorecard(3)
@pytest.mark.scorecard(22)
def test_the_number_of_processes_may_change_at_a_resume(
    config: Config, plain: Path, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    two, spread = tmp_path / "two", stopped_after(9, plain, tmp_path / "spread")
    config = without_dropout(config)
    resumed = changed(config, run={"output_dir": str(spread), "resume": "latest"})
    finish_all([(changed(config, run={"output_dir": str(two)}), 2), (resumed, 2)], tmp_path)
    joined = stopped_after(9, two, tmp_path / "joined")
    train(changed(config, run={"output_dir": str(joined), "resume": "latest"}))
    figure(f"from 1 to 2: {expect_the_same_losses(spread, plain):.0e}")
    figure(f"from 2 to 1: {expect_the_same_losses(joined, plain):.0e}")


@pytest.mark.scorecard(22)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optim": {"weight_decay": 0.1}}, "optim.weight_decay was 0.01, is 0.1"),
        ({"run": {"seed": 1}, "batch": {"examples": 9}}, "batch.examples was 8, is 9; run.seed was 0, is 1"),
        ({"objective": {"masked": 0.5}}, "objective.masked was 0.8, is 0.5"),
        ({"model": {"config": {**CONFIG.model.config, "intermediate_size": 32}}}, "model.config was"),
    ],
)
def test_what_changes_the_mathematics_is_refused_by_name_and_nothing_is_touched(
    changes: dict[str, dict[str, object]],
    named: str,
    config: Config,
    stopped: Callable[[int], Path],
    figure: Callable[[str], None],
) -> None:
    folder = stopped(5)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    resumed = changed(config, run={"output_dir": str(folder), "resume": "latest"})
    with pytest.raises(ValueError, match="other settings") as caught:
        train(changed(resumed, **changes))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    figure("refused by name: " + ", ".join(re.findall(r"(\S+\.\S+) was", named)))


@pytest.mark.scorecard(22)
def test_other_text_is_refused(config: Config, stopped: Callable[[int], Path]) -> None:
    text = Path(config.data.source)
    before = text.read_text()
    try:
        text.write_text(before.replace("quick", "slow"))
        with pytest.raises(ValueError, match="the training examples were"):
            train(changed(config, run={"output_dir": str(stopped(5)), "resume": "latest"}))
    finally:
        text.write_text(before)


def test_a_finished_run_says_so_and_can_be_made_longer_if_no_rate_depends_on_its_length(
    config: Config, reference: Path, stopped: Callable[[int], Path], tmp_path: Path
) -> None:
    folder = stopped(STEPS)
    (folder / "all_results.json").write_bytes((reference / "all_results.json").read_bytes())
    resumed = changed(config, run={"output_dir": str(folder), "resume": "latest"})
    with pytest.raises(
        TrainingStopped,
        match=r"is finished\. It cannot be made longer, since step 2 would have another mask rate; branch at",
    ) as caught:
        train(resumed)
    assert caught.value.status == 0
    with pytest.raises(ValueError, match=r"step 2 had the mask rate 0\.295 .* \(run\.max_steps was 20, is 23\); set"):
        train(changed(resumed, run={"max_steps": STEPS + 3}))
    folder = tmp_path / "constant"
    steady = of_any_length(changed(config, run={"output_dir": str(folder)}))
    train(steady)
    resumed = changed(steady, run={"resume": "latest"})
    with pytest.raises(TrainingStopped, match=r"is finished\. A larger --run\.max-steps continues it from step 20"):
        train(resumed)
    assert train(changed(resumed, run={"max_steps": STEPS + 3})).figures["steps"] == STEPS + 3
    assert len(read_log(folder)[0]) == STEPS + 3
    assert json.loads((folder / "all_results.json").read_text())["steps"] == STEPS + 3


def test_killed_between_the_last_checkpoint_and_the_export_a_run_is_finished_by_resuming(
    config: Config, reference: Path, stopped: Callable[[int], Path]
) -> None:
    folder = stopped(STEPS)
    (folder / "model.safetensors").unlink()
    train(changed(config, run={"output_dir": str(folder), "resume": "latest"}))
    assert end_of(folder) == end_of(reference)
