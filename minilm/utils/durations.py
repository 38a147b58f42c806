"""Durations in words."""


def format_duration(seconds: float) -> str:
    """Return a number of seconds in the unit that suits it, such as `3.2 s`, `41 s`, `12.0 min` or `2.5 h`."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
