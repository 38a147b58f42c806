"""A cache of files between runs. It checks an entry whenever a run opens it.

An entry is a folder of files, with a manifest of their names, sizes and checksums. Its name stands for everything that
decides its content:

    folder = open_entry(f"ids-{key}", build)   # build(folder) writes the files if there is no such entry
    ids = np.load(folder / "ids.npy", mmap_mode="r")

`open_entry` is the only way to read an entry. It finds files that were cut, zeroed, changed or copied from another
entry, and builds such an entry again.
"""

import errno
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from minilm.utils.atomic_files import replace_folder
from minilm.utils.errors import iterate_causes

log = logging.getLogger("minilm")

_MANIFEST = "manifest.json"
# XXH3 hashes 14 GB/s in memory, where SHA-256 hashes 1.5 and CRC-32 hashes 4. The checksum therefore takes less time
# than reading the file. It guards against damage, not against attackers.
_ALGORITHM = "xxh3_128"
# In a longer file, minilm checks only blocks at equal distances, which have this many bytes in all. Otherwise a run
# would wait minutes for a slow disk. It always finds a changed size.
_CHECKED_BYTES = 2**34
_BLOCK_BYTES = 2**20


def get_cache_folder() -> Path:
    """Return the folder of the cache, `$HF_HOME/minilm` (default `~/.cache/huggingface/minilm`), and create it.

    Raise CacheError if it cannot be created.
    """
    folder = _home() / "minilm"
    with explain_cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _home() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return Path(os.environ.get("HF_HOME") or os.path.join(caches, "huggingface"))


def open_entry(name: str, build: Callable[[Path], object]) -> Path:
    """Check the files of the cache entry `name` and return its folder. Build the entry first if it does not exist.

    name: must contain a hash of everything that decides the content, because an existing entry is not built again. A
        new format of the files needs a new name.
    build: called with an empty folder, which it fills. It must not write elsewhere. If it raises, the cache stays as it
        was.

    The files are on disk before other processes can see the entry. If several processes build an entry at the same
    time, all use the one that is finished first. A damaged entry is built again, with a warning that names the file. A
    process that has an old file open can still read it. The modes of all files follow the umask, so that several users
    can share a cache. Raise CacheError if the cache cannot be read or written, or if the disk is full.
    """
    folder = get_cache_folder() / name
    damage = _find_damage(folder)
    if damage is None:
        return folder
    if os.path.lexists(folder):
        log.warning(f"the cache is damaged and is built anew: {damage}")
    with (
        explain_cache_errors(folder.parent),
        replace_folder(folder, needed=lambda: _find_damage(folder) is not None) as temporary,
    ):
        build(temporary)
        _write_manifest(temporary, name)
    return folder


def find_entry(name: str) -> Path | None:
    """Return the folder of a cache entry, or None if it does not exist or is damaged."""
    folder = get_cache_folder() / name
    return folder if _find_damage(folder) is None else None


def _write_manifest(folder: Path, name: str) -> None:
    """Write the names, sizes and checksums of the files of an entry."""
    files = {path.relative_to(folder).as_posix(): _measure_file(path) for path in folder.rglob("*") if path.is_file()}
    text = json.dumps({"entry": name, "files": files}, indent=2, sort_keys=True) + "\n"
    (folder / _MANIFEST).write_text(text, encoding="utf-8")


def _measure_file(path: Path) -> dict[str, Any]:
    """Return the size of a file and a checksum of its content (see `_CHECKED_BYTES`)."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        blocks = -(-size // _BLOCK_BYTES)
        checked = min(blocks, _CHECKED_BYTES // _BLOCK_BYTES)
        for number in range(checked):
            # These blocks always include the last one.
            file.seek((number + 1) * blocks // checked * _BLOCK_BYTES - _BLOCK_BYTES)
            digest.update(buffer[: file.readinto(buffer)])
    return {"bytes": size, _ALGORITHM: digest.hexdigest()}


def _find_damage(folder: Path) -> str | None:
    """Return which file of an entry differs from the manifest and how, or None if the entry is undamaged."""
    manifest = folder / _MANIFEST
    try:
        content = json.loads(manifest.read_bytes())
        entry, files = content["entry"], dict(content["files"])
    except PermissionError as error:
        raise _unreadable(folder, error) from error
    except OSError as error:
        return f"{manifest} cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError, RecursionError):
        return f"{manifest} is not a manifest"
    if entry != folder.name:
        return f"{manifest} belongs to another entry, {entry}"
    for name, facts in files.items():
        try:
            if (actual := _measure_file(folder / name)) != facts:
                difference = "size" if actual["bytes"] != facts.get("bytes") else "checksum"
                return f"{folder / name} has a different {difference} from the one in {manifest}"
        except PermissionError as error:
            raise _unreadable(folder, error) from error
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror})"
        except (AttributeError, ValueError):
            return f"{manifest} is not a manifest"
    return None


def _unreadable(folder: Path, error: OSError) -> "CacheError":
    """Return the error for an entry that this user may not read."""
    return CacheError(
        f"the cache entry {folder} cannot be read: {error.strerror}; set HF_HOME to a folder of your own, or ask the "
        "owner of this one for access"
    )


class CacheError(ValueError):
    """The cache cannot be read or written. The message says where it is and what to do."""


@contextmanager
def explain_cache_errors(below: Path | None = None) -> Iterator[None]:
    """Turn an error from writing below a folder, or from a full disk anywhere, into a CacheError.

    below: the folder. If None, only a full disk becomes a CacheError.
    """
    try:
        yield
    except CacheError:
        raise
    except Exception as error:
        # The libraries that write tokenizers and tables raise errors of many types.
        causes = [*iterate_causes(error)]
        numbers = {cause.errno for cause in causes if isinstance(cause, OSError)}
        if numbers & {errno.ENOSPC, errno.EDQUOT} or "No space left on device" in str(error):
            raise CacheError(
                f"the disk is full while the cache {below or _home()} is written: free some space, or set HF_HOME to a "
                "folder on another disk"
            ) from error
        if isinstance(error, OSError) and below is not None and str(error.filename or "").startswith(str(below)):
            why = f"{error.strerror}; set HF_HOME to another folder"
            if isinstance(error, FileNotFoundError):
                why = "it was removed during the run; start again"
            raise CacheError(f"the cache {below} cannot be written: {why}") from error
        raise
