"""The output folder is claimed without harm, and an exported model is whole, plain and equal to the bit."""

import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, pipeline

from minilm.checkpoint import claim_output_dir, export
from minilm.model import SparseHead

IDS_BxL = torch.tensor([[2, 9, 30, 11, 4, 3], [2, 40, 4, 12, 50, 3]])


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)  # whatever precision another test asked for
    return Accelerator(cpu=True)


def network(tokenizer, seed: int = 0) -> BertForMaskedLM:
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **size)).eval()


def save(accelerator: Accelerator, model: BertForMaskedLM, tokenizer, folder: Path) -> None:
    export(accelerator, accelerator.prepare(SparseHead(model)), model, tokenizer, folder)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS_BxL).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_default_folders_are_numbered_and_one_that_is_empty_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (Path("out/mlm"), Path("out/mlm-2"), Path("out/mlm-3")):
        assert [claim_output_dir(None, False, "mlm") for _ in range(2)] == [folder, folder]
        assert contents(folder) == {}
        (folder / "run.json").write_text("mine")


def test_an_asked_folder_is_created_with_its_parents_and_an_empty_one_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for _ in range(2):
        assert claim_output_dir("~/a/b", False, "mlm") == tmp_path / "a" / "b"
    assert contents(tmp_path / "a" / "b") == {}


def test_a_folder_that_is_not_empty_is_refused_untouched_or_overwritten_when_asked(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty: .* --run\.overwrite"):
        claim_output_dir(str(tmp_path), False, "mlm")
    assert claim_output_dir(str(tmp_path), True, "mlm") == tmp_path
    assert contents(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below"])
def test_a_folder_that_cannot_be_is_refused_in_one_line(place, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="cannot be written") as caught:
        claim_output_dir(str(tmp_path / place), True, "mlm")
    assert str(tmp_path / place) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_folder_without_room_or_permission_is_refused(tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match="cannot be written: No space left on device"):
        claim_output_dir(str(tmp_path), False, "mlm")


def test_an_exported_model_loads_plainly_with_the_same_logits_bit_for_bit(tokenizer, accelerator, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model = network(tokenizer)
    expected = logits(model)
    save(accelerator, model, tokenizer, tmp_path)
    assert torch.equal(logits(AutoModelForMaskedLM.from_pretrained(tmp_path)), expected)
    assert AutoTokenizer.from_pretrained(tmp_path)("A short one.") == tokenizer("A short one.")
    assert len(pipeline("fill-mask", model=str(tmp_path))("The [MASK] fox.")) == 5
    needed = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "notes.txt"}
    assert set(contents(tmp_path)) == needed
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path.name != "notes.txt"} == {0o644}


def test_an_export_takes_the_place_of_an_older_one(tokenizer, accelerator, tmp_path):
    for seed in (0, 1):
        save(accelerator, network(tokenizer, seed), tokenizer, tmp_path)
    assert torch.equal(logits(AutoModelForMaskedLM.from_pretrained(tmp_path)), logits(network(tokenizer, 1)))


@pytest.mark.parametrize("fails", ["model", "tokenizer", "sync"])
def test_an_old_model_survives_a_failed_export(fails, tokenizer, accelerator, tmp_path, monkeypatch):
    save(accelerator, network(tokenizer), tokenizer, tmp_path)
    before = contents(tmp_path)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def write_half(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        fail()

    target, name = {
        "model": (BertForMaskedLM, "save_pretrained"),
        "tokenizer": (type(tokenizer), "save_pretrained"),
        "sync": (os, "fsync"),
    }[fails]
    monkeypatch.setattr(target, name, write_half if fails == "model" else fail)
    with pytest.raises(OSError, match="No space left"):
        save(accelerator, network(tokenizer, seed=1), tokenizer, tmp_path)
    assert contents(tmp_path) == before


def test_the_weights_are_renamed_last(tokenizer, accelerator, tmp_path, monkeypatch):
    replace, renamed = os.replace, []

    def record(source, target):
        renamed.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    save(accelerator, network(tokenizer), tokenizer, tmp_path)
    assert renamed[-1] == "model.safetensors"
    assert sorted(renamed) == sorted(contents(tmp_path))
