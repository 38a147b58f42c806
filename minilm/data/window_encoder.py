"""Encode a window of a stream in a process of its own, while its parent trains: `StreamWindows.encode_ahead` starts it.

An error is not reported: the process that needs the window encodes it again, and raises the error itself.
"""

import os
import pickle
import sys
from contextlib import suppress

from minilm.data.stream_windows import EncodingCancelledError, StreamWindows

# The training process comes first.
_NICENESS = 10


def encode_from_input() -> None:
    """Encode the window that the standard input names."""
    windows, number, parent = pickle.load(sys.stdin.buffer)
    assert isinstance(windows, StreamWindows)
    os.nice(_NICENESS)
    with suppress(EncodingCancelledError, ValueError):
        windows.encode(number, lambda: os.getppid() != parent)


if __name__ == "__main__":
    encode_from_input()
