"""Signals of a process from its start to its end, and the choice of the process that prints why a job ends."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from minilm.utils.launch_variables import is_main, is_one_of_several

# SIGUSR1 is the notice that SLURM's --signal=USR1@120 gives before it takes the machines away.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# The last signal, in a list so that a signal handler can set it.
_heard = [0]


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have each of SIGNALS raise KeyboardInterrupt(number) inside the block; afterwards only SIGINT still does."""
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    die_with_parent()
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            # The process is already ending.
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def killed_by_signals() -> Iterator[None]:
    """Have each of SIGNALS kill the process inside the block, where `ended_by_signals` would raise.

    Use it around a library's wait for other processes. They may never come, and Python does not run signal handlers
    during the wait.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    numbers = [number for number in SIGNALS if is_main_thread and signal.getsignal(number) is _interrupt]
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    remember(number)
    raise KeyboardInterrupt(number)


def remember(number: int) -> None:
    """Record a signal that did not end anything yet, for `heard`."""
    _heard[0] = number


def heard() -> int:
    """Return the last signal that raised KeyboardInterrupt or was recorded by `remember`, or 0 without one.

    Python drops a KeyboardInterrupt that is raised in a destructor. The signal is then known only here.
    """
    return _heard[0]


@contextmanager
def hold_back_signals() -> Iterator[None]:
    """Hold SIGNALS back until the end of the block. Processes that start inside it never get them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(worker: int = 0) -> None:
    """Ignore SIGNALS unless the parent process sends them. This is the `worker_init_fn` of a DataLoader.

    Process managers signal all processes of a job. If a worker obeyed, the last step would lack its batches.
    """
    # macOS does not have sigwaitinfo.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_wait_for_parent, name="signals", daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)


def die_with_parent() -> None:
    """Ask Linux for SIGTERM when the launcher dies, since a launcher of one process does not pass signals on."""
    if sys.platform == "linux" and not os.environ.keys().isdisjoint(
        ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
    ):
        pdeathsig = 1  # PR_SET_PDEATHSIG in sys/prctl.h
        ctypes.CDLL(None).prctl(pdeathsig, signal.SIGTERM)
        if _orphaned():
            os.kill(os.getpid(), signal.SIGTERM)


def _orphaned() -> bool:
    """Return whether accelerate's launcher of one process died before `die_with_parent`, so that init is the parent.

    If init itself is the launcher, as in a container, both are in one process group. torchrun ends its own workers.
    """
    launched_alone = "ACCELERATE_DYNAMO_MODE" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    return launched_alone and os.getppid() == 1 and os.getpgid(1) != os.getpgrp()


def first_to_tell() -> bool:
    """Return whether this process is the first of its job on this host to call this, and so prints why the job ends.

    Without torchrun's folder for error files, it is the main process.
    """
    if not is_one_of_several(os.environ):
        return True
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        try:
            # The launcher has one temporary folder for all processes that it started.
            (Path(error_file).parent.parent / "told").touch(exist_ok=False)
            return True
        except FileExistsError:
            return False
        except OSError:
            # The folder is gone, so the variable was left behind by a launcher that has ended.
            return True
    return is_main(os.environ)
