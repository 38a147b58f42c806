"""`minilm export`: the model and its tokenizer alone, bit for bit, or as ONNX with the same logits."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from minilm.commands import export
from minilm.commands.export import export_model

PARTS = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory) -> dict[type, Path]:
    """A masked LM and two classifiers, each with what a run has beside it."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, initializer_range=0.5, **size)
    config.pad_token_id = tokenizer.pad_token_id
    found = {}
    for kind in (BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification):
        found[kind] = folder = tmp_path_factory.mktemp(kind.__name__)
        kind(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "checkpoint-2").mkdir()
        for name in ("run.json", "log.jsonl", "README.md", "optimizer.safetensors", "checkpoint-2/config.json"):
            (folder / name).write_text("{}")
    return found


def test_safetensors_are_copied_to_the_byte_with_the_tokenizer_and_nothing_else(folders, run, tmp_path: Path) -> None:
    folder, target = folders[BertForMaskedLM], tmp_path / "new" / "model"
    status, output, error = run("export", str(folder), "--format", "safetensors", "--output", str(target))
    assert (status, output, error) == (None, [f"written: {target}"], [])
    assert sorted(path.name for path in target.iterdir()) == PARTS
    assert all((target / name).read_bytes() == (folder / name).read_bytes() for name in PARTS)
    assert AutoTokenizer.from_pretrained(target).mask_token == "[MASK]"
    AutoModelForMaskedLM.from_pretrained(target)
    assert [path.name for path in target.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("template", ["one", {"default": "one", "tool_use": "two"}, {"rag": "three"}], ids=str)
def test_every_chat_template_comes_along(template: object, folders, tokenizer, run, tmp_path: Path) -> None:
    shutil.copytree(folders[BertForMaskedLM], tmp_path / "model")
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = template
    chatting.save_pretrained(tmp_path / "model")  # as transformers does it: most of several in a folder
    target = tmp_path / "new"
    status, _, error = run("export", str(tmp_path / "model"), "--format", "safetensors", "--output", str(target))
    assert (status, error) == (None, [])
    assert AutoTokenizer.from_pretrained(target).chat_template == template


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def half_a_checkpoint(folder: Path) -> None:
    (folder / "training.json").write_text(json.dumps({}))


def not_empty(folder: Path) -> None:
    (folder.parent / "new").mkdir()
    (folder.parent / "new" / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (no_weights, "does not hold a model: there is no model.safetensors"),
        (no_config, "does not hold a model: there is no config.json. Did its run finish?"),
        (half_a_checkpoint, "is not a usable checkpoint: there is no manifest.json in it"),
        (not_empty, "new exists and is not an empty folder: give another one"),
    ],
)
def test_an_impossible_export_is_refused_in_one_line_and_changes_nothing(
    prepare: Callable[[Path], None], says: str, folders, run, tmp_path: Path
) -> None:
    shutil.copytree(folders[BertForMaskedLM], tmp_path / "model")
    prepare(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    flags = ("--format", "safetensors", "--output", str(tmp_path / "new"))
    status, output, (error,) = run("export", str(tmp_path / "model"), *flags)
    assert (status, output) == (2, [])
    assert says in error
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_packages_of_onnx_are_named_with_the_command(folders, run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(export, "_PACKAGES", ("onnx_not_there",))
    flags = ("--format", "onnx", "--output", str(tmp_path / "new"))
    status, _, error = run("export", str(folders[BertForMaskedLM]), *flags)
    assert (status, error) == (2, ['error: --format onnx needs onnx_not_there: pip install "minilm[onnx]"'])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification])
def test_the_logits_of_onnx_are_those_of_the_model_for_texts_of_other_lengths(
    kind: type, folders, tmp_path: Path
) -> None:
    for name in export._PACKAGES:
        pytest.importorskip(name, reason='takes pip install "minilm[onnx]"')
    import onnxruntime

    target = export_model(folders[kind], tmp_path / "new", "onnx")
    assert sorted(path.name for path in target.iterdir()) == [
        *("config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json")
    ]
    tokenizer = AutoTokenizer.from_pretrained(target)
    batch = tokenizer(["A short one.", "If the file does not exist."], padding=True, return_tensors="pt")
    session = onnxruntime.InferenceSession(target / "model.onnx", providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    (found,) = session.run(None, {name: batch[name].numpy() for name in names})
    with torch.inference_mode():
        expected = kind.from_pretrained(folders[kind]).eval()(**batch).logits
    gap = (torch.from_numpy(found) - expected).abs()
    assert (gap if gap.ndim == 2 else gap[batch["attention_mask"] == 1]).max() < 1e-4
    assert expected.std() > 0.1


def test_a_model_that_onnx_cannot_tell_is_refused_in_one_line(folders, run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(export, "_PACKAGES", ())

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    flags = ("--format", "onnx", "--output", str(tmp_path / "new"))
    status, _, (error,) = run("export", str(folders[BertForMaskedLM]), *flags)
    assert status == 2
    assert error.endswith("BertForMaskedLM cannot be exported as ONNX: RuntimeError: no such operator")
    monkeypatch.setattr(torch.onnx, "export", lambda *arguments, **options: None)
    monkeypatch.setattr(export, "_gap", lambda *arguments: 0.5)
    status, _, (error,) = run("export", str(folders[BertForMaskedLM]), *flags)
    assert error.endswith("BertForMaskedLM cannot be exported as ONNX: the logits would differ by 5.0e-01")
    assert not any(tmp_path.iterdir())
