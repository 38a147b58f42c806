"""The share of a stream that is held out for evaluation. A hash of its text decides for each document alone.

So the share stays the same when documents are added to the source or move within it, and equal texts are on one side.
"""

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray


def hash_texts(texts: Sequence[str]) -> NDArray[np.uint64]:
    """Return a hash of each text, uint64. It is the same on all machines."""
    return np.array([xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) for text in texts], np.uint64)


def is_held_out(hashes: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Return for each hash whether its text is held out, if the share `fraction` of all texts is."""
    # The top 53 bits of a hash are a float64 in [0, 1) without rounding.
    held: NDArray[np.bool_] = (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53 < fraction
    return held
