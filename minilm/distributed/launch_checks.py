"""Checks of how a job was launched, with the command that works."""

from collections.abc import Mapping

from minilm.utils.launch_variables import count_local_processes

_RIGHT_LAUNCH = (
    "on CPUs type: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N …, "
    "on GPUs: accelerate launch --multi_gpu --num_processes N …"
)


def check_launch(processes: int, environment: Mapping[str, str]) -> None:
    """Raise ValueError for a launch that should start several processes and does not, with the command that works.

    processes: the number of processes that accelerate reads from the environment.
    """
    wanted = int(environment.get("WORLD_SIZE") or 1)
    if wanted != processes:
        raise ValueError(f"the launcher started {wanted} processes but each of them runs alone; {_RIGHT_LAUNCH}")
    # `accelerate launch --cpu --num_processes 2` sets a rendezvous address for the one process that it starts.
    alone = "WORLD_SIZE" not in environment and "ACCELERATE_MIXED_PRECISION" in environment
    if alone and environment.get("MASTER_ADDR") == "127.0.0.1" and "MASTER_PORT" in environment:
        raise ValueError(
            f"accelerate was asked for several processes and started only one; {_RIGHT_LAUNCH}; if you asked for one, "
            "unset MASTER_ADDR, which another program left in the environment"
        )


def check_devices(devices: int, environment: Mapping[str, str]) -> None:
    """Raise ValueError if this machine has more processes than GPUs, since each takes one; `devices` 0 means CPUs."""
    here = count_local_processes(environment)
    if devices and here > devices:
        raise ValueError(
            f"{here} processes were started and there are {devices} GPUs here: "
            f"type accelerate launch --multi_gpu --num_processes {devices} …"
        )
