"""Files and folders that are whole on the disk, or not there."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def file_facts(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def publish(path: Path, text: str) -> None:
    """Write a text file so that `path` holds the old content or the whole new one, whenever the process dies."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:12]}")
    try:
        with temporary.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        remove(temporary)


@contextlib.contextmanager
def replacing(target: Path, *, needed: Callable[[], bool] | None = None) -> Iterator[Path]:
    """A temporary sibling of `target`, a folder, which takes its place once all of it is on disk.

    needed: for a target that several processes may write at a time. Each then has a temporary folder of its own, and
    they take turns at the end: the one for which `needed()` is false by then drops what it wrote.
    """
    own = "" if needed is None else f"-{uuid.uuid4().hex[:12]}"
    temporary, old = (target.with_name(f".{target.name}{own}.{kind}") for kind in ("writing", "replaced"))
    for leftover in (temporary, old):  # of a killed run
        remove(leftover)
    temporary.mkdir()
    try:
        yield temporary
        follow_umask(temporary)
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        with contextlib.nullcontext() if needed is None else turn(target.parent):
            if needed is None:
                _put(temporary, target, old)
            elif needed():
                try:
                    _put(temporary, target, old)
                except OSError:  # without locks, another process may have been in the middle of this
                    if needed():
                        raise
    finally:
        for leftover in (temporary, old):
            remove(leftover)


@contextlib.contextmanager
def replacing_files(folder: Path, *, last: str) -> Iterator[Path]:
    """A temporary folder inside `folder`, whose files then take the places of those of the same names in `folder`.

    Each file is whole at any time, and those that end in `last` come last.
    """
    temporary = folder / f".export-{uuid.uuid4().hex[:12]}"
    temporary.mkdir()
    try:
        yield temporary
        follow_umask(temporary)
        files = [path for path in temporary.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (path.suffix == last, path.name)):
            sync(path)
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
        sync(folder)
    finally:
        remove(temporary)


def _put(temporary: Path, target: Path, old: Path) -> None:
    """Rename `temporary` to `target`, and what was there to `old`."""
    if os.path.lexists(target):
        os.rename(target, old)
    try:
        os.rename(temporary, target)
    except OSError:
        if os.path.lexists(old):
            os.rename(old, target)
        raise
    sync(target.parent)


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Inside it no other process of this host is inside it for the same folder.

    A file system that has no locks on folders, such as NFS, does without them.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def follow_umask(folder: Path) -> None:
    """Give each file below a folder that `mkdir` made the mode that the umask gives to a new file.

    Some libraries write files that their owner alone can read.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync(path: Path) -> None:
    """Have the file or folder on disk before anything else is done."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
