"""Fingerprints of files: what tells whether the files of a source have changed.

A source of up to 1 GiB is hashed as a whole, so that a copy of it has the same fingerprints. A larger one would take
seconds or hours at each start. Of its files, minilm takes the size, the time of change and a hash of some blocks.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from minilm.utils.atomic_files import hash_file
from minilm.utils.cache import open_entry

# A source of more bytes is not hashed as a whole.
_HASHED_BYTES = 2**30
# The number and the size of the blocks of each of its files that are hashed instead. Many files are read at a start.
_BLOCKS, _BLOCK_BYTES = 4, 2**16
# The hash of a whole file of this size is kept in the cache, for other processes and the next run.
_CACHED_BYTES = 2**26
# A file that changed so recently can change again without a new time of change, so its hash is not remembered.
_CLOCK_SECONDS = 2.0
# Files are hashed at the same time, since a network drive answers slowly.
_THREADS = 16


def is_hashed_whole(paths: Sequence[str]) -> bool:
    """Return whether the files of a source are hashed as a whole."""
    return sum(os.stat(path).st_size for path in paths) <= _HASHED_BYTES


def fingerprint_files(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Return a fingerprint of each file of a source, as JSON types. Their names are left out.

    It is the size in bytes and the SHA-256 of the file. If the files have more than 1 GiB in all, it is the size, the
    time of change, and the SHA-256 of four blocks of 64 KiB: the first, the last, and two between them. A copy of such
    a file has another fingerprint unless the copy keeps the time of change. Raise OSError if a file cannot be read.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        return [*pool.map(partial(fingerprint_file, whole=is_hashed_whole(paths)), paths)]


def fingerprint_file(path: str, whole: bool) -> dict[str, Any]:
    """Return the fingerprint of one file of a source. whole: the result of `is_hashed_whole` for the source."""
    stat = os.stat(path)
    # Every write sets the change time of the inode (ctime), and no program can set it back.
    identity = (path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if time.time() - stat.st_ctime > _CLOCK_SECONDS:
        return dict(_recall_hash(whole, *identity))
    return _hash_file(path, whole, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=2**16)
def _recall_hash(
    whole: bool, path: str, device: int, inode: int, size: int, modified_ns: int, changed_ns: int
) -> dict[str, Any]:
    if not whole or size < _CACHED_BYTES:
        return _hash_file(path, whole, size, modified_ns)
    identity = [os.path.abspath(path), device, inode, size, modified_ns, changed_ns]
    key = hashlib.blake2b(json.dumps(identity).encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()

    def write(folder: Path) -> None:
        content = json.dumps(_hash_file(path, whole, size, modified_ns))
        (folder / "fingerprint.json").write_text(content, encoding="utf-8")

    folder = open_entry(f"fingerprint-{key}", write)
    fingerprint: dict[str, Any] = json.loads((folder / "fingerprint.json").read_text("utf-8"))
    return fingerprint


def _hash_file(path: str, whole: bool, size: int, modified_ns: int) -> dict[str, Any]:
    if whole:
        return hash_file(Path(path))
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for number in range(_BLOCKS):
            file.seek(max(0, size - _BLOCK_BYTES) * number // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return {"bytes": size, "modified_ns": modified_ns, "sha256_of_blocks": digest.hexdigest()}
