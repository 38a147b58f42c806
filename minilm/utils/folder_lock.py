"""A lock that keeps two runs from using an output folder at the same time.

The main process of a run holds a lock (`flock`) on the file `.lock` in the folder. The operating system releases the
lock when the process ends for any reason, so a killed run can be resumed at once. A run that ends normally removes the
file. A killed run leaves it behind, where it does not block other runs.

Hosts that share the folder see each other's locks if the file system passes them on: NFS 4, NFS 3 with its lock
service, Lustre mounted with `flock`, CephFS and GPFS do. NFS mounted with `nolock` or `local_lock=flock`, and Lustre
mounted with `localflock`, separate only the runs of one host. If the file system has no locks, a warning says so.
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
# A killed process keeps its locks until its last thread has ended, so a new run tries again for this long.
_PATIENCE_SECONDS = 2.0
# The folders that this process has locked, each with the descriptor of the lock's file.
_held: dict[Path, int] = {}


def lock_folder(folder: Path) -> None:
    """Lock an existing folder against other processes, until the surrounding `unlock_at_end` ends.

    Raise ValueError if another process has locked it, and OSError if the lock's file cannot be written.
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
            log.warning(
                f"{folder} cannot be locked ({error.strerror}): do not start a second run in it before this one ends"
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        # The run that held the lock has ended and removed this file. Try again with a new file.
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
    _held[folder.resolve()] = descriptor


def is_locked(folder: Path) -> bool:
    """Return whether a process holds the lock of the folder. False also means that the file system has no locks."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _read_holder(descriptor: int) -> str:
    """Return the process that wrote the lock's file, in parentheses; empty if the file does not name one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f" (process {int(holder['pid'])} on {str(holder['host'])[:100]!r})"
    return ""


@contextmanager
def unlock_at_end() -> Iterator[None]:
    """At the end of the block, also after an error, unlock the folders that were locked inside it."""
    before = set(_held)
    try:
        yield
    finally:
        for folder in set(_held) - before:
            unlock_folder(folder)


def unlock_folder(folder: Path) -> None:
    """Unlock a folder if this process has locked it."""
    descriptor = _held.pop(folder.resolve(), None)
    if descriptor is not None:
        # The file must go before the lock is released, because afterwards it may belong to another run.
        with suppress(OSError):
            (folder / LOCK).unlink()
        os.close(descriptor)


def _unlock_all() -> None:
    for folder in list(_held):
        unlock_folder(folder)


def _drop_inherited_locks() -> None:
    """Close the locks in a forked process. Otherwise a loader worker would hold them after its run was killed."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


atexit.register(_unlock_all)
os.register_at_fork(after_in_child=_drop_inherited_locks)
