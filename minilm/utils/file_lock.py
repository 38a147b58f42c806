"""A lock on a file (`flock`), which one process holds at a time. The operating system releases it when a process ends.

Hosts that share the file see each other's locks if the file system passes them on (`minilm.utils.folder_lock`).
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def lock_file(path: Path, *, wait: bool) -> Iterator[int | None]:
    """Hold a lock in the block, and yield its descriptor. The file is created if it is not there.

    A process that inherits the descriptor holds the lock too. On a file system without locks, any number of processes
    get a descriptor.

    wait: whether to wait for a process that holds the lock. If not, yield None.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        held: int | None = descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = None
        except OSError:
            pass
        yield held
    finally:
        os.close(descriptor)
