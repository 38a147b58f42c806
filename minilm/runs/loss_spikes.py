"""Loss spikes: steps whose loss is far above those before them."""

import re
from collections import deque
from pathlib import Path

import numpy as np

_RECENT, _ENOUGH = 100, 20  # losses that one is compared with, and the fewest that are enough
_FAR = 6  # standard deviations above their mean
_LOSS = re.compile(rb'"loss": (-?\d[^,]*),')  # not where it was no number, nor in a line that a power cut tore


class SpikeDetector:
    """Compares each loss with the last hundred.

    They are read from the `log` of the steps so far, so that a run that was resumed finds what one that never stopped
    would. A spike counts among the losses after it: when the loss has risen to stay, the reports end after a few.
    """

    def __init__(self, log: Path) -> None:
        with log.open("rb") as file:
            found = (match[1] for line in file if (match := _LOSS.search(line)))
            self._recent = deque(map(float, deque(found, _RECENT)), _RECENT)

    def detect(self, loss: float) -> float | None:
        """The mean of the recent losses if this one is a spike. `loss` is that of the next step, and finite."""
        recent = np.array(self._recent)
        self._recent.append(loss)
        if len(recent) < _ENOUGH or loss <= recent.mean() + _FAR * recent.std():
            return None
        return float(recent.mean())
