"""A checkpoint is whole or it is refused: plain to load, equal to the bit, and no failure costs an older one."""

import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from minilm import checkpoint
from minilm.checkpoint import Progress, Saver, find_checkpoint, read_checkpoint
from minilm.config import Config, Run, to_dict
from minilm.resume import restore

IDS_BxL = torch.tensor([[2, 9, 30, 11, 4, 3], [2, 40, 4, 12, 50, 3]])
WEIGHTS, MOMENTS, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "training.json", "manifest.json"
LISTED = ["config.json", WEIGHTS, MOMENTS, "tokenizer.json", "tokenizer_config.json", STATE]
DATA = {"examples": 3, "tokens": 15, "fingerprint": "abc"}


def network(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> BertForMaskedLM:
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **size)).eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS_BxL).logits


def trained(model: PreTrainedModel) -> torch.optim.Optimizer:
    """An optimizer after one update, so that it has moments."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model(IDS_BxL, labels=IDS_BxL).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def saver_in(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, enabled: bool = True, keep_last: int = 2, save_every: int = 1
) -> Saver:
    model = network(tokenizer)
    config = Config(run=Run(save_every=save_every, keep_last=keep_last))
    return Saver(folder, model, trained(model), tokenizer, config, DATA, enabled=enabled)


def save(saver: Saver, step: int, eval_loss: float | None = None) -> None:
    saver.save(Progress(step=step, eval_loss=eval_loss))
    saver.wait()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def rewrite_manifest(folder: Path, listed: list[str] = LISTED) -> None:
    (folder / MANIFEST).write_text(json.dumps({name: facts(folder / name) for name in listed}))


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
    for resume in ("latest", str(damaged)) if (damaged / MANIFEST).is_file() else (str(damaged),):
        with pytest.raises(ValueError, match="no usable checkpoint") as caught:
            find_checkpoint(resume, damaged.parent)
        message = str(caught.value)
        assert "\n" not in message
        assert str(damaged) in message
        assert named in message.replace(str(damaged), "")
        assert "there is also checkpoint-1" in message


def test_a_checkpoint_loads_plainly_with_the_same_logits_bit_for_bit_and_holds_no_code(tokenizer, tmp_path):
    saver = saver_in(tmp_path, tokenizer)
    save(saver, 7)
    folder = tmp_path / "checkpoint-7"
    assert torch.equal(logits(AutoModelForMaskedLM.from_pretrained(folder)), logits(saver.network))
    assert AutoTokenizer.from_pretrained(folder)("A short one.") == tokenizer("A short one.")
    assert names(folder) == sorted([*LISTED, MANIFEST])
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_a_checkpoint_that_is_read_says_where_the_run_stood(tokenizer, tmp_path):
    saver = saver_in(tmp_path, tokenizer)
    progress = Progress(step=7, tokens=2**40, seconds=0.1, flops=1e21, log_bytes=12, eval_loss=2.5)
    saver.save(progress)
    saver.wait()
    found = read_checkpoint(tmp_path / "checkpoint-7")
    assert (found.folder, found.progress) == (tmp_path / "checkpoint-7", progress)
    assert (found.config, found.data) == (to_dict(saver.config), DATA)


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
    restore(read_checkpoint(folder), fresh, optimizer)
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


@pytest.mark.parametrize("name", LISTED)
@pytest.mark.parametrize("place", [0, 0.5, 1], ids=["first", "middle", "last"])
def test_one_flipped_bit_is_refused(name, place, folder):
    path = folder / "checkpoint-2" / name
    data = bytearray(path.read_bytes())
    data[round(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    refused(folder / "checkpoint-2", name)


def test_one_flipped_bit_anywhere_in_the_manifest_is_refused_in_one_line(folder):
    path = folder / "checkpoint-2" / MANIFEST
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="no usable checkpoint") as caught:
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


@pytest.mark.parametrize("name", [*LISTED, MANIFEST])
@pytest.mark.parametrize("damage", [halve, Path.unlink, link, make_folder], ids=["halved", "missing", "link", "folder"])
def test_a_file_that_is_short_or_missing_or_no_plain_file_is_refused(name, damage, folder):
    damage(folder / "checkpoint-2" / name)
    refused(folder / "checkpoint-2", name)


@pytest.mark.parametrize(
    "garbled",
    [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'{"config.json": 3}', b'{"config.json": {}}', b"[" * 100_000],
    ids=["empty", "open", "list", "null", "no files", "no text", "no facts", "no size", "deep"],
)
def test_a_garbled_manifest_is_refused(garbled, folder):
    (folder / "checkpoint-2" / MANIFEST).write_bytes(garbled)
    refused(folder / "checkpoint-2", MANIFEST)


@pytest.mark.parametrize("name", [WEIGHTS, MOMENTS, STATE])
def test_a_manifest_that_leaves_out_a_file_that_would_be_read_is_refused(name, folder):
    rewrite_manifest(folder / "checkpoint-2", [other for other in LISTED if other != name])
    refused(folder / "checkpoint-2", name)


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
    ],
    ids=["unknown progress", "unknown group", "no progress", "no group", "text"],
)
def test_a_training_state_with_other_fields_is_refused(change: Callable[[dict[str, Any]], Any], folder):
    path = folder / "checkpoint-2" / STATE
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    rewrite_manifest(path.parent)
    refused(path.parent, STATE)


def test_a_damaged_checkpoint_without_another_one_gets_no_hint(folder):
    (folder / "checkpoint-2" / STATE).unlink()
    (folder / "checkpoint-1" / MANIFEST).unlink()
    with pytest.raises(ValueError, match=STATE) as caught:
        find_checkpoint("latest", folder)
    assert "there is also" not in str(caught.value)


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


@pytest.mark.parametrize(
    ("keep_last", "losses", "kept"),
    [
        (1, [1.0, 2.0, 3.0, 4.0], [1, 4]),
        (2, [1.0, 2.0, 3.0, 4.0], [1, 3, 4]),
        (1, [4.0, 3.0, 2.0, 1.0], [4]),
        (2, [4.0, 3.0, 2.0, 1.0], [3, 4]),
        (1, [None, None, None, None], [4]),
        (2, [None, None, None, None], [3, 4]),
        (1, [None, 2.0, None, 3.0], [2, 4]),
        (2, [None, 0.0, None, None], [2, 3, 4]),
        (1, [3.0, 1.0, 2.0, None], [2, 4]),
        (1, [math.nan, 2.0, 3.0, math.nan], [2, 4]),
        (1, [2.0, math.nan, math.inf, 3.0], [1, 4]),
        (9, [1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4]),
    ],
)
def test_exactly_the_newest_and_the_best_remain(keep_last, losses, kept, tokenizer, tmp_path):
    saver = saver_in(tmp_path, tokenizer, keep_last=keep_last)
    for step, eval_loss in zip((8, 9, 10, 11), losses, strict=True):  # by number: as text, 10 comes before 9
        save(saver, step, eval_loss)
    assert names(tmp_path) == sorted(f"checkpoint-{number + 7}" for number in kept)
    for name in names(tmp_path):
        read_checkpoint(tmp_path / name)


def test_a_checkpoint_is_removed_only_when_its_successor_is_in_place(tokenizer, tmp_path, monkeypatch):
    rename, rmtree, latest = os.rename, shutil.rmtree, []

    def look(path: Path) -> None:
        if Path(path).name.lstrip(".").startswith("checkpoint-1") and Path(path).exists():
            latest.append(find_checkpoint("latest", tmp_path).progress.step)

    def looking_rename(source: Path, target: Path) -> None:
        if not str(source).endswith(".writing"):
            look(source)
        rename(source, target)

    def looking_rmtree(path: Path, ignore_errors: bool = False) -> None:
        look(path)
        rmtree(path, ignore_errors=ignore_errors)

    saver = saver_in(tmp_path, tokenizer, keep_last=1)
    save(saver, 1)
    monkeypatch.setattr(os, "rename", looking_rename)
    monkeypatch.setattr(shutil, "rmtree", looking_rmtree)
    save(saver, 2)
    assert latest == [2, 2]
    assert names(tmp_path) == ["checkpoint-2"]


def test_what_a_killed_run_left_is_in_nobodys_way(tokenizer, tmp_path):
    saver = saver_in(tmp_path, tokenizer, keep_last=1)
    for name in (".checkpoint-1.writing", ".checkpoint-1.replaced", ".checkpoint-1.discarded"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old.json").write_text("half")
    for step in (1, 2):
        save(saver, step)
    assert names(tmp_path) == ["checkpoint-2"]
    assert "old.json" not in names(tmp_path / "checkpoint-2")


def test_saving_a_step_again_takes_the_place_of_its_first_checkpoint(tokenizer, tmp_path):
    saver = saver_in(tmp_path, tokenizer)
    for eval_loss in (3.0, 2.0):
        save(saver, 1, eval_loss)
    assert read_checkpoint(tmp_path / "checkpoint-1").progress.eval_loss == 2.0
    assert names(tmp_path) == ["checkpoint-1"]


def fail(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (os, "fsync"),
        (os, "rename"),
        (checkpoint, "save_file"),
        (Path, "write_text"),
        (BertForMaskedLM, "save_pretrained"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_failed_write_names_its_checkpoint_and_leaves_all_older_ones(owner, name, tokenizer, tmp_path, monkeypatch):
    saver = saver_in(tmp_path, tokenizer, keep_last=2)
    for step in (1, 2):
        save(saver, step)
    before = contents(tmp_path)
    saver.config = Config(run=Run(save_every=1, keep_last=1))  # the third would now remove the first two
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        saver.save(Progress(step=3))
        with pytest.raises(OSError, match="could not be written: No space left on device") as caught:
            saver.wait()
    assert str(tmp_path / "checkpoint-3") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert find_checkpoint("latest", tmp_path).progress.step == 2
    save(saver, 4)  # said once; the disk has room again
    assert names(tmp_path) == ["checkpoint-4"]


def test_a_failed_write_is_raised_by_the_next_save_which_then_writes_nothing(tokenizer, tmp_path, monkeypatch):
    saver = saver_in(tmp_path, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", fail)
        saver.save(Progress(step=1))
        saver._thread.join()
    with pytest.raises(OSError, match="checkpoint-1 could not be written"):
        saver.save(Progress(step=2))
    saver.wait()
    assert names(tmp_path) == []


@pytest.mark.parametrize("which", [1, 2])
def test_a_step_saved_again_keeps_its_first_checkpoint_when_a_rename_fails(which, tokenizer, tmp_path, monkeypatch):
    saver = saver_in(tmp_path, tokenizer)
    save(saver, 1, eval_loss=3.0)
    before = contents(tmp_path)
    rename, calls = os.rename, []

    def fail_once(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == which:
            fail()
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    saver.save(Progress(step=1, eval_loss=2.0))
    with pytest.raises(OSError, match="older checkpoints are untouched"):
        saver.wait()
    assert contents(tmp_path) == before


def test_every_file_is_on_disk_before_the_folder_gets_its_name_and_that_name_after(tokenizer, tmp_path, monkeypatch):
    events: list[Any] = []
    fsync, rename = os.fsync, os.rename

    def record_sync(descriptor: int) -> None:
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    saver = saver_in(tmp_path, tokenizer)
    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", record_rename)
    save(saver, 1)
    folder = tmp_path / "checkpoint-1"
    middle = events.index("rename")
    assert {path.stat().st_ino for path in (*folder.iterdir(), folder)} <= set(events[:middle])
    assert tmp_path.stat().st_ino in events[middle:]


def test_what_changes_after_save_returned_does_not_reach_the_checkpoint(tokenizer, tmp_path, monkeypatch):
    released, started = threading.Event(), threading.Event()
    save_pretrained = BertForMaskedLM.save_pretrained

    def held(self: BertForMaskedLM, *args: Any, **kwargs: Any) -> None:
        started.set()
        assert released.wait(timeout=20)
        save_pretrained(self, *args, **kwargs)

    monkeypatch.setattr(BertForMaskedLM, "save_pretrained", held)
    saver = saver_in(tmp_path, tokenizer)
    expected = {name: tensor.clone() for name, tensor in saver.network.state_dict().items()}
    moments = [slots["exp_avg"].clone() for slots in saver.optimizer.state.values()]
    saver.save(Progress(step=1))
    assert started.wait(timeout=20)
    assert names(tmp_path) == [".checkpoint-1.writing"]
    with torch.no_grad():
        for parameter, slots in saver.optimizer.state.items():
            parameter.zero_()
            for tensor in slots.values():
                tensor.zero_()
    released.set()
    saver.wait()
    fresh = network(tokenizer, seed=1)
    optimizer = trained(fresh)
    restore(read_checkpoint(tmp_path / "checkpoint-1"), fresh, optimizer)
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in expected.items())
    restored = [slots["exp_avg"] for slots in optimizer.state.values()]
    assert all(torch.equal(*pair) for pair in zip(restored, moments, strict=True))


def test_one_checkpoint_is_written_at_a_time(tokenizer, tmp_path, monkeypatch):
    running, most, lock = [0], [0], threading.Lock()
    save_file = checkpoint.save_file

    def count(*args: Any) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        threading.Event().wait(0.1)
        save_file(*args)
        with lock:
            running[0] -= 1

    monkeypatch.setattr(checkpoint, "save_file", count)
    saver = saver_in(tmp_path, tokenizer)
    for step in (1, 2):
        saver.save(Progress(step=step))
    saver.wait()
    assert most == [1]
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(
    ("save_every", "step", "last", "due"),
    [
        (1, 1, False, True),
        (3, 3, False, True),
        (3, 4, False, False),
        (3, 4, True, True),
        (3, 6, True, True),
        (0, 3, False, False),
        (0, 3, True, False),
    ],
)
def test_a_checkpoint_is_due_every_so_many_steps_and_at_the_end_on_every_process(
    enabled, save_every, step, last, due, tokenizer, tmp_path
):
    assert saver_in(tmp_path, tokenizer, enabled=enabled, save_every=save_every).due(step, last) is due


@pytest.mark.parametrize(("enabled", "save_every"), [(False, 1), (True, 0)])
def test_a_saver_that_is_not_enabled_writes_nothing_and_needs_no_room(
    enabled, save_every, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    saver = saver_in(tmp_path, tokenizer, enabled=enabled, save_every=save_every)
    save(saver, 1)
    assert names(tmp_path) == []


def test_a_disk_without_room_for_a_checkpoint_is_refused_at_once(tokenizer, tmp_path, monkeypatch):
    saver = saver_in(tmp_path, tokenizer)
    save(saver, 1)
    taken = sum(path.stat().st_size for path in (tmp_path / "checkpoint-1").glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=taken))
    with pytest.raises(ValueError, match="MB free and a checkpoint takes") as caught:
        saver_in(tmp_path, tokenizer)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * taken))
    saver_in(tmp_path, tokenizer)


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [4]), (2, [2, 4]), (3, [1, 2, 4])])
def test_a_run_that_went_on_from_an_earlier_checkpoint_leaves_none_ahead_of_it(keep_last, kept, tokenizer, tmp_path):
    for step in (1, 2, 5, 6):
        save(saver_in(tmp_path, tokenizer, keep_last=9), step)
    save(saver_in(tmp_path, tokenizer, keep_last=keep_last), 4)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]
    assert find_checkpoint("latest", tmp_path).progress.step == 4


@pytest.mark.parametrize("state", ["{}", '{"progress": 3}', "[", "[]"])
def test_an_older_checkpoint_that_cannot_be_read_does_not_end_the_run(state, tokenizer, tmp_path):
    saver = saver_in(tmp_path, tokenizer, keep_last=1)
    save(saver, 1)
    (tmp_path / "checkpoint-1" / STATE).write_text(state)
    save(saver, 2)
    assert names(tmp_path) == ["checkpoint-2"]


def test_a_name_with_a_line_break_in_a_manifest_is_refused_in_one_line(folder):
    rewritten = json.loads((folder / "checkpoint-1" / MANIFEST).read_text())
    (folder / "checkpoint-2" / MANIFEST).write_text(json.dumps({"a\nb": {}, **rewritten}))
    with pytest.raises(ValueError, match="no usable checkpoint") as caught:
        find_checkpoint("latest", folder)
    assert "\n" not in str(caught.value)
