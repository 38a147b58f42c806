"""The environment variables by which a launcher tells a process its job. This file does not import torch.

Some of these variables may be left over from another program. If they do not describe a complete job, this process
prints its messages as a single process does, and does not wait for others.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# A launcher such as torchrun sets all of these, and torch needs all of them to join a job.
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def read_rank_and_size(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Return the rank of this process and the number of processes, or None if the variables do not describe a job."""
    rank, local, processes = (_parse_number(environment.get(name)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    complete = all(environment.get(name) for name in _LAUNCHERS)
    if not complete or rank is None or local is None or processes is None or max(rank, local) >= processes:
        return None
    return rank, processes


def is_main_process(environment: Mapping[str, str]) -> bool:
    """Return whether this process is the first of its job, or the only one."""
    place = read_rank_and_size(environment)
    return place is None or place[0] == 0


def is_local_main_process(environment: Mapping[str, str]) -> bool:
    """Return whether this process is the first of its job on this host, or the only one."""
    return read_rank_and_size(environment) is None or _parse_number(environment.get("LOCAL_RANK")) == 0


def is_distributed(environment: Mapping[str, str]) -> bool:
    """Return whether this process belongs to a job of several processes."""
    place = read_rank_and_size(environment)
    return place is not None and place[1] > 1


def count_local_processes(environment: Mapping[str, str]) -> int:
    """Return the number of processes of the job on this host, or 1 if it is unknown."""
    here = _parse_number(environment.get("LOCAL_WORLD_SIZE"))
    return max(1, here or 1) if is_distributed(environment) else 1


def check_launch_variables(environment: Mapping[str, str]) -> None:
    """Raise ValueError if the variables ask for several processes but do not say how these find each other."""
    if read_rank_and_size(environment) is not None:
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
def hide_leftover_ranks() -> Iterator[None]:
    """Remove rank variables that do not belong to a job from the environment inside the block.

    accelerate would otherwise use each of them alone.
    """
    leftovers = () if read_rank_and_size(os.environ) is not None else _RANKS
    before = {name: os.environ.pop(name) for name in leftovers if name in os.environ}
    try:
        yield
    finally:
        os.environ |= before


def claim_error_report() -> bool:
    """Return True in one process of the job on this host, which then prints why the job ends.

    With torchrun it is the first process that calls this function, and with other launchers the main process.
    """
    if not is_distributed(os.environ):
        return True
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        try:
            # torchrun makes one temporary folder for all processes that it starts on a host.
            (Path(error_file).parent.parent / "told").touch(exist_ok=False)
            return True
        except FileExistsError:
            return False
        except OSError:
            # The folder does not exist, so the variable was left behind by a launcher that has ended.
            return True
    return is_main_process(os.environ)


def _parse_number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None
