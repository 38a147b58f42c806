"""Files kept between runs, named by what they were made from, and checked whenever they are opened.

An entry of the cache is a folder of files with a manifest of their names, sizes and checksums:

    folder = open_entry(f"ids-{key}", build)   # build(folder) writes the files where the entry is not there
    ids = FlatFile(folder / "ids.npy")

`open_entry` is the only way in. What it returns is whole: a file that was cut, zeroed, changed or taken from another
entry is found, and the entry is built anew.
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

from minilm.disk import replacing

log = logging.getLogger("minilm")

_MANIFEST = "manifest.json"
# XXH3 reads 14 GB/s from memory where SHA-256 reads 1.5 and CRC-32 4, so that the checksum costs less than the first
# read of the file. It guards against damage, not against attackers.
_ALGORITHM = "xxh3_128"
# Of a longer file, blocks of this many bytes in all are read, at even distances: a start would wait minutes for a
# slow disk otherwise. A changed size is always found.
_CHECKED_BYTES = 2**34
_BLOCK_BYTES = 2**20


def cache_folder() -> Path:
    """`$HF_HOME/minilm` (default `~/.cache/huggingface/minilm`), beside the caches of the other libraries.

    Raises CacheError where it cannot be created.
    """
    folder = _home() / "minilm"
    with cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _home() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return Path(os.environ.get("HF_HOME") or os.path.join(caches, "huggingface"))


def open_entry(name: str, build: Callable[[Path], object]) -> Path:
    """Return the folder of the cache entry `name`, every file of it checked. `build(folder)` fills one that is new.

    name: must tell the content, for example `f"ids-{hash of everything that decides the ids}"`, since an entry that is
    there is never built again. A new version of the files needs a new name.
    build: writes any files and folders below the empty folder that it gets, and nothing elsewhere. Where it raises, the
    cache stays as it was.

    The files are on disk before the entry can be seen. Of several processes that build one entry at a time, the first
    to finish wins, and the others take what it built. A damaged entry is built anew, with a warning that names the
    file; a process that has the old files open keeps them. Raises CacheError where the cache cannot be read or written,
    or its disk is full. All entries follow the umask, so that several users can share a cache.
    """
    folder = cache_folder() / name
    damage = _find_damage(folder)
    if damage is None:
        return folder
    if os.path.lexists(folder):
        log.warning(f"the cache is damaged and is built anew: {damage}")
    with cache_errors(folder.parent), replacing(folder, needed=lambda: _find_damage(folder) is not None) as temporary:
        build(temporary)
        _write_manifest(temporary, name)
    return folder


def _write_manifest(folder: Path, name: str) -> None:
    files = {path.relative_to(folder).as_posix(): _facts(path) for path in folder.rglob("*") if path.is_file()}
    text = json.dumps({"entry": name, "files": files}, indent=2, sort_keys=True) + "\n"
    (folder / _MANIFEST).write_text(text, encoding="utf-8")


def _facts(path: Path) -> dict[str, Any]:
    """The size of a file and a checksum of its content (see `_CHECKED_BYTES`)."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        blocks = -(-size // _BLOCK_BYTES)
        taken = min(blocks, _CHECKED_BYTES // _BLOCK_BYTES)
        for number in range(taken):
            # The last block is always among them.
            file.seek((number + 1) * blocks // taken * _BLOCK_BYTES - _BLOCK_BYTES)
            digest.update(buffer[: file.readinto(buffer)])
    return {"bytes": size, _ALGORITHM: digest.hexdigest()}


def _find_damage(folder: Path) -> str | None:
    """Say which file of an entry is not as its manifest says; None where all are."""
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
            if (found := _facts(folder / name)) != facts:
                what = "size" if found["bytes"] != facts.get("bytes") else "checksum"
                return f"{folder / name} has another {what} than {manifest} says"
        except PermissionError as error:
            raise _unreadable(folder, error) from error
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror})"
        except (AttributeError, ValueError):
            return f"{manifest} is not a manifest"
    return None


def _unreadable(folder: Path, error: OSError) -> "CacheError":
    return CacheError(
        f"the cache entry {folder} cannot be read: {error.strerror}; set HF_HOME to a folder of your own, or ask the "
        "owner of this one for access"
    )


class CacheError(ValueError):
    """The cache cannot be read or written; the message says where it is and what to do."""


@contextmanager
def cache_errors(below: Path | None = None) -> Iterator[None]:
    """Make a CacheError of an error at writing below this folder, or of a full disk at writing any cache in HF_HOME."""
    try:
        yield
    except CacheError:
        raise
    except Exception as error:  # the libraries that write tokenizers and tables raise what they like
        causes = [*_causes(error)]
        numbers = {cause.errno for cause in causes if isinstance(cause, OSError)}
        if numbers & {errno.ENOSPC, errno.EDQUOT} or "No space left on device" in str(error):
            raise CacheError(
                f"the disk is full while the cache {below or _home()} is written: free some space, or set HF_HOME to a "
                "folder on another disk"
            ) from error
        if isinstance(error, OSError) and below is not None and str(error.filename or "").startswith(str(below)):
            gone = isinstance(error, FileNotFoundError)
            what = "was removed meanwhile: start again" if gone else f"{error.strerror}; set HF_HOME to another folder"
            raise CacheError(f"the cache {below} cannot be written: {what}") from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
