"""Signals that stop a run: how each process of a job receives them, and the last one that came."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGUSR1 is the notice that SLURM's --signal=USR1@120 gives before it takes the machines away.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# It is a list so that a signal handler can change it. 0 means that no signal came.
_last_signal = [0]


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt(number) inside the block when one of STOP_SIGNALS comes.

    After the block SIGTERM and SIGUSR1 have no effect, since the process is about to end. SIGINT still raises.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _interrupt)
    die_with_parent()
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def restore_default_signals() -> Iterator[None]:
    """Let STOP_SIGNALS kill the process inside the block, where `interrupt_on_signals` would raise.

    Use it around a library call that waits for other processes. Those may never come, and Python does not run signal
    handlers during such a call.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    numbers = [number for number in STOP_SIGNALS if is_main_thread and signal.getsignal(number) is _interrupt]
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    record_signal(number)
    raise KeyboardInterrupt(number)


def record_signal(number: int) -> None:
    """Record a signal that has not ended anything yet, so that `get_last_signal` returns it."""
    _last_signal[0] = number


def get_last_signal() -> int:
    """Return the last signal that raised KeyboardInterrupt or was recorded by `record_signal`; 0 if none came.

    Python drops a KeyboardInterrupt that is raised inside a destructor. This function still returns its signal.
    """
    return _last_signal[0]


@contextmanager
def block_signals() -> Iterator[None]:
    """Delay STOP_SIGNALS until the end of the block. Processes that start inside it never receive them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals_from_others(worker: int = 0) -> None:
    """Ignore STOP_SIGNALS unless the parent process sends them. Pass this function as a DataLoader's `worker_init_fn`.

    Process managers send signals to all processes of a job. If a loader worker ended at once, the last step of the run
    would lack its batches.
    """
    # macOS does not have sigwaitinfo.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=_end_when_parent_asks, name="signals", daemon=True).start()


def _end_when_parent_asks() -> None:
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)


def die_with_parent() -> None:
    """Have Linux send SIGTERM to this process when its launcher dies.

    A launcher that started a single process does not pass signals on to it.
    """
    if sys.platform == "linux" and not os.environ.keys().isdisjoint(
        ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
    ):
        pdeathsig = 1  # PR_SET_PDEATHSIG in sys/prctl.h
        ctypes.CDLL(None).prctl(pdeathsig, signal.SIGTERM)
        if _is_orphan():
            os.kill(os.getpid(), signal.SIGTERM)


def _is_orphan() -> bool:
    """Return whether accelerate's launcher of a single process died before `die_with_parent`.

    The parent is then init. In a container init itself may be the launcher; then both are in one process group.
    torchrun ends its own workers.
    """
    launched_alone = "ACCELERATE_DYNAMO_MODE" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    return launched_alone and os.getppid() == 1 and os.getpgid(1) != os.getpgrp()
