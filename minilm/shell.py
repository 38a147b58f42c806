"""What a program and the shell that started it ask of each other: words that it reads right, and output without end."""

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
    """Return the line that runs a command of minilm on a model's folder and a text, for any name of the folder."""
    name = str(folder)
    return shlex.join(["minilm", command, f"./{name}" if name.startswith("-") else name, text])


@contextmanager
def outlasting_readers() -> Iterator[None]:
    """Let the program go on inside the block when the reader of stdout or stderr goes away, as `| head` does.

    What it prints from then on is lost. A run writes the same figures to log.jsonl.
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
    """Drop what a library itself writes to stdout: the tokenizers library panics there when no reader is left."""
    try:
        kept = os.dup(1)
    except OSError:  # the program has no stdout
        yield
        return
    _write_to_nothing(1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def reader_is_gone(stream: TextIO) -> bool:
    """Whether nothing reads what is written to a stream any more; what it still holds is then dropped."""
    try:
        number = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:
        _write_to_nothing(number)
    return gone


def _outlasting(stream: Any) -> Any:
    """Return a stream to the same place; the same one where that is not a file of the system's."""
    try:
        number = stream.fileno()
        stream.flush()
    except (AttributeError, OSError, ValueError):
        return stream
    options = {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": True}
    return io.TextIOWrapper(io.BufferedWriter(_Outlasting(number, "wb", closefd=False)), **options)


class _Outlasting(io.FileIO):
    """A file that becomes the null device when its reader goes away."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            _write_to_nothing(self.fileno())  # for libraries that write to the number, too
            return len(data)


def _write_to_nothing(number: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
