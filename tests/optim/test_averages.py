"""Exponential averages of the weights, in a run and by themselves."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForMaskedLM

from minilm import Config, Data
from minilm.optim.averages import SLOT, average_weights, averaged_weights
from minilm.train import train
from tests.jobs import CONFIG, STEPS, end_of, finish_all, in_folder, without_dropout, write_text
from tests.laws.resume_everywhere import stopped_after

DECAY = 0.8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    return replace(CONFIG, data=Data(source=text, eval_fraction=0.1), optim=replace(CONFIG.optim, ema=DECAY))


@pytest.fixture(scope="module")
def reference(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("out") / "reference"
    return folder, train(in_folder(config, folder)).figures


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_the_average_is_that_of_the_formula(kind: Any) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 2)])
    optimizer = kind(layers.parameters(), lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    average_weights(optimizer, DECAY)
    expected = {p: p.detach().double() for p in layers.parameters()}
    for step in range(5):
        # The second layer has its first gradient later than the first one.
        output = layers[0](torch.randn(4, 3))
        (layers[1](output) if step >= 2 else output).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        expected = {p: DECAY * a + (1 - DECAY) * p.detach().double() for p, a in expected.items()}
    for parameter, average in expected.items():
        torch.testing.assert_close(optimizer.state[parameter][SLOT].double(), average, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_skipped_changes_no_average(fused: bool) -> None:
    layer = nn.Linear(3, 2)
    optimizer: Any = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    average_weights(optimizer, DECAY)
    for _ in range(2):
        layer(torch.randn(4, 3)).sum().backward()
        optimizer.step()
    before = optimizer.state[layer.weight][SLOT].clone()
    if fused:
        optimizer.found_inf = torch.ones(())
    else:
        optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(optimizer.state[layer.weight][SLOT], before)


def test_the_weights_are_exchanged_in_the_block_alone() -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    average_weights(optimizer, DECAY)
    layer(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    before, average = layer.weight.detach().clone(), optimizer.state[layer.weight][SLOT].clone()
    assert not torch.equal(before, average)
    with averaged_weights(layer, optimizer):
        assert torch.equal(layer.weight, average)
    assert torch.equal(layer.weight, before)
    assert torch.equal(optimizer.state[layer.weight][SLOT], average)


def test_a_run_saves_and_evaluates_the_averages_beside_the_last_weights(
    config: Config, reference: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    folder, figures = reference
    plain = train(in_folder(replace(config, optim=replace(config.optim, ema=None)), tmp_path / "plain")).figures
    assert {name: value for name, value in figures.items() if name in ("eval_loss", "perplexity")} == {
        name: plain[name] for name in ("eval_loss", "perplexity")
    }
    assert figures["ema_eval_loss"] != figures["eval_loss"]
    # Each checkpoint holds the weights after its step.
    weights = [load_file(folder / f"checkpoint-{step}" / "model.safetensors") for step in range(1, STEPS + 1)]
    saved = load_file(folder / "ema" / "model.safetensors")
    first = AutoModelForMaskedLM.from_pretrained(folder)
    assert saved.keys() == load_file(folder / "model.safetensors").keys()
    for name in ("bert.encoder.layer.0.attention.self.query.weight", "bert.embeddings.word_embeddings.weight"):
        # After the first step, the average is DECAY * w0 + (1 - DECAY) * w1; w0 follows from the checkpoint's average.
        average = load_file(folder / "checkpoint-1" / "optimizer.safetensors")[f"{SLOT}/{name}"].double()
        for own in weights[1:]:
            average = DECAY * average + (1 - DECAY) * own[name].double()
        torch.testing.assert_close(saved[name].double(), average, rtol=1e-5, atol=1e-7)
    assert first.config.vocab_size == AutoModelForMaskedLM.from_pretrained(folder / "ema").config.vocab_size


def everything(folder: Path) -> dict[str, object]:
    return {**end_of(folder), "ema": (folder / "ema" / "model.safetensors").read_bytes()}


def test_a_resumed_run_has_the_same_averages_to_the_bit(
    config: Config, reference: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    folder = stopped_after(9, reference[0], tmp_path / "stopped")
    for path in (folder / "ema").iterdir():
        path.unlink()
    train(in_folder(config, folder, resume="latest"))
    assert everything(folder) == everything(reference[0])
    with pytest.raises(ValueError, match=r"optim\.ema was 0\.8, is null"):
        train(
            in_folder(replace(config, optim=replace(config.optim, ema=None)), folder, resume="latest", max_steps=STEPS)
        )


def test_two_processes_have_the_averages_of_one(config: Config, tmp_path: Path) -> None:
    config = without_dropout(config)
    finish_all([(in_folder(config, tmp_path / str(count)), count) for count in (1, 2)], tmp_path)
    one, two = (load_file(tmp_path / str(count) / "ema" / "model.safetensors") for count in (1, 2))
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, rtol=1e-4, atol=1e-6)


def test_averages_and_the_best_weights_exclude_each_other(config: Config) -> None:
    with pytest.raises(ValueError, match="leave one of them out"):
        replace(config, run=replace(config.run, load_best=True))
