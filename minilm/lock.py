"""One run in an output folder at a time.

The run's main process holds a lock of the system on the file `.lock` in the folder. The system releases it when the
process ends in any way, so that a run can be resumed at once after it was killed. A run that ends by itself removes the
file; one that was killed leaves it, and it then means nothing.

Hosts that share the folder see each other's locks where the file system hands them on: NFS 4, NFS 3 with its lock
service, Lustre mounted with `flock`, CephFS and GPFS do. NFS mounted with `nolock` or `local_lock=flock`, and Lustre
mounted with `localflock`, keep runs of one host apart only. Where there are no locks at all, a warning says so.
"""

import atexit
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger("minilm")

LOCK = ".lock"
_PATIENCE_SECONDS = 2.0  # a process that was killed keeps its locks until the last of its threads is gone
_held: dict[Path, int] = {}  # the descriptor of the file in each folder that this process has locked


def lock_folder(folder: Path) -> None:
    """Keep the runs of other processes out of a folder that is there, until the surrounding `unlocked_at_end` ends.

    Raises ValueError where another process has it, and OSError where the file cannot be written.
    """
    if folder.resolve() in _held:
        return
    path, end = folder / LOCK, time.monotonic() + _PATIENCE_SECONDS
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_holder(descriptor)
            os.close(descriptor)
            if time.monotonic() < end:
                time.sleep(0.02)
                continue
            raise ValueError(
                f"run.output_dir {folder} is in use by another run{holder}: wait for its end, stop it, or choose "
                "another folder"
            ) from None
        except OSError as error:
            log.warning(f"{folder} takes no locks ({error.strerror}): do not start a second run in it before this ends")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # of a run that has ended since and removed its file
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
    _held[folder.resolve()] = descriptor


def _read_holder(descriptor: int) -> str:
    """Say which process wrote the lock's file, where the file tells."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(os.pread(descriptor, 1000, 0))
        return f" (process {int(found['pid'])} on {str(found['host'])[:100]!r})"
    return ""


@contextmanager
def unlocked_at_end() -> Iterator[None]:
    """Around a run: the folders that it locks are free again when it is over, however it ends."""
    before = set(_held)
    try:
        yield
    finally:
        for folder in set(_held) - before:
            unlock_folder(folder)


def unlock_folder(folder: Path) -> None:
    """Let other processes have the folder, if this one has it."""
    descriptor = _held.pop(folder.resolve(), None)
    if descriptor is not None:
        # While the lock is still held: afterwards the file may be that of another run.
        with suppress(OSError):
            (folder / LOCK).unlink()
        os.close(descriptor)


def _unlock_all() -> None:
    for folder in list(_held):
        unlock_folder(folder)


def _forget() -> None:
    """A forked process, such as a loader worker that outlives a killed run, has no part in the locks."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


atexit.register(_unlock_all)
os.register_at_fork(after_in_child=_forget)
