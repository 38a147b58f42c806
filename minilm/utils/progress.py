"""Progress bars that suit where they are shown."""

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(*iterable: Any, **options: Any) -> Any:
    """A tqdm bar on stderr; where that is a file or a pipe, a line now and then instead of ten a second."""
    terminal = sys.stderr.isatty()
    return tqdm(*iterable, dynamic_ncols=terminal, mininterval=0.1 if terminal else 30.0, **options)
