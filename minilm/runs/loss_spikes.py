"""Loss spikes: steps whose loss is far above the losses before them."""

import re
from collections import deque
from pathlib import Path

import numpy as np

_RECENT_LOSSES = 100  # a loss is compared with this many before it
_FEWEST_LOSSES = 20  # with fewer than this, no loss counts as a spike
_SPIKE_DEVIATIONS = 6  # a spike is this many standard deviations above the mean
# The pattern does not match a loss that was not finite, or one that was cut off, by a power cut for example.
_LOSS = re.compile(rb'"loss": (-?\d[^,]*),')


class SpikeDetector:
    """Compares each loss with the last hundred.

    log: the log.jsonl of the run. It holds the earlier losses, so a resumed run finds the same spikes as a run without
    an interruption. Later losses are compared with spikes too. So if the loss stays high, only the first few steps
    count as spikes.
    """

    def __init__(self, log: Path) -> None:
        with log.open("rb") as file:
            losses = (match[1] for line in file if (match := _LOSS.search(line)))
            self._recent = deque(map(float, deque(losses, _RECENT_LOSSES)), _RECENT_LOSSES)

    def detect(self, loss: float) -> float | None:
        """Return the mean of the recent losses if `loss`, the finite loss of the next step, is a spike; else None."""
        recent = np.array(self._recent)
        self._recent.append(loss)
        if len(recent) < _FEWEST_LOSSES or loss <= recent.mean() + _SPIKE_DEVIATIONS * recent.std():
            return None
        return float(recent.mean())
