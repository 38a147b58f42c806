"""The shell around the program: commands quoted for it, and output whose reader goes away."""

import io
import os
import select
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO


def shell_line(command: str, folder: Path, text: str) -> str:
    """Return a line for the shell that runs a command of minilm on a model's folder and a text, quoted as needed."""
    name = str(folder)
    return shlex.join(["minilm", command, f"./{name}" if name.startswith("-") else name, text])


@contextmanager
def outlasting_readers() -> Iterator[None]:
    """Let the program go on inside the block if the reader of stdout or stderr goes away, as `| head` does.

    Later output is lost. A run also writes its figures to log.jsonl.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_outlasting(stream) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


@contextmanager
def silent_stdout() -> Iterator[None]:
    """Drop what native code writes to stdout. The tokenizers library panics if stdout does not have a reader."""
    try:
        kept = os.dup(1)
    except OSError:  # the program has no stdout
        yield
        return
    _redirect_to_null(1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def reader_is_gone(stream: TextIO) -> bool:
    """Return whether the reader of a stream is gone. If so, drop what the stream still holds."""
    try:
        number = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:
        _redirect_to_null(number)
    return gone


def _outlasting(stream: Any) -> Any:
    """Return a stream to the same file that survives its reader; the stream itself if it does not have a file."""
    try:
        number = stream.fileno()
        stream.flush()
    except (AttributeError, OSError, ValueError):
        return stream
    options = {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": True}
    return io.TextIOWrapper(io.BufferedWriter(_Outlasting(number, "wb", closefd=False)), **options)


class _Outlasting(io.FileIO):
    """A file that is replaced by the null device when its reader goes away."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            _redirect_to_null(self.fileno())  # libraries that write to the descriptor need it too
            return len(data)


def _redirect_to_null(number: int) -> None:
    """Make a file descriptor refer to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
