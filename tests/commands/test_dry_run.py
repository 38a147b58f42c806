"""The plan of a run against the run itself, and that nothing of it is left behind."""

import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minilm import CausalLM, Config, Data, MaskedLM, Optim, Phase
from minilm.commands import dry_run as dryrun
from minilm.commands.dry_run import dry_run, plot_rate
from minilm.commands.recipe import run_recipe
from minilm.data.batch_plan import Plan
from minilm.distributed.flops import count_flops
from minilm.models.head import freeze_unused
from minilm.objectives.factory import build_network, build_objective, prepare_data
from minilm.train import train
from tests.jobs import CONFIG, write_text
from tests.launch import read_log


@pytest.fixture
def config(tmp_path) -> Config:
    """Two epochs of 18 steps, of several micro-batches each."""
    run = replace(CONFIG.run, max_steps=None, epochs=2.0, eval_every=10, save_every=0, output_dir=str(tmp_path / "out"))
    data = Data(source=write_text(tmp_path / "text.txt"), eval_fraction=0.1)
    return replace(CONFIG, data=data, objective=MaskedLM(rate=0.3), run=run)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock by which a step takes 30 seconds."""
    clock = SimpleNamespace(now=100.0)

    def tick() -> float:
        clock.now += 30.0
        return clock.now

    monkeypatch.setattr(dryrun, "time", SimpleNamespace(perf_counter=tick))
    return clock


def planned(capsys: pytest.CaptureFixture[str], config: Config, **options: bool) -> dict[str, str]:
    """The lines of a dry run by their first words."""
    capsys.readouterr()
    dry_run(config, "test", **options)
    lines = [line.split(" ", 1) for line in capsys.readouterr().out.splitlines()]
    return {what: text.strip() for what, text in lines if what}


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1].replace(",", ""))


def test_the_plan_is_that_of_the_run(config, clock, capsys, tmp_path):
    lines = planned(capsys, config)
    assert list(lines) == ["output", "data", "model", "hardware", "steps", "rate", "FLOPs", "memory", "time"]
    assert not (tmp_path / "out").exists()
    train(config)
    steps, evaluations = read_log(tmp_path / "out")
    assert number(r"^([\d,]+) of 8 examples: 2.00 epochs", lines["steps"]) == len(steps) == 36
    assert number(r"epochs, ([\d,]+) tokens", lines["steps"]) == steps[-1]["tokens"]
    assert number(r"evaluations (\d+) x", lines["time"]) == len(evaluations) == 4
    assert number(r"([\d.]+) GB a process", lines["memory"]) == pytest.approx(steps[-1]["memory_gb"], rel=0.2)
    assert lines["output"].startswith(str(tmp_path / "out"))

    prepared = prepare_data(config)
    head = build_objective(config.objective).head(build_network(config, prepared), prepared)
    freeze_unused(head)
    cost, plan = count_flops(head, 24), Plan(prepared.train.lengths, examples=8, micro_tokens=40)
    flops = sum(cost.step(plan.step(index), 0.3) for index in range(36))
    assert number(r"^(\S+),", lines["FLOPs"]) == pytest.approx(flops, rel=0.01)
    # 36 steps of 30 seconds, but that those of the probe are not quite as large as all.
    assert number(r"training ([\d.]+) min", lines["time"]) == pytest.approx(18.0, rel=0.25)
    assert "by 3 steps" in lines["time"]


def test_the_plan_of_a_run_with_phases_is_that_of_the_run(config, clock, capsys, tmp_path):
    phases = (Phase(start=0.5, max_length=12, examples=4), Phase(start=15, mask_rate=0.1), Phase(start=99, examples=2))
    config = replace(config, run=replace(config.run, max_steps=20, phases=phases))
    capsys.readouterr()
    dry_run(config, "test")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("phase")]
    *periods, warning = lines
    assert [number(r"from step (\d+):", line) for line in periods] == [0, 10, 15]
    assert "batch.max_length 12, batch.examples 4, mask rate 0.1" in periods[2]
    assert "WARNING: the phase 'start=99 examples=2' would begin after 99 steps" in warning
    train(config)
    steps, _ = read_log(tmp_path / "out")
    tokens = sum(number(r"([\d,]+) tokens", line) for line in periods)
    assert tokens == pytest.approx(steps[-1]["tokens"], rel=0.15)
    assert sum(number(r"([\d.]+) epochs", line) for line in periods) == pytest.approx(steps[-1]["epoch"], abs=0.02)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_moments_that_are_counted_are_those_of_the_optimizer(name, config, clock, capsys, monkeypatch):
    probes, probe = [], dryrun._probe
    monkeypatch.setattr(dryrun, "_probe", lambda *args: probes.append(probe(*args)) or probes[-1])
    config = replace(config, optim=replace(config.optim, name=name))
    planned(capsys, config)
    prepared = prepare_data(config)
    head = build_objective(config.objective).head(build_network(config, prepared), prepared)
    freeze_unused(head)
    trained = {path: p for path, p in head.model.named_parameters() if p.requires_grad}
    # Of a matrix in a layer Muon has one moment. AdamW has two moments and a step count of any other parameter.
    matrices = [p.numel() for path, p in trained.items() if name == "muon" and ".layer." in path and p.ndim == 2]
    others = sum(p.numel() for p in trained.values()) - sum(matrices)
    (found,) = probes
    assert found.moments == 4 * (sum(matrices) + 2 * others + len(trained) - len(matrices))


def test_a_dry_run_of_a_fork_describes_only_its_data_and_steps(config, capsys):
    lines = planned(capsys, config, own_loop=True)
    assert lines["steps"] == "36 of 8 examples"
    assert lines["time"].startswith("unknown")


def test_a_run_is_not_planned_from_its_middle_nor_into_a_folder_that_is_taken(config, tmp_path):
    with pytest.raises(ValueError, match=r"leave run\.resume out"):
        dry_run(replace(config, run=replace(config.run, resume="latest")), "test")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match="is not empty"):
        dry_run(config, "test")


def test_a_step_that_does_not_fit_is_one_line(config, monkeypatch):
    def fail(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dryrun, "train_step", fail)
    with pytest.raises(ValueError, match=r"lower batch\.micro_tokens, now 40"):
        dry_run(config, "test")


def test_the_plot_of_the_rate_has_a_mark_where_the_rate_is():
    optim = Optim(lr=2e-3, schedule="wsd", warmup=20, decay=40, decay_shape="linear", final_lr=0.5)
    summary, *rows, axis = plot_rate(optim, 120).splitlines()
    assert summary == "wsd: 0.0001 at step 0, 0.002 at step 19, 0.001025 at step 119"
    assert [row.partition("|")[0].strip() for row in rows] == ["0.002", "", "", "", "", "0"]
    for column in range(60):
        step = column * 119 // 59
        share = (step + 1) / 20 if step < 20 else min(1, 1 - (step - 80) / 80)
        marked = [row for row, line in enumerate(reversed(rows)) if line.partition("|")[2][column : column + 1] == "*"]
        assert marked == [round(5 * share)]
    assert axis.split() == ["step", "0", "119"]
    assert axis.index("step") == rows[0].index("|") + 1
    assert len(axis) == rows[0].index("|") + 61


def test_the_plot_says_where_the_run_is_too_short_for_its_schedule():
    *_, warning = plot_rate(Optim(lr=1e-3, warmup=8), 4).splitlines()
    assert warning == "WARNING: optim.warmup is 8 steps and the run has 4: the learning rate never reaches optim.lr"
    assert plot_rate(Optim(warmup=0), 1).splitlines()[-1].split() == ["step", "0"]


@pytest.mark.parametrize("own", [False, True])
def test_every_recipe_has_the_flag(own, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["recipes/mine.py", "--dry-run", "--batch.examples", "3"])
    monkeypatch.setattr("minilm.commands.recipe.interrupt_on_signals", lambda: lambda work: work)
    monkeypatch.setattr("minilm.commands.recipe.show_log", lambda: None)
    monkeypatch.setattr(dryrun, "dry_run", lambda config, name, own_loop: seen.append((config, name, own_loop)))
    monkeypatch.setattr("minilm.train.train", pytest.fail)
    run_recipe(Config(objective=CausalLM()), "", pytest.fail if own else None)
    ((config, name, own_loop),) = seen
    assert (config.batch.examples, name, own_loop) == (3, "mine", own)
