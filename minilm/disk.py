"""Files and folders that are whole on the disk, or not there."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def file_facts(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary sibling of `target`, which takes its place once it is whole and on disk."""
    temporary, old = (target.with_name(f".{target.name}.{kind}") for kind in ("writing", "replaced"))
    for leftover in (temporary, old):  # of a killed run
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(temporary, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
        sync(target.parent)
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def sync(path: Path) -> None:
    """Have the file or folder on disk before anything else is done."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
