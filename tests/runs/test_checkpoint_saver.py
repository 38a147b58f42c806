"""Writing checkpoints: no failure costs an older one, and nothing is removed before its successor is there."""

import math
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertForMaskedLM,
)

from minilm.config import Config, Run
from minilm.runs import checkpoint_files
from minilm.runs.checkpoint import Progress, find_checkpoint, read_checkpoint
from minilm.runs.resume import restore_state
from tests.checkpoints import LISTED, STATE, contents, names, network, save, saver_in, trained


@pytest.mark.scorecard(16)
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


@pytest.mark.scorecard(16)
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
    for name in (
        ".checkpoint-1.writing",
        ".checkpoint-1.part-2.writing",
        ".checkpoint-1.replaced",
        ".checkpoint-1.discarded",
    ):
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
    assert read_checkpoint(tmp_path / "checkpoint-1").progress.figure == 2.0
    assert names(tmp_path) == ["checkpoint-1"]


def fail(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (os, "fsync"),
        (os, "rename"),
        (checkpoint_files, "save_file"),
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


@pytest.mark.scorecard(13)
def test_a_failed_write_is_raised_by_the_next_save_which_then_writes_nothing(tokenizer, tmp_path, monkeypatch):
    saver = saver_in(tmp_path, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "save_file", fail)
        saver.save(Progress(step=1))
        saver._thread.join()
    with pytest.raises(OSError, match="checkpoint-1 could not be written"):
        saver.save(Progress(step=2))
    saver.wait()
    assert names(tmp_path) == []


@pytest.mark.scorecard(13)
@pytest.mark.parametrize("which", range(1, 2 * len(LISTED) + 1))
def test_a_step_saved_again_keeps_its_first_checkpoint_when_a_rename_fails(which, tokenizer, tmp_path, monkeypatch):
    saver = saver_in(tmp_path, tokenizer)
    save(saver, 1, figure=3.0)
    before = contents(tmp_path)
    rename, calls = os.rename, []

    def fail_once(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == which:
            fail()
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    saver.save(Progress(step=1, figure=2.0))
    with pytest.raises(OSError, match="older checkpoints are untouched"):
        saver.wait()
    assert contents(tmp_path) == before


@pytest.mark.scorecard(13)
def test_every_file_is_on_disk_before_the_folder_gets_its_name_and_that_name_after(tokenizer, tmp_path, monkeypatch):
    events: list[Any] = []
    fsync, rename = os.fsync, os.rename

    def record_sync(descriptor: int) -> None:
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "checkpoint-1":
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
    assert names(tmp_path) == [".checkpoint-1.part-1.writing"]
    with torch.no_grad():
        for parameter, slots in saver.optimizer.state.items():
            parameter.zero_()
            for tensor in slots.values():
                tensor.zero_()
    released.set()
    saver.wait()
    fresh = network(tokenizer, seed=1)
    optimizer = trained(fresh)
    restore_state(read_checkpoint(tmp_path / "checkpoint-1"), fresh, optimizer)
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in expected.items())
    restored = [slots["exp_avg"] for slots in optimizer.state.values()]
    assert all(torch.equal(*pair) for pair in zip(restored, moments, strict=True))


def test_one_checkpoint_is_written_at_a_time(tokenizer, tmp_path, monkeypatch):
    running, most, lock = [0], [0], threading.Lock()
    save_file = checkpoint_files.save_file

    def count(*args: Any) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        threading.Event().wait(0.1)
        save_file(*args)
        with lock:
            running[0] -= 1

    monkeypatch.setattr(checkpoint_files, "save_file", count)
    saver = saver_in(tmp_path, tokenizer)
    for step in (1, 2):
        saver.save(Progress(step=step))
    saver.wait()
    assert most == [1]
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("main", [True, False])
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
    main, save_every, step, last, due, tokenizer, tmp_path
):
    assert saver_in(tmp_path, tokenizer, main=main, save_every=save_every).due(step, last=last, better=False) is due


@pytest.mark.parametrize(("main", "save_every"), [(False, 1), (True, 0)])
def test_a_saver_without_a_part_or_without_saves_writes_nothing(main, save_every, tokenizer, tmp_path):
    saver = saver_in(tmp_path, tokenizer, main=main, save_every=save_every)
    save(saver, 1)
    assert names(tmp_path) == []


@pytest.mark.scorecard(16)
@pytest.mark.parametrize(("keep_last", "kept"), [(1, [4]), (2, [2, 4]), (3, [1, 2, 4])])
def test_a_run_that_resumed_from_an_earlier_checkpoint_removes_the_later_ones(keep_last, kept, tokenizer, tmp_path):
    for step in (1, 2, 5, 6):
        save(saver_in(tmp_path, tokenizer, keep_last=9), step)
    save(saver_in(tmp_path, tokenizer, keep_last=keep_last), 4)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]
    assert find_checkpoint("latest", tmp_path).progress.step == 4


@pytest.mark.scorecard(16)
@pytest.mark.parametrize("state", ["{}", '{"progress": 3}', "[", "[]"])
def test_an_older_checkpoint_that_cannot_be_read_does_not_end_the_run(state, tokenizer, tmp_path):
    saver = saver_in(tmp_path, tokenizer, keep_last=1)
    save(saver, 1)
    (tmp_path / "checkpoint-1" / STATE).write_text(state)
    save(saver, 2)
    assert names(tmp_path) == ["checkpoint-2"]
