"""Quantities as people write them: 2 min 5 s, 1.2 GB, 36%, 26 steps/s. Reports, plans and progress lines use them."""

import math


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units: `0.4 s`, `12 s`, `2 min 5 s`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, smaller, part in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size:,} {unit}" + (f" {rest} {part}" if rest else "")
    return f"{whole} s"


def format_rate(rate: float, unit: str) -> str:
    """Return a number of things in a second: `26 steps/s`, `0.84 steps/s`, `18,012 tokens/s`."""
    return f"{format_amount(rate)} {unit}/s"


def format_share(share: float) -> str:
    """Return a number between 0 and 1 in percent: `36%`, `8.2%`, `0.05%`."""
    return f"{format_amount(100 * share)}%"


def format_amount(value: float) -> str:
    """Return a number with two significant digits or more, and no decimal part from 10 on: `0.84`, `8.2`, `1,234`."""
    if value == 0:
        return "0"
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}" if digits < 6 else f"{value:.2g}"
