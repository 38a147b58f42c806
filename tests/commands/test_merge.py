"""`minilm merge`: the mean of the weights of several models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase

from tests.checkpoints import network


@pytest.fixture
def folders(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> list[Path]:
    """Three models of one kind, with other files beside them."""
    found = []
    for seed in range(3):
        found.append(folder := tmp_path / f"model-{seed}")
        network(tokenizer, seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "run.json").write_text("{}")
    return found


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("shares", [(), ("1", "2", "1"), ("0", "0", "5")], ids=str)
def test_the_weights_are_the_mean_and_the_folder_loads(
    shares: tuple[str, ...], folders: list[Path], run: Any, tmp_path: Path
) -> None:
    flags = ("--weights", *shares) if shares else ()
    target = tmp_path / "new" / "merged"
    status, lines, error = run("merge", *map(str, folders), "--output", str(target), *flags)
    assert (status, lines, error) == (None, [f"written: {target}"], [])
    numbers = [float(share) for share in shares] or [1.0, 1.0, 1.0]
    for name, merged in weights_of(target).items():
        parts = zip(numbers, folders, strict=True)
        mean = sum(number * weights_of(folder)[name].double() for number, folder in parts) / sum(numbers)
        assert torch.equal(merged, mean.float()) or (merged - mean).abs().max() <= 1e-7 * mean.abs().max()
    if shares == ("0", "0", "5"):
        assert all(torch.equal(merged, weights_of(folders[2])[name]) for name, merged in weights_of(target).items())
    assert AutoTokenizer.from_pretrained(target).mask_token == "[MASK]"
    assert AutoModelForMaskedLM.from_pretrained(target).dtype == torch.float32
    assert not (target / "run.json").exists()


def change_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))


def drop_a_weight(folder: Path) -> None:
    weights = weights_of(folder)
    del weights["cls.predictions.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def add_whole_numbers(folder: Path) -> None:
    for number in range(3):
        other = folder.parent / f"model-{number}"
        save_file({**weights_of(other), "x": torch.tensor([number])}, other / "model.safetensors")


def change_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("[MASK]", "[HIDDEN]"))


def damage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"1234567890")


@pytest.mark.parametrize(
    ("spoil", "flags", "says"),
    [
        (change_width, (), "are other models: config.json differs in hidden_act"),
        (drop_a_weight, (), "do not have the same weights: cls.predictions.bias"),
        (add_whole_numbers, (), "the weight x holds whole numbers that differ, so it has no mean"),
        (change_tokens, (), "have different tokenizers"),
        (damage, (), "model-1/model.safetensors cannot be read: "),
        (lambda folder: (folder / "model.safetensors").unlink(), (), "there is no model.safetensors"),
        (None, ("--weights", "1", "2"), "--weights has 2 numbers for 3 models: give one for each"),
        (None, ("--weights", "0", "0", "0"), "--weights has no number above 0"),
    ],
)
def test_models_that_have_no_mean_are_refused_and_nothing_is_written(
    spoil: Any, flags: tuple[str, ...], says: str, folders: list[Path], run: Any, tmp_path: Path
) -> None:
    if spoil is not None:
        spoil(folders[1])
    status, _, error = run("merge", *map(str, folders), "--output", str(tmp_path / "merged"), *flags)
    assert status == 2
    assert len(error) == 1
    assert says in error[0]
    assert not (tmp_path / "merged").exists()


def test_one_model_has_no_mean(folders: list[Path], run: Any, tmp_path: Path) -> None:
    status, _, error = run("merge", str(folders[0]), "--output", str(tmp_path / "merged"))
    assert (status, error) == (2, ["error: minilm merge takes the mean of several models: give two folders or more"])
