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
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from minilm.utils.atomic_files import hash_file
from minilm.utils.cache import open_entry

# A source of more bytes is not hashed as a whole.
_HASHED_BYTES = 2**30
# The bytes and the number of the blocks that are hashed instead, for all files together. A block has at most 1 MiB.
_SAMPLED_BYTES, _SAMPLES = 2**26, 64
# A block has at least the bytes that a disk reads at once, and a file has at least its first and its last block.
_LEAST_BLOCK, _LEAST_SAMPLES = 2**12, 2
# The hash of such a file is kept in the cache, so that another process, or the next run, need not hash it again.
_CACHED_BYTES = 2**26
# A file that changed so recently can change again without a new time of change, so its hash is not remembered.
_CLOCK_SECONDS = 2.0
# Files are hashed at the same time, since a network drive answers slowly.
_THREADS = 16


@dataclass(frozen=True)
class Sampling:
    """The blocks of each file of a large source that are hashed: the first, the last, and others between them."""

    count: int
    bytes: int
    """The size of a block."""


def choose_sampling(paths: Sequence[str]) -> Sampling | None:
    """Return which blocks of the files of a source to hash, or None to hash all of them."""
    if sum(os.stat(path).st_size for path in paths) <= _HASHED_BYTES:
        return None
    count = max(_LEAST_SAMPLES, _SAMPLES // len(paths))
    return Sampling(count, max(_LEAST_BLOCK, _SAMPLED_BYTES // max(_SAMPLES, count * len(paths))))


def fingerprint_files(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Return a fingerprint of each file of a source, as JSON types. Their names are left out.

    It is the size in bytes and the SHA-256 of the file. If the files have more than 1 GiB in all, it is the size, the
    time of change, and the SHA-256 of at least two blocks of the file. A copy of such a file has another fingerprint
    unless the copy keeps the time of change. Raise OSError if a file cannot be read.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        return [*pool.map(partial(fingerprint_file, sampling=choose_sampling(paths)), paths)]


def fingerprint_file(path: str, sampling: Sampling | None) -> dict[str, Any]:
    """Return the fingerprint of one file of a source, for which `choose_sampling` chose the blocks."""
    stat = os.stat(path)
    # Every write sets the change time of the inode (ctime), and no program can set it back.
    identity = (path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if time.time() - stat.st_ctime > _CLOCK_SECONDS:
        return dict(_recall_hash(sampling, *identity))
    return _hash_file(path, sampling, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=2**16)
def _recall_hash(
    sampling: Sampling | None, path: str, device: int, inode: int, size: int, modified_ns: int, changed_ns: int
) -> dict[str, Any]:
    if sampling is not None or size < _CACHED_BYTES:
        return _hash_file(path, sampling, size, modified_ns)
    identity = [os.path.abspath(path), device, inode, size, modified_ns, changed_ns]
    key = hashlib.blake2b(json.dumps(identity).encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()

    def write(folder: Path) -> None:
        content = json.dumps(_hash_file(path, sampling, size, modified_ns))
        (folder / "fingerprint.json").write_text(content, encoding="utf-8")

    folder = open_entry(f"fingerprint-{key}", write)
    fingerprint: dict[str, Any] = json.loads((folder / "fingerprint.json").read_text("utf-8"))
    return fingerprint


def _hash_file(path: str, sampling: Sampling | None, size: int, modified_ns: int) -> dict[str, Any]:
    if sampling is None:
        return hash_file(Path(path))
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for number in range(sampling.count):
            file.seek(max(0, size - sampling.bytes) * number // (sampling.count - 1))
            digest.update(file.read(sampling.bytes))
    return {"bytes": size, "modified_ns": modified_ns, "sha256_of_samples": digest.hexdigest()}
