"""Fingerprints of files: files of up to 1 GiB with the same content have the same fingerprint."""

import hashlib
import json
import os
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from minilm.utils.atomic_files import hash_file
from minilm.utils.cache import open_entry

# A file of more bytes is not hashed as a whole, because that would take seconds at each start.
_HASHED_BYTES = 2**30
# Number and size of the blocks that are hashed instead.
_SAMPLES, _SAMPLE_BYTES = 64, 2**20
# The fingerprint of such a file is kept in the cache, so that another process, or the next run, need not hash it again.
_CACHED_BYTES = 2**26
# A file that changed so recently can change again without a new time of change, so its hash is not remembered.
_CLOCK_SECONDS = 2.0


def fingerprint_file(path: str) -> dict[str, Any]:
    """Return the size of a file in bytes and its SHA-256, as JSON types. Its name and times are left out.

    For a file of more than 1 GiB, return its size, its time of change, and the SHA-256 of 64 blocks of 1 MiB: the
    first, the last, and others at equal distances. A copy of such a file has another fingerprint unless the copy keeps
    the time of change.
    """
    stat = os.stat(path)
    # Every write sets the change time of the inode (ctime), and no program can set it back.
    identity = (path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    is_old_enough = time.time() - stat.st_ctime > _CLOCK_SECONDS
    return dict(_recall_hash(*identity) if is_old_enough else _hash_file(path, stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=4096)
def _recall_hash(path: str, device: int, inode: int, size: int, modified_ns: int, changed_ns: int) -> dict[str, Any]:
    if size < _CACHED_BYTES:
        return _hash_file(path, size, modified_ns)
    identity = [os.path.abspath(path), device, inode, size, modified_ns, changed_ns]
    key = hashlib.blake2b(json.dumps(identity).encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()

    def write(folder: Path) -> None:
        (folder / "fingerprint.json").write_text(json.dumps(_hash_file(path, size, modified_ns)), encoding="utf-8")

    folder = open_entry(f"fingerprint-{key}", write)
    fingerprint: dict[str, Any] = json.loads((folder / "fingerprint.json").read_text("utf-8"))
    return fingerprint


def _hash_file(path: str, size: int, modified_ns: int) -> dict[str, Any]:
    if size <= _HASHED_BYTES:
        return hash_file(Path(path))
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for number in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return {"bytes": size, "modified_ns": modified_ns, "sha256_of_samples": digest.hexdigest()}
