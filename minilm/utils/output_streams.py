"""stdout and stderr: continue after their reader has gone, as with `| head`, and drop what native code writes."""

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


@contextmanager
def survive_closed_output() -> Iterator[None]:
    """Let the program continue inside the block after the reader of stdout or stderr has gone, as with `| head`.

    Later output is lost. The figures of a run are also in its log.jsonl.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_make_surviving(stream) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


@contextmanager
def silence_stdout() -> Iterator[None]:
    """Drop what native code writes to stdout in the block.

    The tokenizers library prints there, and panics if stdout has no reader.
    """
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


def discard_unread_output(stream: TextIO) -> bool:
    """Return whether the reader of a stream has gone. If so, drop what the stream still holds."""
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


def _make_surviving(stream: Any) -> Any:
    """Return a stream to the same file that survives the loss of its reader.

    A stream without a file descriptor is returned as it is.
    """
    try:
        number = stream.fileno()
        stream.flush()
    except (AttributeError, OSError, ValueError):
        return stream
    options = {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": True}
    return io.TextIOWrapper(io.BufferedWriter(_SurvivingFile(number, "wb", closefd=False)), **options)


class _SurvivingFile(io.FileIO):
    """A file whose descriptor leads to the null device once its reader has gone."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            # Some libraries write to the descriptor itself, so it is redirected and not only this object.
            _redirect_to_null(self.fileno())
            return len(data)


def _redirect_to_null(number: int) -> None:
    """Make a file descriptor refer to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
