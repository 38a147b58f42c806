"""The load of the processors by other programs. This file does not import torch."""

import os
import time


class ProcessorLoad:
    """The processors that other programs take, of those on which this process may run, since this object was made."""

    # A shorter time gives no figure: Linux counts in hundredths of a second.
    LEAST_SECONDS = 0.1

    def __init__(self) -> None:
        self._begin = self._read()

    def others(self) -> float:
        """Return the mean number of processors, or 0.0 after less than `LEAST_SECONDS`.

        Processes that this one started count as others until they end.
        """
        seconds, busy, own = (now - before for now, before in zip(self._read(), self._begin, strict=True))
        return max(0.0, busy - own) / seconds if seconds >= self.LEAST_SECONDS else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Return the time, and the processor time of all programs and of this one, in seconds."""
        import psutil  # only a run needs it, and --help does not

        processors = psutil.cpu_times(percpu=True)
        ours = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(processors))
        kinds = ("user", "nice", "system")
        busy = sum(getattr(times, kind, 0.0) for n, times in enumerate(processors) if n in ours for kind in kinds)
        return time.perf_counter(), busy, sum(os.times()[:4])
