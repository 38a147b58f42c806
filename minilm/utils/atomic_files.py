"""Files and folders that are written completely or not at all."""

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
    """Return the size of a file in bytes, and its SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def publish(path: Path, text: str) -> None:
    """Write a text file so that `path` holds the old or the whole new content, even if the process is killed."""
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
    """Yield a temporary folder beside `target` that replaces it at the end of the block, once all files are on disk.

    needed: give it if several processes may write the target at the same time. Each process then has a separate
        temporary folder, and they take turns at the end. A process drops its folder if `needed()` returns False in its
        turn.
    """
    suffix = "" if needed is None else f"-{uuid.uuid4().hex[:12]}"
    temporary, old = (target.with_name(f".{target.name}{suffix}.{kind}") for kind in ("writing", "replaced"))
    for leftover in (temporary, old):  # a killed run may have left them
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
                except OSError:  # without locks, another process may have renamed at the same time
                    if needed():
                        raise
    finally:
        for leftover in (temporary, old):
            remove(leftover)


@contextlib.contextmanager
def replacing_files(folder: Path, *, last: str) -> Iterator[Path]:
    """Yield a temporary folder inside `folder`. At the end, its files replace those of the same names in `folder`.

    Each file is replaced at once as a whole. Files whose names end in `last` are replaced last.
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
    """Rename `target`, if it exists, to `old`, and `temporary` to `target`."""
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
    """Keep other processes of this host from entering the block for the same folder.

    On a file system without locks on folders, such as NFS, it does nothing.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def follow_umask(folder: Path) -> None:
    """Give each file below a folder the mode that the umask gives to a new file.

    folder: `mkdir` must have made it, because its mode shows the umask.

    Some libraries write files that only the owner can read.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, and ignore errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
