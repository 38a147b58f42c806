"""The energy of a run, from hardware that counts it: GPUs by NVML, the host's processors by RAPL.

A thread reads the counters, so that a step never waits for them.
"""

import contextlib
import importlib
import math
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

# Below a kilowatt, RAPL's smallest counter (65 kJ) takes longer than this to wrap around.
_READ_SECONDS = 60.0
_JOULES_PER_KWH = 3.6e6
GPU_ENERGY, CPU_ENERGY = "energy_kwh_gpus", "energy_kwh_cpus"


class EnergyCounter:
    """The energy, in joules, that has been used since this object was made.

    read: returns the hardware's count in joules, which starts again from 0 after `most`.
    """

    def __init__(self, read: Callable[[], float], most: float = math.inf) -> None:
        self.read, self.most, self.joules, self.last = read, most, 0.0, read()

    def update(self) -> None:
        """Add the energy since the last call. Call it again before the hardware has counted `most` joules more."""
        now = self.read()
        self.joules += now - self.last + (self.most if now < self.last else 0.0)
        self.last = now


def open_rapl_counters(powercap: Path = Path("/sys/class/powercap")) -> list[EnergyCounter]:
    """Return a counter for each processor package. Raise OSError if this user may not read one."""

    def joules(path: Path) -> float:
        return int(path.read_text()) / 1e6

    # The names of the parts of a package, such as its memory, have two colons.
    zones = [zone for zone in powercap.glob("intel-rapl:*") if zone.name.count(":") == 1]
    packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
    return [
        EnergyCounter(partial(joules, zone / "energy_uj"), joules(zone / "max_energy_range_uj")) for zone in packages
    ]


def open_nvml_counter(uuid: str, library: Any = None) -> list[EnergyCounter]:
    """Return the counter of the GPU with this UUID, in a list.

    Raises ImportError if nvidia-ml-py is not installed, and NVML's own errors. library: takes the place of pynvml.
    """
    library = library or importlib.import_module("pynvml")
    library.nvmlInit()
    handle = library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return [EnergyCounter(lambda: library.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)]


@contextlib.contextmanager
def measure_energy(accelerator: Accelerator, since: int) -> Iterator[Callable[[], dict[str, float]]]:
    """Count the energy that is used inside the block, and yield a function that returns the figures.

    Every process calls that function. since: the step of the run at which the block begins. Hardware without a counter
    is left out.
    """
    openers: dict[str, Callable[[], list[EnergyCounter]]] = {}
    if accelerator.is_local_main_process:
        openers[CPU_ENERGY] = open_rapl_counters
    if accelerator.device.type == "cuda":
        openers[GPU_ENERGY] = lambda: open_nvml_counter(str(torch.cuda.get_device_properties(accelerator.device).uuid))
    counters, ended = {kind: list[EnergyCounter]() for kind in openers}, threading.Event()
    for kind, open_counters in openers.items():
        # pynvml may not be installed, so its errors cannot be named here.
        with contextlib.suppress(Exception):
            counters[kind] = open_counters()

    def watch() -> None:
        last = not any(counters.values())
        while not last:
            last = ended.wait(_READ_SECONDS)
            for kind, opened in counters.items():
                try:
                    for counter in opened:
                        counter.update()
                except Exception:
                    counters[kind] = []

    thread = threading.Thread(target=watch, name="energy", daemon=True)
    thread.start()
    try:
        yield lambda: _figures({kind: [c.joules for c in opened] for kind, opened in counters.items()}, since)
    finally:
        ended.set()
        thread.join()


def _figures(joules: dict[str, list[float]], since: int) -> dict[str, float]:
    """Return `energy_kwh` and its parts, summed over all processes.

    A part is left out if a process that should count it could not.
    """
    processes: list[dict[str, list[float]]] = gather_object([joules])
    parts = dict[str, float]()
    for kind in (GPU_ENERGY, CPU_ENERGY):
        counts = [process[kind] for process in processes if kind in process]
        if counts and all(counts):
            parts[kind] = sum(map(sum, counts)) / _JOULES_PER_KWH
    later = {"energy_since_step": since} if since else {}
    return {"energy_kwh": sum(parts.values()), **parts, **later} if parts else {}
