"""Lengths in steps, which a user may give as a share of the run."""


def count_steps(length: float, total: int) -> int:
    """Return a length in steps that is given as a share of `total` if below 1, and as a number of steps otherwise."""
    return int(length) if length >= 1 else round(length * total)
