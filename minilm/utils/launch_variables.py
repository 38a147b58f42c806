"""The job that this process belongs to, as the environment variables of a launcher describe it. Imports no torch.

Variables may be left over from another program. Unless they describe a whole job, they must neither silence a process
nor make it wait for others.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# A launcher such as torchrun sets all of these, and torch needs all of them to join a job.
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def place_in_job(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Return the rank of this process and the number of processes, or None if the variables do not describe a job."""
    rank, local, processes = (_number(environment.get(name)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    complete = all(environment.get(name) for name in _LAUNCHERS)
    if not complete or rank is None or local is None or processes is None or max(rank, local) >= processes:
        return None
    return rank, processes


def is_main(environment: Mapping[str, str]) -> bool:
    """Return whether this process is the first of its job, or the only one."""
    place = place_in_job(environment)
    return place is None or place[0] == 0


def is_one_of_several(environment: Mapping[str, str]) -> bool:
    """Return whether this process belongs to a job of several processes."""
    place = place_in_job(environment)
    return place is not None and place[1] > 1


def processes_here(environment: Mapping[str, str]) -> int:
    """Return the number of the job's processes on this host, or 1 if it is unknown."""
    here = _number(environment.get("LOCAL_WORLD_SIZE"))
    return max(1, here or 1) if is_one_of_several(environment) else 1


def check_job(environment: Mapping[str, str]) -> None:
    """Raise ValueError for variables that ask for several processes but do not say how these meet."""
    if place_in_job(environment) is not None:
        return
    names = _MPI_SIZES if "WORLD_SIZE" not in environment else ("WORLD_SIZE",)
    for name in names:
        size = environment.get(name) or "1"
        needed = _LAUNCHERS if name == "WORLD_SIZE" else ("MASTER_ADDR",)
        missing = [other for other in needed if not environment.get(other)]
        if size == "1" or (name in _MPI_SIZES and not missing):
            continue
        shown = ", ".join(f"{other}={environment[other]}" for other in ("RANK", "LOCAL_RANK") if other in environment)
        reason = f"{' and '.join(missing)} not set" if missing else f"{shown} does not fit"
        raise ValueError(
            f"the environment has {name}={size} with {reason}, so the processes of a job cannot meet: "
            f"unset {name} to run one process, or start several with accelerate launch or torchrun"
        )


@contextmanager
def leftovers_hidden() -> Iterator[None]:
    """Inside the block, hide ranks that do not belong to a job: accelerate reads each variable without the others."""
    stale = () if place_in_job(os.environ) is not None else _RANKS
    before = {name: os.environ.pop(name) for name in stale if name in os.environ}
    try:
        yield
    finally:
        os.environ |= before


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None
