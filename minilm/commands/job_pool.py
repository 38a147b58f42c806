"""A pool of processes on this machine that call functions side by side. This file does not import torch.

A process makes many calls, so that it imports its libraries once. It ends with the process that started it, even if
that one is killed: a run of `minilm.train` then saves a checkpoint first.
"""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from minilm.utils.errors import TrainingStopped

Argument = TypeVar("Argument")
Result = TypeVar("Result")

# Seconds in which a process that was asked to end must have saved its checkpoint.
_PATIENCE_SECONDS = 120.0


class JobPool:
    """A context with processes that make calls side by side.

    jobs: the number of processes. They start when they are needed.
    threads: the number of OpenMP's threads in each.
    devices: the numbers of the GPUs, which the processes take in turn; empty on a machine without GPU.
    """

    def __init__(self, jobs: int, threads: int, devices: Sequence[str] = ()) -> None:
        self.jobs, self._threads, self._devices = jobs, threads, devices
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[Connection, SpawnProcess] = {}

    def __enter__(self) -> "JobPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes. After an error, a call that still runs gets SIGTERM, after which a run saves itself."""
        for connection, process in self._processes.items():
            if error is not None:
                process.terminate()
            connection.close()
        for process in self._processes.values():
            process.join(_PATIENCE_SECONDS)
            if process.is_alive():
                process.kill()

    def call(
        self, function: Callable[[Argument], Result], arguments: Sequence[Argument]
    ) -> Iterator[tuple[Argument, Result]]:
        """Call the function with each argument, and yield (argument, result) as the calls end.

        function: a function of a module; it is called in another process. Arguments and results must be picklable.

        Raise the ValueError, OSError or TrainingStopped of a call, RuntimeError with the traceback for another
        exception, and OSError if a process was killed.
        """
        waiting, running = deque(arguments), dict[Connection, Argument]()
        while waiting or running:
            while waiting and len(running) < self.jobs:
                connection = next((each for each in self._processes if each not in running), None) or self._start()
                running[connection] = waiting.popleft()
                connection.send((function, running[connection]))
            ready = wait([*running])
            for connection in [each for each in running if each in ready]:
                yield running[connection], self._receive(connection)
                del running[connection]

    def _start(self) -> Connection:
        ours, theirs = self._context.Pipe()
        device = self._devices[len(self._processes) % len(self._devices)] if self._devices else None
        process = self._context.Process(target=_serve, args=(theirs, device))
        # The libraries of OpenMP read this variable once, when they are loaded.
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(self._threads)
        try:
            process.start()
        finally:
            del os.environ["OMP_NUM_THREADS"]
            if before is not None:
                os.environ["OMP_NUM_THREADS"] = before
        theirs.close()
        self._processes[ours] = process
        return ours

    def _receive(self, connection: Connection) -> Any:
        """Return the result of a call, or raise its exception."""
        try:
            kind, content = connection.recv()
        except (EOFError, ConnectionError):
            process = self._processes[connection]
            process.join(_PATIENCE_SECONDS)
            code = process.exitcode or 0
            name = signal.Signals(-code).name if code < 0 else f"status {code}"
            hint = ": perhaps the memory was full; pass fewer --jobs" if name == "SIGKILL" else ""
            raise OSError(f"the process of a run ended by {name}{hint}") from None
        if kind == "result":
            return content
        raise TrainingStopped(*content) if kind == "stopped" else content


def _serve(connection: Connection, device: str | None) -> None:
    """Make the calls that arrive, until the process that sends them ends."""
    # The terminal sends ctrl-C to a whole process group. Only the process that started this one shall react to it.
    os.setpgid(0, 0)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    # A bar that ends late, after the block of its call, shall not write into the terminal.
    with write_output_to(Path(os.devnull)), suppress(EOFError, BrokenPipeError):
        while True:
            function, argument = connection.recv()
            connection.send(_call(function, argument))


def _call(function: Callable[[Any], Any], argument: Any) -> tuple[str, Any]:
    """Return ("result", the result) or ("error", the exception)."""
    try:
        return "result", function(argument)
    except TrainingStopped as stopped:
        # Python cannot send this error to another process, since its constructor takes two arguments.
        return "stopped", (str(stopped), stopped.status)
    except (ValueError, OSError) as error:
        return "error", (ValueError if isinstance(error, ValueError) else OSError)(str(error))
    except Exception:
        return "error", RuntimeError(f"\n{traceback.format_exc()}")


def _end_with_parent() -> None:
    """Wait until the process that started this one has ended, and then end this one as SIGTERM does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def write_output_to(path: Path) -> Iterator[None]:
    """Append what the process prints in the block, also from libraries in C, to a file."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = [(descriptor, os.dup(descriptor)) for descriptor in (1, 2)]
    with path.open("ab") as file:
        for descriptor, _ in kept:
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for descriptor, copy in kept:
            os.dup2(copy, descriptor)
            os.close(copy)
