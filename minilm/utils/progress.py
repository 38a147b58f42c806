"""What libraries print during a run: progress bars, and the bars and warnings of transformers."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from minilm.utils.quantities import format_duration, format_rate

# The time between two lines is at least the first number, and at most the second. Between them it is this share of the
# time so far, so that a run of an hour writes about 80 lines.
_SHORTEST_GAP_SECONDS, _LONGEST_GAP_SECONDS = 10.0, 600.0
_GAP_SHARE = 1 / 20


def show_progress(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """Return the progress of some work on stderr. It takes the arguments of tqdm that `ProgressLines` has.

    On a terminal and in a notebook it is a tqdm bar. In a file or a pipe it is `ProgressLines`.
    """
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        return tqdm(iterable, dynamic_ncols=True, **options)
    return ProgressLines(iterable, **options)


class ProgressLines:
    """Progress as plain lines, with the methods of tqdm that minilm uses.

    A line follows the one before after 10 seconds, and later after a twentieth of the time so far, at most 10 minutes.

    desc: what is done, at the start of each line. unit: what is counted, in the singular.
    leave: also write a line at the start and at the end. Without it, work that ends soon writes nothing.
    disable: write no line.
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        *,
        total: int | None = None,
        initial: int = 0,
        desc: str = "",
        unit: str = "item",
        leave: bool = True,
        disable: bool = False,
        smoothing: float = 0.0,
    ) -> None:
        self._iterable = () if iterable is None else iterable
        self._total = len(iterable) if total is None and hasattr(iterable, "__len__") else total  # type: ignore[arg-type]
        self._count = self._first = self._shown = initial
        self._name, self._unit, self._leave, self._silent = desc, unit, leave, disable
        self._figures = ""
        self._start = self._shown_time = time.monotonic()
        self._closed = False
        if leave:
            self._show(self._start)

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._iterable:
                yield item
                self.update()

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def set_postfix_str(self, figures: str, refresh: bool = True) -> None:
        """Set the figures of the following lines."""
        self._figures = figures

    def update(self, count: int = 1) -> None:
        """Count work as done, and write a line if the last one is old enough."""
        self._count += count
        now = time.monotonic()
        gap = min(_LONGEST_GAP_SECONDS, max(_SHORTEST_GAP_SECONDS, _GAP_SHARE * (now - self._start)))
        if now - self._shown_time >= gap:
            self._show(now)

    def close(self) -> None:
        """Write the last line."""
        if not self._closed and self._leave and self._count > self._shown:
            self._show(time.monotonic())
        self._closed = True

    def write(self, text: str) -> None:
        """Print a text on stdout."""
        if not self._silent:
            print(text, flush=True)

    def _show(self, now: float) -> None:
        parts = [self._figures] if self._figures else []
        new, seconds = self._count - self._shown, now - self._shown_time
        if new and seconds:
            parts.append(format_rate(new / seconds, f"{self._unit}s"))
        done = self._count - self._first
        if done and self._total is not None:
            # Evaluations and checkpoints so far count, as they will in the rest of the time.
            left = (now - self._start) / done * (self._total - self._count)
            parts.append(f"{format_duration(left)} left" if left else f"done in {format_duration(now - self._start)}")
        self._shown, self._shown_time = self._count, now
        if not self._silent:
            whole = "" if self._total is None else f"/{self._total:,}"
            name = f"{self._name}: " if self._name else f"{self._unit} "
            figures = f"{': ' if not self._name else ', '}{', '.join(parts)}" if parts else ""
            print(f"{name}{self._count:,}{whole}{figures}", file=sys.stderr, flush=True)


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
