"""Files kept between runs, named by what they were made from, and written so that a killed process leaves no half."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """`$HF_HOME/minilm` (default `~/.cache/huggingface/minilm`), beside the caches of the other libraries."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "huggingface"
    )
    folder = Path(home, "minilm")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def publish(path: Path, text: str) -> None:
    """Write a text file so that `path` holds the old content or the whole new one, whenever the process dies."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A temporary sibling to fill, renamed to `folder` when the block ends well and removed when it does not.

    Whoever renames first wins: a second process that built the same content finds it there and drops its own.
    """
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield temporary
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
