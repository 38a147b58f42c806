"""Checkpoints load with plain transformers and are equal to the bit. A damaged one is refused, with the file's name."""

import copy
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from minilm.commands.export import export_model
from minilm.config import Config, Run
from minilm.config.serialization import to_dict
from minilm.objectives.factory import build_objective
from minilm.runs.checkpoint import Progress, find_checkpoint, read_checkpoint
from minilm.runs.checkpoint_saver import CheckpointSaver
from minilm.runs.resume import restore_state, resume
from tests.checkpoints import (
    INPUTS,
    LISTED,
    MANIFEST,
    MOMENTS,
    STATE,
    WEIGHTS,
    IDS_BxL,
    facts,
    logits,
    names,
    network,
    rewrite_manifest,
    save,
    saver_in,
    trained,
)
from tests.matrix import HEADS
from tests.tiny import tiny_config


@pytest.fixture(scope="session")
def two(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with the checkpoints of the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    saver = saver_in(folder, tokenizer)
    save(saver, 1)
    save(saver, 2)
    return folder


@pytest.fixture
def folder(two: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(two, tmp_path / "out"))


def refused(damaged: Path, named: str) -> None:
    """Reading the newest checkpoint and reading it by path fail in one line that names the file and the other one."""
    for asked in ("latest", str(damaged)) if (damaged / MANIFEST).is_file() else (str(damaged),):
        with pytest.raises(ValueError, match="not a usable checkpoint") as caught:
            find_checkpoint(asked, damaged.parent)
        message = str(caught.value)
        assert "\n" not in message
        assert str(damaged) in message
        assert named in message.replace(str(damaged), "")
        assert "to resume from checkpoint-1, give its path" in message


def test_a_checkpoint_loads_plainly_with_the_same_logits_bit_for_bit_and_holds_no_code(tokenizer, tmp_path):
    saver = saver_in(tmp_path, tokenizer)
    save(saver, 7)
    folder = tmp_path / "checkpoint-7"
    assert torch.equal(logits(AutoModelForMaskedLM.from_pretrained(folder)), logits(saver.network))
    assert AutoTokenizer.from_pretrained(folder)("A short one.") == tokenizer("A short one.")
    assert names(folder) == sorted([*LISTED, MANIFEST])
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("template", ["one", {"default": "one", "tool_use": "two"}, {"rag": "three"}], ids=str)
def test_a_checkpoint_keeps_every_chat_template_of_its_tokenizer(template, tokenizer, tmp_path):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = template
    save(saver_in(tmp_path, chatting), 7)
    folder = read_checkpoint(tmp_path / "checkpoint-7").folder
    assert AutoTokenizer.from_pretrained(folder).chat_template == template
    export_model(folder, tmp_path / "alone", "safetensors")
    assert AutoTokenizer.from_pretrained(tmp_path / "alone").chat_template == template


def test_a_checkpoint_that_is_read_says_where_the_run_stood(tokenizer, tmp_path):
    saver = saver_in(tmp_path, tokenizer)
    progress = Progress(
        step=7, tokens=2**40, seconds=0.1, flops=1e21, log_bytes=12, figure=2.5, best=2.0, best_step=3, stale=1
    )
    saver.save(progress)
    saver.wait()
    found = read_checkpoint(tmp_path / "checkpoint-7")
    assert (found.folder, found.progress) == (tmp_path / "checkpoint-7", progress)
    assert (found.config, found.inputs) == (to_dict(saver.config), INPUTS)


def test_the_loss_scaling_of_fp16_is_resumed(tokenizer, tmp_path):
    def scaled(optimizer, scale):
        optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)  # where accelerate's wrapper has it
        optimizer.scaler.scale(torch.ones(()))
        return optimizer

    saver = saver_in(tmp_path, tokenizer)
    scaled(saver.optimizer, 8.0).scaler.update(32.0)
    save(saver, 1)
    fresh = network(tokenizer, seed=1)
    optimizer = scaled(trained(fresh), 2.0)
    found = read_checkpoint(tmp_path / "checkpoint-1")
    restore_state(found, fresh, optimizer)
    assert optimizer.scaler.state_dict() == saver.optimizer.scaler.state_dict()
    assert optimizer.scaler.get_scale() == 32
    with pytest.raises(ValueError, match=r"checkpoint-1: its loss scaling cannot be read: 'growth_factor'"):
        restore_state(replace(found, scaler={"scale": 1.0}), fresh, optimizer)


def test_a_checkpoint_from_before_the_loss_scaling_was_kept_is_read(tokenizer, tmp_path):
    saver = saver_in(tmp_path, tokenizer)
    save(saver, 1)
    folder = tmp_path / "checkpoint-1"
    state = json.loads((folder / "training.json").read_text())
    assert state.pop("scaler") == {}
    (folder / "training.json").write_text(json.dumps(state))
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"training.json": facts(folder / "training.json")}))
    assert read_checkpoint(folder).scaler == {}


def test_the_manifest_lists_every_other_file_with_its_size_and_hash(two):
    manifest = json.loads((two / "checkpoint-2" / MANIFEST).read_text())
    assert manifest == {name: facts(two / "checkpoint-2" / name) for name in LISTED}


def test_tied_weights_are_stored_once_and_everything_is_read_back_bit_for_bit(tokenizer, tmp_path):
    saver = saver_in(tmp_path, tokenizer)
    save(saver, 1)
    folder = tmp_path / "checkpoint-1"
    embedding_bytes = saver.network.get_input_embeddings().weight.nbytes
    assert (folder / WEIGHTS).stat().st_size < sum(p.nbytes for p in saver.network.parameters()) + embedding_bytes
    fresh = network(tokenizer, seed=1)
    optimizer = trained(fresh)
    restore_state(read_checkpoint(folder), fresh, optimizer)
    for model in (fresh, AutoModelForMaskedLM.from_pretrained(folder)):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        state = model.state_dict()
        assert state.keys() == saver.network.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in saver.network.state_dict().items())
    expected = saver.optimizer.state_dict()["state"]
    restored = optimizer.state_dict()["state"]
    assert len(restored) == len(list(fresh.parameters()))
    for index, slots in expected.items():
        assert restored[index].keys() == slots.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(restored[index][slot], tensor) for slot, tensor in slots.items())


@pytest.mark.scorecard(15)
@pytest.mark.parametrize("name", LISTED)
@pytest.mark.parametrize("place", [0, 0.5, 1], ids=["first", "middle", "last"])
def test_one_flipped_bit_is_refused(name, place, folder):
    path = folder / "checkpoint-2" / name
    data = bytearray(path.read_bytes())
    data[round(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    refused(folder / "checkpoint-2", name)


@pytest.mark.scorecard(15)
def test_one_flipped_bit_anywhere_in_the_manifest_is_refused_in_one_line(folder):
    path = folder / "checkpoint-2" / MANIFEST
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="not a usable checkpoint") as caught:
            read_checkpoint(path.parent)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    assert read_checkpoint(path.parent).progress.step == 2


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def link(path: Path) -> None:
    """The same bytes, behind a symbolic link."""
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.scorecard(15)
@pytest.mark.parametrize("name", [*LISTED, MANIFEST])
@pytest.mark.parametrize("damage", [halve, Path.unlink, link, make_folder], ids=["halved", "missing", "link", "folder"])
def test_a_file_that_is_short_or_missing_or_no_plain_file_is_refused(name, damage, folder):
    damage(folder / "checkpoint-2" / name)
    refused(folder / "checkpoint-2", name)


@pytest.mark.scorecard(15)
@pytest.mark.parametrize(
    "garbled",
    [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'{"config.json": 3}', b'{"config.json": {}}', b"[" * 100_000],
    ids=["empty", "open", "list", "null", "no files", "no text", "no facts", "no size", "deep"],
)
def test_a_garbled_manifest_is_refused(garbled, folder):
    (folder / "checkpoint-2" / MANIFEST).write_bytes(garbled)
    refused(folder / "checkpoint-2", MANIFEST)


@pytest.mark.scorecard(23)
@pytest.mark.parametrize("name", [WEIGHTS, MOMENTS, STATE])
def test_a_manifest_that_leaves_out_a_file_that_would_be_read_is_refused(name, folder):
    rewrite_manifest(folder / "checkpoint-2", [other for other in LISTED if other != name])
    refused(folder / "checkpoint-2", name)


@pytest.mark.scorecard(23)
@pytest.mark.parametrize("climb", ["../x", "../checkpoint-1/config.json", "/x", "sub/../config.json", "..", ".", ""])
def test_a_manifest_name_that_leaves_the_folder_is_refused_although_the_file_is_there(climb, folder):
    damaged = folder / "checkpoint-2"
    (damaged / "sub").mkdir()
    (folder / "x").write_text("outside")
    climb = str(folder / "x") if climb == "/x" else climb
    manifest = json.loads((damaged / MANIFEST).read_text())
    target = damaged / climb
    manifest[climb] = facts(target) if target.is_file() else {"bytes": 0, "sha256": ""}
    (damaged / MANIFEST).write_text(json.dumps(manifest))
    refused(damaged, climb)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["progress"].update(epoch=1),
        lambda state: state.update(extra={}),
        lambda state: state.pop("progress"),
        lambda state: state.update(progress=3),
        lambda state: state["progress"].update(step="7"),
        lambda state: state["revisions"].update({"me/texts": 7}),
    ],
    ids=["unknown progress", "unknown group", "no progress", "no group", "text", "number"],
)
def test_a_training_state_with_other_fields_is_refused(change: Callable[[dict[str, Any]], Any], folder):
    path = folder / "checkpoint-2" / STATE
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    rewrite_manifest(path.parent)
    refused(path.parent, STATE)


@pytest.mark.scorecard(15)
def test_a_damaged_checkpoint_without_another_one_gets_no_hint(folder):
    (folder / "checkpoint-2" / STATE).unlink()
    (folder / "checkpoint-1" / MANIFEST).unlink()
    with pytest.raises(ValueError, match=STATE) as caught:
        find_checkpoint("latest", folder)
    assert "give its path" not in str(caught.value)


def test_latest_is_the_complete_one_with_the_highest_step(folder):
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-10")
    for unfinished in ("checkpoint-11", ".checkpoint-12.writing", "checkpoint-best"):
        shutil.copytree(folder / "checkpoint-2", folder / unfinished)
    (folder / "checkpoint-11" / MANIFEST).unlink()
    (folder / "checkpoint-13").write_text("a file")
    assert find_checkpoint("latest", folder).folder == folder / "checkpoint-10"


def test_latest_where_there_is_none_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="no complete checkpoint in"):
            find_checkpoint("latest", folder)


@pytest.mark.scorecard(23)
def test_a_name_with_a_line_break_in_a_manifest_is_refused_in_one_line(folder):
    rewritten = json.loads((folder / "checkpoint-1" / MANIFEST).read_text())
    (folder / "checkpoint-2" / MANIFEST).write_text(json.dumps({"a\nb": {}, **rewritten}))
    with pytest.raises(ValueError, match="not a usable checkpoint") as caught:
        find_checkpoint("latest", folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("precisions", "says"),
    [
        (("auto", "auto", "fp32"), None),
        (("auto", "fp32", "fp32"), None),
        (("auto", "auto", "bf16"), "run.precision auto is bf16 now and was fp32: .* --run.precision fp32 keeps it"),
        (("auto", "bf16", "bf16"), 'run.precision was "fp32", is "bf16"'),
        (("fp32", "auto", "fp32"), 'run.precision was "fp32", is "auto"'),
    ],
    ids=str,
)
def test_a_resume_warns_if_auto_chooses_another_precision(precisions, says, tokenizer, tmp_path, caplog):
    before, now, chosen = precisions
    saver = saver_in(tmp_path, tokenizer)
    saver.config = Config(run=Run(precision=before))
    (tmp_path / "run.json").write_text(json.dumps({"precision": "fp32"}))
    save(saver, 1)
    config = Config(run=Run(precision=now))

    def go_on() -> None:
        resume(find_checkpoint("latest", tmp_path), config, INPUTS, 9, saver.network, saver.optimizer, precision=chosen)

    with caplog.at_level(logging.WARNING, logger="minilm"):
        if says is None or now == before:
            go_on()
        else:
            with pytest.raises(ValueError, match=says):
                go_on()
    assert len(caplog.messages) == (says is not None and now == before)
    assert all(re.search(says, message) for message in caplog.messages)


def test_a_refusal_of_other_examples_names_the_libraries_that_made_them(tokenizer, tmp_path):
    saver = saver_in(tmp_path, tokenizer)
    saver.inputs = {**INPUTS, "versions": {"torch": "2.13.0", "datasets": "5.1.0"}}
    save(saver, 1)
    checkpoint = find_checkpoint("latest", tmp_path)
    for part, says in (
        ("training examples", "datasets was 5.1.0, is 5.2.0; "),
        ("tokenizer", "the tokenizer has chan"),
    ):
        now = {**INPUTS, part: {"examples": 4}, "versions": {"torch": "2.14.0", "datasets": "5.2.0"}}
        with pytest.raises(ValueError, match=says) as refusal:
            resume(checkpoint, saver.config, now, 9, saver.network, saver.optimizer, precision="fp32")
        assert "torch" not in str(refusal.value)
        assert ("datasets" in str(refusal.value)) == (part == "training examples")


def test_the_commits_of_datasets_on_the_hub_are_kept(tokenizer, tmp_path):
    saver = saver_in(tmp_path, tokenizer)
    saver.revisions = {"me/texts": "abc"}
    save(saver, 1)
    assert read_checkpoint(tmp_path / "checkpoint-1").revisions == {"me/texts": "abc"}


def test_a_checkpoint_may_hold_the_commits_with_its_windows(folder):
    path = folder / "checkpoint-2" / STATE
    state = json.loads(path.read_text())
    del state["revisions"]
    state["windows"] = {"key": "0", "lines": [], "revisions": {"me/texts": "abc"}}
    path.write_text(json.dumps(state))
    rewrite_manifest(path.parent)
    assert read_checkpoint(path.parent).revisions == {"me/texts": "abc"}


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"precision": 3}'])
def test_a_resume_without_a_record_of_the_precision_is_silent(content, tokenizer, tmp_path, caplog):
    saver = saver_in(tmp_path, tokenizer)
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    save(saver, 1)
    resume(
        find_checkpoint("latest", tmp_path), saver.config, INPUTS, 9, saver.network, saver.optimizer, precision="bf16"
    )
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


OTHER_NAMES = [("causal", "gpt_neox"), ("causal", "mixtral"), ("masked", "esm"), ("classification", "gemma3")]


@pytest.mark.parametrize(("head", "kind"), OTHER_NAMES)
def test_a_model_whose_original_format_has_other_names_resumes(head, kind, tokenizer, tmp_path):
    auto, config = build_objective(HEADS[head].settings).auto, tiny_config(kind, tokenizer)
    before, after = auto.from_config(config).eval(), auto.from_config(config).eval()
    optimizer = trained(before, IDS_BxL if head != "classification" else torch.tensor([0, 1]))
    save(CheckpointSaver(tmp_path, before, optimizer, tokenizer, Config(), INPUTS, main=True), 1)
    checkpoint = read_checkpoint(tmp_path / "checkpoint-1")
    resumed = torch.optim.AdamW(after.parameters(), fused=True)
    restore_state(checkpoint, after, resumed)
    for other in (after, auto.from_pretrained(checkpoint.folder)):
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in before.state_dict().items())
    assert len(resumed.state) == len(optimizer.state)
