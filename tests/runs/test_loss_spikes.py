"""Loss spikes are found, not noise, not twice for long, and the same ones after a resume."""

import json
from pathlib import Path

import numpy as np
import pytest

from minilm.runs.loss_spikes import SpikeDetector


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log.jsonl").touch()
    return tmp_path / "log.jsonl"


def found(losses: list[float], spikes: SpikeDetector) -> list[int]:
    return [at for at, loss in enumerate(losses) if spikes.detect(loss) is not None]


def noise(steps: int) -> list[float]:
    """A loss that falls, with the noise of small batches."""
    rng = np.random.default_rng(0)
    return list(3 + 5 * np.exp(-np.arange(steps) / 500) + 0.3 * rng.standard_normal(steps))


def test_a_spike_is_found_and_noise_is_not(log: Path) -> None:
    losses = noise(3000)
    assert found(losses, SpikeDetector(log)) == []
    losses[400] += 4
    losses[401] -= 4  # what falls is no spike
    assert found(losses, SpikeDetector(log)) == [400]


def test_the_first_steps_are_never_spikes(log: Path) -> None:
    assert found([1.0, 1.1] * 9 + [1.0, 50.0], SpikeDetector(log)) == []
    assert found([1.0, 1.1] * 10 + [50.0], SpikeDetector(log)) == [20]


def test_a_loss_that_rises_to_stay_is_soon_not_a_spike_any_more(log: Path) -> None:
    losses = noise(500)
    losses[300:] = [loss + 10 for loss in losses[300:]]
    assert found(losses, SpikeDetector(log)) == [300, 301, 302]


def test_a_spike_is_reported_with_the_mean_of_the_hundred_losses_before_it(log: Path) -> None:
    spikes, losses = SpikeDetector(log), noise(300)
    found(losses, spikes)
    assert spikes.detect(99.0) == np.mean(losses[-100:])


@pytest.mark.parametrize("at", [20, 150, 299])
def test_spikes_after_a_resume_are_those_of_an_undisturbed_run(at: int, log: Path) -> None:
    losses = noise(300)
    lines = []
    for step, loss in enumerate(losses[:at], start=1):
        lines.append({"step": step, "epoch": 0.1, "loss": loss, "lr": 1e-3, "grad_norm": 1.0})
        lines.append({"step": step, "loss": None, "grad_norm": None})
        lines.append({"step": step, "eval_loss": 99.0, "perplexity": 1.0})
        lines.append({"step": step, "spike_loss": 99.0, "usual_loss": 98.0, "examples": [1, 2]})
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "loss": 9')
    resumed = SpikeDetector(log)
    log.write_text("")
    whole = SpikeDetector(log)
    found(losses[:at], whole)
    for loss in (30.0, *losses[at:], 99.0):
        assert resumed.detect(loss) == whole.detect(loss)
