"""What surrounds the loop: the process after an error, forks, jobs of seeds that start together, and counts."""

import itertools
import json
import math
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState

import minilm.train
from minilm import Config, Data, MaskedLM, Model
from minilm.commands.dry_run import dry_run
from minilm.data.micro_batch import loss_sum
from minilm.models.sparse_head import SparseHead
from minilm.objectives.masking import MaskedLMCollator
from minilm.runs.session import begin
from minilm.train import train
from minilm.utils.errors import TrainingStopped
from minilm.utils.signals import STOP_SIGNALS
from tests.jobs import CONFIG, finish_all, start, write_text
from tests.launch import read_log
from tests.reference import build
from tests.test_recipe_forks import PLANTED


def forget() -> None:
    for state in (PartialState, AcceleratorState, GradientState):
        state._shared_state.clear()


@pytest.fixture(autouse=True)
def fresh() -> Any:
    forget()
    yield
    forget()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    run = replace(CONFIG.run, max_steps=2, eval_every=None, save_every=0)
    return replace(CONFIG, data=Data(source=write_text(tmp_path / "text.txt"), eval_fraction=0.1), run=run)


def state_of_process() -> dict[str, Any]:
    """Return the state of a Python process that a run may change, and that the next run would meet."""
    return {
        "accelerate": [dict(state._shared_state) for state in (PartialState, AcceleratorState, GradientState)],
        "group": dist.is_initialized(),
        "handlers": [signal.getsignal(number) for number in STOP_SIGNALS],
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "gradients": torch.is_grad_enabled(),
        "verbosity": transformers.utils.logging.get_verbosity(),
        "python threads": {thread.name for thread in threading.enumerate()} & {"checkpoint"},
    }


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*args: object, **options: object) -> Any:
        raise error

    return fail


# Errors at different places: (changes of the configuration, a name in `minilm.train` and what it raises, the error).
REFUSALS: dict[str, tuple[dict[str, Any], tuple[str, BaseException] | None, type[BaseException]]] = {
    "data that is not there": ({"data": {"source": "nowhere.txt"}}, None, ValueError),
    "no such model": ({"model": {"name": "nowhere"}}, None, ValueError),
    "a field that the model does not have": ({"model": {"config": {"no_such_field": 1}}}, None, ValueError),
    "fewer examples than one": ({"batch": {"max_length": 100}}, None, ValueError),
    "fp16 on a CPU": ({"run": {"precision": "fp16"}}, None, ValueError),
    "compile on a CPU": ({"run": {"compile": True}}, None, ValueError),
    "nothing to resume from": ({"run": {"resume": "latest"}}, None, ValueError),
    "deterministic, then an error": (
        {"run": {"deterministic": True}},
        ("distribute", RuntimeError("broken")),
        RuntimeError,
    ),
    "a bug in the middle of a step": ({}, ("train_step", RuntimeError("broken")), RuntimeError),
    "ctrl-C in the middle of a step": ({}, ("train_step", KeyboardInterrupt()), KeyboardInterrupt),
    "an end asked for": ({}, ("stop_on_bad_gradients", TrainingStopped("told to", 1)), TrainingStopped),
}


def changed(config: Config, changes: dict[str, Any]) -> Config:
    return replace(config, **{group: replace(getattr(config, group), **fields) for group, fields in changes.items()})


@pytest.mark.scorecard(37)
@pytest.mark.parametrize("name", REFUSALS)
def test_after_an_error_the_process_is_as_before_and_a_run_at_another_precision_works(
    name: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, inside, kind = REFUSALS[name]
    before = state_of_process()
    refused = changed(config, {"run": {"precision": "bf16", "output_dir": str(tmp_path / "bad")}})
    with monkeypatch.context() as planted:
        if inside is not None:
            planted.setattr(minilm.train, inside[0], raising(inside[1]))
        with pytest.raises(kind):
            train(changed(refused, changes))
    assert state_of_process() == before
    good = changed(config, {"run": {"precision": "fp32", "max_steps": 1, "output_dir": str(tmp_path / "good")}})
    assert train(good).figures["steps"] == 1
    assert state_of_process() == before


@pytest.mark.scorecard(37)
def test_ten_refused_runs_and_good_ones_take_turns(
    config: Config, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    before = state_of_process()
    for turn, precision in zip(range(10), itertools.cycle(("bf16", "fp32")), strict=False):
        with pytest.raises(ValueError, match="nowhere"):
            train(changed(config, {"data": {"source": "nowhere.txt"}, "run": {"precision": precision}}))
        other = {"fp32": "bf16", "bf16": "fp32"}[precision]
        where = str(tmp_path / f"out-{turn}")
        assert (
            train(changed(config, {"run": {"precision": other, "max_steps": 1, "output_dir": where}})).figures["steps"]
            == 1
        )
        assert state_of_process() == before
    figure("10 of 10 good runs after a refused one, at alternating precisions; no state left")


@pytest.mark.scorecard(37)
def test_a_refused_dry_run_leaves_no_state_either(config: Config, tmp_path: Path) -> None:
    before = state_of_process()
    with pytest.raises(ValueError, match="nowhere"):
        dry_run(changed(config, {"data": {"source": "nowhere.txt"}, "run": {"precision": "bf16"}}), "test")
    assert state_of_process() == before
    assert train(changed(config, {"run": {"output_dir": str(tmp_path / "out")}})).figures["steps"] == 2


@pytest.mark.scorecard(37)
def test_a_fork_that_failed_without_cleaning_up_does_not_disturb_the_next_run(config: Config, tmp_path: Path) -> None:
    context = begin(changed(config, {"run": {"precision": "bf16", "output_dir": str(tmp_path / "fork")}}), "fork")
    context.__enter__()  # and no end
    assert train(changed(config, {"run": {"output_dir": str(tmp_path / "out")}})).figures["steps"] == 2


@pytest.mark.scorecard(37)
def test_an_accelerator_of_the_users_is_kept_or_the_run_refused(config: Config, tmp_path: Path) -> None:
    theirs = Accelerator(cpu=True, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match=r"made an Accelerator before, for fp32, and the run is in bf16") as caught:
        train(changed(config, {"run": {"precision": "bf16", "output_dir": str(tmp_path / "bad")}}))
    assert "\n" not in str(caught.value)
    assert (
        train(changed(config, {"run": {"precision": "fp32", "output_dir": str(tmp_path / "out")}})).figures["steps"]
        == 2
    )
    assert (theirs.mixed_precision, theirs.device.type, theirs.num_processes) == ("no", "cpu", 1)
    assert theirs.gradient_accumulation_steps == 4


@pytest.mark.scorecard(37)
def test_settings_of_torch_that_the_user_made_are_kept(config: Config, tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        train(changed(config, {"run": {"output_dir": str(tmp_path / "out")}}))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


SIZE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 32}


@pytest.mark.scorecard(34)
@pytest.mark.parametrize("layout", ["documents", "blocks", "packed"])
def test_a_forks_updates_depend_neither_on_attention_nor_on_micro_batches(
    layout: Any, config: Config, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    model = Model(type="electra", config={**SIZE, **NO_DROPOUT, "embedding_size": 24})
    electra = replace(config, model=model, objective=MaskedLM(rate=0.3))
    cases = {
        (attention, size): changed(
            electra,
            {
                "batch": {"layout": layout, "micro_tokens": size},
                "model": {"attention": attention},
                "run": {"max_steps": 6, "output_dir": str(tmp_path / f"{attention}-{size}")},
            },
        )
        for attention in ("auto", "eager")
        for size in (4096, 48)
    }
    finish_all([(case, 1) for case in cases.values()], tmp_path, PLANTED.format(name="fork_electra"))
    losses = {case: [line["loss"] for line in read_log(Path(str(cases[case].run.output_dir)))[0]] for case in cases}
    expected = losses["auto", 4096]
    assert len(expected) == 6
    apart = max(abs(a / b - 1) for found in losses.values() for a, b in zip(found, expected, strict=True))
    figure(f"fork_electra, {layout}, eager and auto, one micro-batch and many: {apart:.0e}")
    assert 0 < apart <= 2e-5


@pytest.mark.scorecard(34)
def test_the_distilling_forks_updates_do_not_depend_on_micro_batches_in_any_layout(
    config: Config, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    teacher = Model(type="bert", config={**SIZE, **NO_DROPOUT, "num_attention_heads": 4, "initializer_range": 0.1})
    first = changed(replace(config, model=teacher), {"run": {"max_steps": 1, "output_dir": str(tmp_path / "teacher")}})
    train(first)
    student = Model(name=str(tmp_path / "teacher"), type="bert", config={**SIZE, **NO_DROPOUT})
    cases = {
        (layout, size): changed(
            replace(config, model=student),
            {
                "batch": {"layout": layout, "micro_tokens": size},
                "run": {"max_steps": 6, "output_dir": str(tmp_path / f"{layout}-{size}")},
            },
        )
        for layout in ("documents", "blocks", "packed")
        for size in (4096, 48)
    }
    finish_all([(case, 1) for case in cases.values()], tmp_path, PLANTED.format(name="fork_minilm"))
    for layout in ("documents", "blocks", "packed"):
        whole, cut = (
            [line["loss"] for line in read_log(Path(str(cases[layout, size].run.output_dir)))[0]] for size in (4096, 48)
        )
        apart = max(abs(a / b - 1) for a, b in zip(whole, cut, strict=True))
        figure(f"fork_minilm, {layout}, one micro-batch and many: {apart:.0e}")
        assert 0 < apart <= 2e-5


@pytest.mark.scorecard(34)
def test_the_distilling_fork_says_what_attention_it_takes(config: Config, tmp_path: Path) -> None:
    from recipes import fork_minilm

    teacher = Model(type="bert", config={**SIZE, **NO_DROPOUT})
    train(changed(replace(config, model=teacher), {"run": {"max_steps": 1, "output_dir": str(tmp_path / "teacher")}}))
    student = Model(name=str(tmp_path / "teacher"), type="bert", config={**SIZE, **NO_DROPOUT}, attention="eager")
    with pytest.raises(ValueError, match=r"leave model\.attention at auto"):
        fork_minilm.train(
            changed(replace(config, model=student), {"run": {"output_dir": str(tmp_path / "out")}}), "fork"
        )


def test_a_collator_that_does_not_fit_the_model_is_refused(tokenizer: Any) -> None:
    model = build(tokenizer, "mpnet")
    head, rows = SparseHead(model), [np.arange(7, 7 + length) for length in (20, 12, 5)]
    assert not head.padding_free
    batch = MaskedLMCollator(tokenizer, rate=0.4, seed=0, padded=False, multiple=1)(rows, np.arange(3), 0)
    with pytest.raises(ValueError, match="give the collator the plan's `padded` and `multiple`"):
        loss_sum(head, batch)
    with pytest.raises(TypeError, match="padded"):
        MaskedLMCollator(tokenizer, rate=0.4, seed=0)


TWO_SWEEPS = """
import os, sys
from dataclasses import replace
import minilm.train
from minilm.commands.seeds import train_seeds
train = minilm.train.train

def both(config):
    first = 2 * config.run.seed
    train_seeds(config, "mine", [first, first + 1], lambda config, name: train(config))

minilm.train.train = both
"""


@pytest.mark.parametrize("named", [True, False])
def test_two_jobs_of_seeds_that_start_together_share_no_summary(named: bool, config: Config, tmp_path: Path) -> None:
    jobs = []
    for seed in (0, 1):
        own = changed(config, {"run": {"seed": seed, "max_steps": 1, "output_dir": str(tmp_path / "out")}})
        place = tmp_path / f"job-{seed}"
        place.mkdir()
        planted = f"import os\nos.chdir({str(tmp_path)!r})\n" + TWO_SWEEPS
        jobs.append(
            start(
                "fork",
                own if named else changed(own, {"run": {"output_dir": None}}),
                place,
                processes=1,
                planted=planted,
            )
        )
    assert all(job.gone(200) for job in jobs)
    status = sorted(job.status() for job in jobs)
    summaries = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("out/**/seeds.json"))]
    found = sorted(sorted(map(int, summary["eval_loss"]["values"])) for summary in summaries)
    for path in tmp_path.glob("out/**/seeds.json"):
        seeds = {int(folder.name.removeprefix("seed-")) for folder in path.parent.glob("seed-*")}
        assert seeds == set(map(int, json.loads(path.read_text())["eval_loss"]["values"]))
    if status == [0, 0]:
        assert found == [[0, 1], [2, 3]]
    else:
        assert status == [0, 2]
        assert found in ([[0, 1]], [[2, 3]])
        assert any(
            "in use by another run" in job.stderr.read_text()
            or "taken" in job.stderr.read_text()
            or "not empty" in job.stderr.read_text()
            for job in jobs
        )


@pytest.mark.parametrize("layout", ["documents", "blocks", "packed"])
def test_a_dry_run_the_log_and_the_run_count_the_same(
    layout: Any, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    asked = changed(
        config,
        {
            "batch": {"layout": layout, "examples": 4},
            "run": {"max_steps": None, "epochs": 1.0, "output_dir": str(tmp_path / "out")},
        },
    )
    dry_run(asked, "test", own_loop=True)
    planned = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    with caplog.at_level("INFO", "minilm"):
        steps = int(train(asked).figures["steps"])
    unit = "rows" if layout == "packed" else "examples"
    assert planned["steps"].strip() == f"{steps} of 4 {unit}"
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    count = facts["train"]["rows"] if layout == "packed" else facts["train"]["examples"]
    assert math.ceil(count / 4) == steps == facts["steps"]
    assert planned["data"].startswith(f"{count:,} {unit}")
    assert f"train: {count:,} {unit}" in caplog.text
    assert f"{steps} steps of 4 {unit}" in caplog.text
