"""A branch, which continues a checkpoint with other settings, is the run that had these settings from its start."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm import Config, Data, MaskedLM, Optim, Run
from minilm.optim.schedule import learning_rate
from minilm.runs.checkpoint import link_run, read_checkpoint
from minilm.runs.resume import _check_unfinished
from minilm.runs.step_changes import find_first_change
from minilm.train import train
from tests.checkpoints import contents
from tests.jobs import CONFIG, STEPS, end_of, finish_all, write_text
from tests.launch import read_log

# The trunk ends later than the branches, and its steps before BRANCHING have a constant rate after the warm-up.
BRANCHING, TRUNK_STEPS = 9, 2 * STEPS
STABLE = {"schedule": "wsd", "warmup": 3, "decay": 4}
ROOT_RATE = {"schedule": "inverse-sqrt", "warmup": 3}
TAILS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # The settings of the trunk's optimizer, and of the tail's optimizer and objective.
    "a linear decay": (STABLE, {**STABLE, "decay": 8, "decay_shape": "linear"}, {}),
    "a cosine decay of a share": (STABLE, {**STABLE, "decay": 0.4, "decay_shape": "cosine"}, {}),
    "a decay to a tenth": (STABLE, {**STABLE, "decay": 10, "final_lr": 0.1}, {}),
    "from constant to a decay": ({**STABLE, "schedule": "constant"}, {**STABLE, "decay": 6}, {}),
    "inverse-sqrt for fewer steps": (ROOT_RATE, ROOT_RATE, {}),
    "a final mask rate": (STABLE, {**STABLE, "decay": 5}, {"final_rate": 0.1, "rate_decay": 0.5}),
}


def build(text: str, folder: Path, optim: dict[str, Any], objective: dict[str, Any], steps: int) -> Config:
    return replace(
        CONFIG,
        data=Data(source=text, eval_fraction=0.1),
        objective=MaskedLM(**{"rate": 0.3, "unit": "span", **objective}),
        optim=Optim(lr=3e-3, **optim),
        run=replace(CONFIG.run, max_steps=steps, keep_last=TRUNK_STEPS, output_dir=str(folder)),
    )


def branch_from(trunk: Path, tail: Config) -> Config:
    return replace(tail, run=replace(tail.run, resume=str(trunk / f"checkpoint-{BRANCHING}")))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def trunks(text: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """Return a function that trains a trunk with these settings of the optimizer, once for each."""
    done: dict[str, Path] = {}

    def make(optim: dict[str, Any]) -> Path:
        key = json.dumps(optim)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("trunk") / "out"
            train(build(text, done[key], optim, {}, TRUNK_STEPS))
        return done[key]

    return make


@pytest.mark.parametrize("name", TAILS)
def test_trunk_and_tail_equal_the_whole_run_to_the_bit(
    name: str, text: str, trunks: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    first, optim, objective = TAILS[name]
    trunk = trunks(first)
    before = contents(trunk)
    whole = build(text, tmp_path / "whole", optim, objective, STEPS)
    train(whole)
    tail = replace(whole, run=replace(whole.run, output_dir=str(tmp_path / "tail")))
    train(branch_from(trunk, tail))
    assert end_of(tmp_path / "tail") == end_of(tmp_path / "whole")
    assert contents(trunk) == before
    if name != "inverse-sqrt for fewer steps":
        after = [
            [line["loss"] for line in read_log(folder)[0][BRANCHING:STEPS]] for folder in (trunk, tmp_path / "tail")
        ]
        assert after[0] != after[1]


def test_a_branch_on_two_processes_equals_the_whole_run(text: str, tmp_path: Path) -> None:
    tail = build(text, tmp_path / "tail", {**STABLE, "decay": 8}, {}, STEPS)
    whole = replace(tail, run=replace(tail.run, output_dir=str(tmp_path / "whole")))
    trunk = build(text, tmp_path / "trunk", STABLE, {}, TRUNK_STEPS)
    finish_all([(trunk, 2), (whole, 2)], tmp_path)
    finish_all([(branch_from(tmp_path / "trunk", tail), 2)], tmp_path)
    assert end_of(tmp_path / "tail") == end_of(tmp_path / "whole")


def test_a_branch_links_the_checkpoint_and_can_be_resumed_itself(
    text: str, trunks: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    trunk = trunks(STABLE)
    tail = build(text, tmp_path / "tail", {**STABLE, "decay": 8}, {}, STEPS)
    train(branch_from(trunk, tail))
    name = f"checkpoint-{BRANCHING}/model.safetensors"
    assert os.path.samefile(trunk / name, tmp_path / "tail" / name)
    # The tail stopped when it had only this checkpoint.
    end = end_of(tmp_path / "tail")
    for path in (tmp_path / "tail").glob("checkpoint-*"):
        if path.name != f"checkpoint-{BRANCHING}":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    (tmp_path / "tail" / "all_results.json").unlink()
    train(replace(tail, run=replace(tail.run, resume="latest")))
    assert end_of(tmp_path / "tail") == end
    # The old checkpoints of a run are removed, but a link keeps the trunk's.
    short = replace(tail, run=replace(tail.run, keep_last=1, output_dir=str(tmp_path / "short")))
    train(branch_from(trunk, short))
    assert not (tmp_path / "short" / f"checkpoint-{BRANCHING}").exists()
    assert read_checkpoint(trunk / f"checkpoint-{BRANCHING}").progress.step == BRANCHING


@pytest.mark.parametrize(
    ("optim", "objective", "steps", "says"),
    [
        ({**STABLE, "decay": 14}, {}, STEPS, r"step 8 had the learning rate 0\.003 and would have 0\.0021"),
        ({**STABLE, "warmup": 4}, {}, STEPS, r"step 1 had the learning rate 0\.001 and would have 0\.00075 "),
        (STABLE, {"final_rate": 0.1}, STEPS, r"step 2 had the mask rate 0\.3 and would have 0\.29 "),
        (STABLE, {}, BRANCHING, "is at step 9, and this run ends after 9 steps: set a larger"),
        ({**STABLE, "weight_decay": 0.2}, {}, STEPS, "optim.weight_decay was 0.01, is 0.2"),
    ],
    ids=["decay", "warmup", "mask rate", "length", "other settings"],
)
def test_a_branch_that_would_have_made_another_step_is_refused_and_leaves_nothing(
    optim: dict[str, Any],
    objective: dict[str, Any],
    steps: int,
    says: str,
    text: str,
    trunks: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
) -> None:
    trunk = trunks(STABLE)
    before = contents(trunk)
    with pytest.raises(ValueError, match=says) as caught:
        train(branch_from(trunk, build(text, tmp_path / "tail", optim, objective, steps)))
    assert "\n" not in str(caught.value)
    assert contents(trunk) == before
    assert not (tmp_path / "tail").exists()


def test_functions_of_the_user_are_compared(
    text: str, trunks: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    trunk = trunks(STABLE)
    tail = branch_from(trunk, build(text, tmp_path / "tail", STABLE, {}, TRUNK_STEPS + 1))
    with pytest.raises(ValueError, match=r"the run was begun without a function for train\(learning_rate=…\)"):
        train(tail, learning_rate=lambda step, total: 1e-3)
    own = build(text, tmp_path / "own", STABLE, {}, BRANCHING)
    train(own, learning_rate=lambda step, total: 1e-3 * step / total)
    longer = branch_from(tmp_path / "own", build(text, tmp_path / "tail", STABLE, {}, STEPS))
    with pytest.raises(ValueError, match=r"step 2 had the learning rate 0\.000111111 and would have 5e-05"):
        train(longer, learning_rate=lambda step, total: 1e-3 * step / total)
    with pytest.raises(ValueError, match=r"the run was begun with a function for train\(learning_rate=…\)"):
        train(longer)
    assert not (tmp_path / "tail").exists()


def test_a_checkpoint_that_disappears_leaves_no_file(
    text: str, trunks: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    trunk = trunks(STABLE)
    checkpoint = read_checkpoint(trunk / f"checkpoint-{BRANCHING}")
    gone = replace(checkpoint, folder=tmp_path / "trunk" / f"checkpoint-{BRANCHING}")
    (tmp_path / "tail").mkdir()
    with pytest.raises(ValueError, match="another run may have removed it in the meantime"):
        link_run(gone, tmp_path / "tail")
    assert [*(tmp_path / "tail").iterdir()] == []


def test_a_branch_brings_the_best_checkpoint_and_copies_where_it_cannot_link(
    trunks: Callable[[dict[str, Any]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint = read_checkpoint(trunks(STABLE) / f"checkpoint-{BRANCHING}")
    (tmp_path / "tail").mkdir()
    link_run(replace(checkpoint, progress=replace(checkpoint.progress, best_step=3)), tmp_path / "tail")
    assert {path.name for path in (tmp_path / "tail").iterdir()} == {
        *("checkpoint-3", "checkpoint-9", "ledger", "log.jsonl")
    }
    assert {path.name for path in (tmp_path / "tail" / "ledger").iterdir()} == {
        *("examples.safetensors", "eval-7.safetensors")
    }
    for step in (3, BRANCHING):
        assert read_checkpoint(tmp_path / "tail" / f"checkpoint-{step}").progress.step == step


def test_a_branch_from_a_run_that_was_out_of_patience_is_refused(
    text: str, trunks: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    tail = branch_from(trunks(STABLE), build(text, tmp_path / "tail", STABLE, {}, STEPS + 30))
    checkpoint = read_checkpoint(Path(str(tail.run.resume)))
    stale = replace(checkpoint, progress=replace(checkpoint.progress, stale=2))
    with pytest.raises(ValueError, match=r"had run out of patience there: set a larger run\.patience"):
        _check_unfinished(stale, replace(tail, run=replace(tail.run, patience=2)), 13, None)


@given(
    before=st.tuples(st.sampled_from(["linear", "wsd", "constant"]), st.integers(0, 5), st.integers(1, 9)),
    now=st.tuples(st.sampled_from(["linear", "wsd", "constant"]), st.integers(0, 5), st.integers(1, 9)),
    totals=st.tuples(st.integers(5, 25), st.integers(5, 25)),
    final=st.sampled_from([None, 0.1, 0.2]),
    steps=st.integers(0, 25),
)
@settings(deadline=None, max_examples=200)
def test_the_first_change_is_the_first_step_whose_rates_differ(
    before: Any, now: Any, totals: Any, final: float | None, steps: int
) -> None:
    configs = [
        Config(
            objective=MaskedLM(rate=0.2, final_rate=rate),
            optim=Optim(schedule=schedule, warmup=warmup, decay=decay),
            run=Run(max_steps=total),
        )
        for (schedule, warmup, decay), total, rate in zip((before, now), totals, (None, final), strict=True)
    ]

    def rates(config: Config, step: int) -> tuple[float, float]:
        total = config.run.max_steps or 0
        final = 0.2 if config.objective.final_rate is None else config.objective.final_rate  # type: ignore[attr-defined]
        return learning_rate(config.optim, step, total), 0.2 + (final - 0.2) * step / total

    different = [step for step in range(steps) if rates(configs[0], step) != pytest.approx(rates(configs[1], step))]
    found = find_first_change(*configs, steps=steps, steps_per_epoch=7)
    assert (None if found is None else found.step - 1) == (different[0] if different else None)
