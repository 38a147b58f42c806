"""What a process does with signals, from its first moment on, and which one of a job tells why it ends."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from minilm.job import is_main, is_one_of_several

# SIGUSR1 is the notice that SLURM's --signal=USR1@120 gives before it takes the machines away.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_heard = [0]


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside it each of SIGNALS raises KeyboardInterrupt(number); after it only SIGINT still does."""
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    die_with_parent()
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # the process is ending already


@contextmanager
def killed_by_signals() -> Iterator[None]:
    """Inside it what `ended_by_signals` would raise kills the process instead.

    For where a library waits for other processes, which may never come, and Python does not get to hear of signals.
    """
    main = threading.current_thread() is threading.main_thread()
    numbers = [number for number in SIGNALS if main and signal.getsignal(number) is _interrupt]
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
    """Have `heard` tell of a signal that has ended nothing yet."""
    _heard[0] = number


def heard() -> int:
    """The last signal that raised KeyboardInterrupt, which Python loses in a destructor, or was remembered; or 0."""
    return _heard[0]


@contextmanager
def hold_back_signals() -> Iterator[None]:
    """Let SIGNALS wait until the end of the block, and for ever in the processes that are started inside it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(worker: int = 0) -> None:
    """Take no notice of SIGNALS, unless the parent process sends them (`worker_init_fn` of a DataLoader).

    Process managers signal all processes of a job. A worker that obeyed would take away the batches of the last step.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_wait_for_parent, name="signals", daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)


def die_with_parent() -> None:
    """Get SIGTERM when the launcher dies: a launcher of one process does not hand signals on (Linux only)."""
    if sys.platform == "linux" and not os.environ.keys().isdisjoint(
        ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
    ):
        pdeathsig = 1  # PR_SET_PDEATHSIG in sys/prctl.h
        ctypes.CDLL(None).prctl(pdeathsig, signal.SIGTERM)
        if _orphaned():
            os.kill(os.getpid(), signal.SIGTERM)


def _orphaned() -> bool:
    """Whether accelerate's launcher of one process died before it could be watched: init is the parent since.

    Where init is the launcher, as in a container, the two are in one process group. (torchrun ends its own workers.)
    """
    alone = "ACCELERATE_DYNAMO_MODE" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    return alone and os.getppid() == 1 and os.getpgid(1) != os.getpgrp()


def first_to_tell() -> bool:
    """Whether no other process of the job on this host has told why it ends; where that is unknown: the main one."""
    if not is_one_of_several(os.environ):
        return True
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        try:
            # In the temporary folder that the launcher has for the processes that it started.
            (Path(error_file).parent.parent / "told").touch(exist_ok=False)
            return True
        except FileExistsError:
            return False
        except OSError:
            return True  # the launcher is gone with its folder, and these are variables that it left behind
    return is_main(os.environ)
