"""Files and folders that are written completely or not at all, even if the process is killed."""

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


def hash_file(path: Path) -> dict[str, Any]:
    """Return the size of a file in bytes and its SHA-256, as `{"bytes": …, "sha256": …}`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8. At any time `path` holds either the old content or all of the new content."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:12]}")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_path(path.parent)
    finally:
        remove_path(temporary)


@contextlib.contextmanager
def replace_folder(target: Path, *, needed: Callable[[], bool] | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `target`, and rename it to `target` at the end of the block.

    All files are on disk before the rename. If the block raises, `target` stays as it was.

    needed: a function; pass it if several processes may write `target` at the same time. Each process then has its own
        temporary folder. At the end of the block the processes take turns: each one calls `needed()`, and renames its
        folder only if the answer is True.
    """
    suffix = "" if needed is None else f"-{uuid.uuid4().hex[:12]}"
    temporary, old = (target.with_name(f".{target.name}{suffix}.{kind}") for kind in ("writing", "replaced"))
    # A killed run may have left them behind.
    for leftover in (temporary, old):
        remove_path(leftover)
    temporary.mkdir()
    try:
        yield temporary
        _apply_umask(temporary)
        for path in (*temporary.rglob("*"), temporary):
            sync_path(path)
        if needed is None:
            _rename_over(temporary, target, old)
        else:
            with _one_process_at_a_time(target.parent):
                if needed():
                    try:
                        _rename_over(temporary, target, old)
                    except OSError:
                        # On a file system without locks, another process may have renamed at the same time.
                        if needed():
                            raise
    finally:
        for leftover in (temporary, old):
            remove_path(leftover)


@contextlib.contextmanager
def replace_files(folder: Path, *, last: str) -> Iterator[Path]:
    """Yield a temporary folder inside `folder`, and move its files into `folder` at the end of the block.

    Each file replaces the old file of its name at once and completely. Other files in `folder` stay. If the block
    raises, `folder` stays as it was.

    last: the suffix of the files that are moved last, such as `.safetensors`.
    """
    temporary = folder / f".export-{uuid.uuid4().hex[:12]}"
    temporary.mkdir()
    try:
        yield temporary
        _apply_umask(temporary)
        files = [path for path in temporary.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (path.suffix == last, path.name)):
            sync_path(path)
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        sync_path(folder)
    finally:
        remove_path(temporary)


def _rename_over(temporary: Path, target: Path, old: Path) -> None:
    """Rename `temporary` to `target`. A `target` that exists is first renamed to `old`."""
    if os.path.lexists(target):
        os.rename(target, old)
    try:
        os.rename(temporary, target)
    except OSError:
        if os.path.lexists(old):
            os.rename(old, target)
        raise
    sync_path(target.parent)


@contextlib.contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Let only one process of this host at a time into the block for the same folder.

    This has no effect on a file system that cannot lock folders, such as NFS.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _apply_umask(folder: Path) -> None:
    """Give each file below a folder the mode that the umask gives to a new file.

    Some libraries write files that only the owner can read.

    folder: a folder that `mkdir` made. Its mode shows the umask.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def remove_path(path: Path) -> None:
    """Remove a file, or a folder with its content, and ignore errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync_path(path: Path) -> None:
    """Wait until a file or a folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
