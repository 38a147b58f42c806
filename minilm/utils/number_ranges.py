"""Lists of numbers as text: "3,17,40-45"."""

import re
from collections.abc import Iterable
from itertools import pairwise

from minilm.utils.validation import check


def parse_ranges(text: str) -> list[range]:
    """Return the numbers of a text such as "3,17,40-45" as ranges in their order, none of which touch.

    Raise ValueError if the text is not such a list.
    """
    parts = [part.strip() for part in text.split(",")]
    matches = [re.fullmatch(r"(\d+)(?:-(\d+))?", part, re.ASCII) for part in parts]
    bounds = [(int(match[1]), int(match[2] or match[1])) for match in matches if match is not None]
    readable = len(bounds) == len(parts) and all(first <= last for first, last in bounds)
    check(readable, f"{text[:80]!r} is not a list of numbers and ranges such as 3,17,40-45")
    merged = list[range]()
    for first, last in sorted(bounds):
        if merged and first <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, last + 1))
        else:
            merged.append(range(first, last + 1))
    return merged


def format_ranges(numbers: Iterable[int]) -> str:
    """Return the shortest text that `parse_ranges` reads as these numbers. There must be one."""
    ordered = sorted(set(numbers))
    gaps = [at for at, (before, after) in enumerate(pairwise(ordered), start=1) if after > before + 1]
    parts = [ordered[start:stop] for start, stop in pairwise([0, *gaps, len(ordered)])]
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
