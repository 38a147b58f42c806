"""Early stopping: a signal ends a run after its step, with a checkpoint. Non-finite gradients change nothing."""

import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import minilm.train
import minilm.utils.signals
from minilm import Config, Data, MaskedLM
from minilm.optim.optimizer import apply_update, build_optimizer
from minilm.runs.early_stopping import StopRequest
from minilm.train import train
from minilm.utils.errors import TrainingStopped
from tests.jobs import CONFIG, write_text
from tests.launch import read_log
from tests.reference import ScaledLosses


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = write_text(tmp_path / "text.txt")
    run = replace(CONFIG.run, output_dir=str(tmp_path / "out"), save_every=5)
    return replace(CONFIG, data=Data(source=text, eval_fraction=0.1), run=run)


@pytest.mark.scorecard(17)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_a_run_after_its_step(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest(Accelerator(cpu=True), saves=True) as request:
        assert request.agree_on_stop(7) is None
        os.kill(os.getpid(), number)
        stopped = request.agree_on_stop(8)
    assert stopped is not None
    assert stopped.status == 128 + number
    assert f"{number.name} after step 8" in str(stopped)
    assert signal.getsignal(number) is before


def test_a_run_without_checkpoints_does_not_offer_to_resume() -> None:
    with StopRequest(Accelerator(cpu=True), saves=False) as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        stopped = request.agree_on_stop(8)
    assert "SIGUSR1 after step 8; nothing was saved because run.save_every is 0" in str(stopped)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what was swallowed
def test_a_signal_that_a_destructor_swallowed_still_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm.utils.signals, "_last_signal", [0])
    before = {number: signal.getsignal(number) for number in minilm.utils.signals.STOP_SIGNALS}

    class Swallows:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with minilm.utils.signals.interrupt_on_signals():
        held = Swallows()
        del held
        with StopRequest(Accelerator(cpu=True), saves=True) as request:
            assert "SIGTERM" in str(request.agree_on_stop(1))
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.scorecard(17)
def test_a_second_interrupt_ends_at_once() -> None:
    with StopRequest(Accelerator(cpu=True), saves=True):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def momentum(model: torch.nn.Module) -> torch.optim.Optimizer:
    """One of torch's that a fork may take, whose update is not one kernel."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.scorecard(21)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("build", [partial(build_optimizer, optim=CONFIG.optim), momentum], ids=["ours", "not fused"])
def test_a_step_without_a_finite_gradient_changes_nothing(
    bad: float, build: Callable[[torch.nn.Module], torch.optim.Optimizer]
) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = build(model)
    accelerator = Accelerator(cpu=True)

    def step(factor: float) -> dict[str, Tensor]:
        (model(torch.ones(1, 3)).sum() * factor).backward()
        apply_update(accelerator, model, optimizer, 1.0)
        optimizer.zero_grad()
        moments = {f"{i}{k}": v.clone() for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
        return {**{name: p.detach().clone() for name, p in model.named_parameters()}, **moments}

    before = step(1.0)
    after = step(bad)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(before[name], tensor) for name, tensor in step(1.0).items())


@pytest.mark.scorecard(21)
def test_a_run_without_finite_gradients_is_given_up_and_names_its_steps_examples_and_checkpoint(
    config: Config, monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], None]
) -> None:
    seen: list[int] = []
    original, right = minilm.train.train_step, minilm.train.counted_losses

    def failing(*args: object, **kwargs: object) -> object:
        seen.append(1)
        if len(seen) <= 6:
            return original(*args, **kwargs)
        monkeypatch.setattr(minilm.train, "counted_losses", lambda *given: ScaledLosses(right(*given), math.nan))
        return original(*args, **kwargs)

    monkeypatch.setattr(minilm.train, "train_step", failing)
    run = replace(config.run, max_bad_steps=3)
    # A run of six steps is to have the same steps as the beginning of a longer one.
    config = replace(config, optim=replace(config.optim, schedule="constant"), objective=MaskedLM(rate=0.3))
    with pytest.raises(TrainingStopped, match=r"3 steps in a row, since step 7 \(examples \d+") as caught:
        train(replace(config, run=run))
    assert "checkpoint-10 has the last good weights" in str(caught.value)
    assert caught.value.status == 1
    folder = Path(run.output_dir or "")
    assert [line["loss"] for line in read_log(folder)[0]][6:] == [None] * 4
    assert (folder / "checkpoint-10" / "manifest.json").exists()
    monkeypatch.undo()
    six = replace(run, max_steps=6, output_dir=f"{folder}-six")
    train(replace(config, run=six))
    good = Path(six.output_dir or "")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (folder / "checkpoint-10" / name).read_bytes() == (good / "checkpoint-6" / name).read_bytes()
    figure(
        "the run stops after 3 in a row and names step, examples and checkpoint; "
        "the checkpoint has the weights and moments from before them"
    )
