"""Cut the power, or fail, at each call of a save that touches the disk: is a whole checkpoint left, the old or the new?

    python -m tests.faults.power

The calls are those of Python to open, write out, sync, rename, make and remove, and the library's to write tensors. A
cut takes nothing of a file that was not synced, half of it, or all.
"""

import builtins
import contextlib
import ctypes
import io
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers.modeling_utils

from minilm.runs import checkpoint_files
from minilm.runs.checkpoint import find_checkpoint, read_checkpoint
from minilm.runs.checkpoint_saver import CheckpointSaver
from tests.checkpoints import contents, save, saver_in
from tests.conftest import SENTENCES

CALLS = (
    *((io, "open"), (builtins, "open"), (Path, "write_text")),
    *((os, name) for name in ("open", "fsync", "rename", "mkdir", "unlink", "rmdir")),
    *((checkpoint_files, "save_file"), (transformers.modeling_utils, "safe_save_file")),
)
LOSSES = {"nothing": 1.0, "half": 0.5, "all": 0.0}  # share of a file that is left where it was not synced


@contextlib.contextmanager
def counted(folder: Path, act: Callable[[int, str], None]) -> Iterator[None]:
    """Call `act(n, name)` before the n-th call, from 1, that is about a path in `folder` or an open file."""
    count, busy = [0], threading.local()

    def wrap(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            ours = name == "fsync" or any(str(folder) in str(arg) for arg in args) or "dir_fd" in kwargs
            if not ours or getattr(busy, "inside", False):  # a call of a call is no other one
                return original(*args, **kwargs)
            count[0] += 1
            busy.inside = True
            try:
                act(count[0], name)
                return original(*args, **kwargs)
            finally:
                busy.inside = False

        return call

    with contextlib.ExitStack() as patches:
        for owner, name in CALLS:
            patches.enter_context(mock.patch.object(owner, name, wrap(getattr(owner, name), name)))
        yield


def calls_of(saver: CheckpointSaver, step: int) -> int:
    """How many calls a save makes."""
    seen: list[int] = []
    with counted(saver.folder, lambda number, name: seen.append(number)):
        save(saver, step)
    return len(seen)


def cut(saver: CheckpointSaver, step: int, at: int, left: float) -> None:
    """Save in a process whose power goes at its `at`-th call; of a file that is not synced this share is `left`."""
    synced: set[int] = set()
    fsync = os.fsync

    def die(number: int, name: str) -> None:
        if number == at:
            for path in saver.folder.rglob("*"):
                if path.is_file() and path.stat().st_ino not in synced:
                    os.truncate(path, int(path.stat().st_size * left))
            os._exit(0)

    def remember(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    if (child := os.fork()) == 0:
        try:
            synced |= {path.stat().st_ino for path in saver.folder.rglob("*")}  # those before have been there for long
            with mock.patch.object(os, "fsync", remember), counted(saver.folder, die):
                save(saver, step)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, f"call {at} was not reached"


def fail(saver: CheckpointSaver, step: int, at: int) -> str:
    """Save with an I/O error from the `at`-th call; returns what was told."""

    def raise_error(number: int, name: str) -> None:
        if number == at:
            raise OSError(5, "Input/output error")

    with counted(saver.folder, raise_error):
        try:
            save(saver, step)
        except OSError as error:
            return str(error)
    return ""


def template(place: Path, tokenizer: Any) -> Path:
    """A folder with the checkpoints of the steps 1 and 2."""
    place.mkdir()
    saver = saver_in(place, tokenizer, keep_last=2)
    for step in (1, 2):
        save(saver, step)
    return place


def copied(folder: Path, place: Path, tokenizer: Any) -> CheckpointSaver:
    """A saver in a copy of that folder which keeps a single checkpoint."""
    return saver_in(Path(shutil.copytree(folder, place)), tokenizer, keep_last=1)


def check(saver: CheckpointSaver, before: dict[str, bytes]) -> int:
    """The step of the newest checkpoint, which must be whole: 3, or 2 as it was."""
    found = find_checkpoint("latest", saver.folder)
    for path in saver.folder.glob("checkpoint-*"):
        read_checkpoint(path)
    assert found.progress.step in (2, 3)
    if found.progress.step == 2:
        old = {name: data for name, data in contents(saver.folder).items() if name.startswith("checkpoint-2/")}
        assert old == {name: data for name, data in before.items() if name.startswith("checkpoint-2/")}
    return found.progress.step


def every_cut(place: Path, tokenizer: Any, loss: str) -> str:
    """The power cut at each call of a save."""
    folder = template(place / "template", tokenizer)
    calls = calls_of(copied(folder, place / "counted", tokenizer), 3)
    new = 0
    for at in range(1, calls + 1):
        saver = copied(folder, place / f"cut-{at}", tokenizer)
        before = contents(saver.folder)
        cut(saver, 3, at, LOSSES[loss])
        new += check(saver, before) == 3
        save(saver_in(saver.folder, tokenizer, keep_last=1), 3)  # the run continues, and cleans up
        assert sorted(path.name for path in saver.folder.iterdir()) == ["checkpoint-3"]
    return (
        f"{calls}/{calls} power cuts ({loss} of the unsynced data lost) left a whole checkpoint: "
        f"{calls - new} times the old one, {new} times the new one"
    )


def every_error(place: Path, tokenizer: Any) -> str:
    """An error at each call of a save."""
    folder = template(place / "template", tokenizer)
    calls = calls_of(copied(folder, place / "counted", tokenizer), 3)
    told = 0
    for at in range(1, calls + 1):
        saver = copied(folder, place / f"error-{at}", tokenizer)
        before = contents(saver.folder)
        message = fail(saver, 3, at)
        step = check(saver, before)
        told += bool(message)
        # An error after the new checkpoint is in place, or in clearing away, costs nothing.
        assert message or step == 3, f"call {at}: not saved, and nothing was told"
        assert not message or str(saver.folder / "checkpoint-3") in message, f"call {at}: {message}"
        assert "\n" not in message
        save(saver, 4)
        assert find_checkpoint("latest", saver.folder).progress.step == 4
    return f"{calls}/{calls} errors: {told} reported with the path, {calls - told} harmless"


@contextlib.contextmanager
def disk_of(size: str, place: Path) -> Iterator[Path]:
    """A disk of this size, mounted at a new folder in `place`; skips the test where that is not allowed."""
    disk = place / "disk"
    disk.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", 0, f"size={size}".encode()) != 0:
        pytest.skip(f"mounting a small tmpfs needs CAP_SYS_ADMIN ({os.strerror(ctypes.get_errno())})")
    try:
        yield disk
    finally:
        assert libc.umount2(os.fsencode(disk), 2) == 0


def main() -> None:
    """The command line."""
    from datasets import Dataset

    from minilm.data.tokenizer_training import train_tokenizer

    torch.set_num_threads(1)
    tokenizer = train_tokenizer(Dataset.from_dict({"text": SENTENCES * 20}), "bpe", 400)
    for loss in LOSSES:
        with tempfile.TemporaryDirectory() as place:
            print(every_cut(Path(place), tokenizer, loss), flush=True)
    with tempfile.TemporaryDirectory() as place:
        print(every_error(Path(place), tokenizer), flush=True)


if __name__ == "__main__":
    main()
