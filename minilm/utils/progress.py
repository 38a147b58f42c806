"""What libraries print during a run: progress bars, and the bars and warnings of transformers."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm


def show_progress(*iterable: Any, **options: Any) -> Any:
    """Return a tqdm bar that writes to stderr. It takes the arguments of tqdm.

    On a terminal it redraws ten times a second. In a file or a pipe it writes a line every 30 seconds at most.
    """
    terminal = sys.stderr.isatty()
    return tqdm(*iterable, dynamic_ncols=terminal, mininterval=0.1 if terminal else 30.0, **options)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off the progress bars and warnings of transformers in the block. minilm itself prints what matters."""
    # transformers imports slowly, and some commands never need it.
    from transformers.utils import logging

    level, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()
