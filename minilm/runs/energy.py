"""Energy of a run where hardware counts it: GPUs by NVML, a host's processors by RAPL. No device is waited for."""

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

_OFTEN = 60.0  # seconds; RAPL's smallest counter, 65 kJ, then goes round at most once below a kilowatt
GPU_ENERGY, CPU_ENERGY = "energy_kwh_gpus", "energy_kwh_cpus"


class EnergyCounter:
    """Joules that `read` has counted since this was made; it begins again at 0 after `most`."""

    def __init__(self, read: Callable[[], float], most: float = math.inf) -> None:
        self.read, self.most, self.joules, self.last = read, most, 0.0, read()

    def update(self) -> None:
        """Count on; to be called at least once a round of the counter."""
        now = self.read()
        self.joules += now - self.last + (self.most if now < self.last else 0.0)
        self.last = now


def open_rapl_counters(powercap: Path = Path("/sys/class/powercap")) -> list[EnergyCounter]:
    """A counter for each processor package; OSError for one that this user must not read."""

    def joules(path: Path) -> float:
        return int(path.read_text()) / 1e6

    zones = [zone for zone in powercap.glob("intel-rapl:*") if zone.name.count(":") == 1]  # a package's parts have two
    packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
    return [
        EnergyCounter(partial(joules, zone / "energy_uj"), joules(zone / "max_energy_range_uj")) for zone in packages
    ]


def open_nvml_counter(uuid: str, library: Any = None) -> list[EnergyCounter]:
    """The counter of the GPU of this UUID. Raises what NVML does, or ImportError without nvidia-ml-py."""
    library = library or importlib.import_module("pynvml")
    library.nvmlInit()
    handle = library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return [EnergyCounter(lambda: library.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)]


@contextlib.contextmanager
def measure_energy(accelerator: Accelerator, since: int) -> Iterator[Callable[[], dict[str, float]]]:
    """Counts energy inside it, since that step of the run; gives what tells the figures, which all processes call."""
    finds: dict[str, Callable[[], list[EnergyCounter]]] = (
        {CPU_ENERGY: open_rapl_counters} if accelerator.is_local_main_process else {}
    )
    if accelerator.device.type == "cuda":
        finds[GPU_ENERGY] = lambda: open_nvml_counter(str(torch.cuda.get_device_properties(accelerator.device).uuid))
    counters, ended = {kind: list[EnergyCounter]() for kind in finds}, threading.Event()
    for kind, find in finds.items():
        with contextlib.suppress(Exception):  # NVML's have no base of their own
            counters[kind] = find()

    def watch() -> None:
        last = not any(counters.values())
        while not last:
            last = ended.wait(_OFTEN)
            for kind, known in counters.items():
                try:
                    for counter in known:
                        counter.update()
                except Exception:
                    counters[kind] = []

    (thread := threading.Thread(target=watch, name="energy", daemon=True)).start()
    try:
        yield lambda: _figures({kind: [c.joules for c in known] for kind, known in counters.items()}, since)
    finally:
        ended.set()
        thread.join()


def _figures(joules: dict[str, list[float]], since: int) -> dict[str, float]:
    """`energy_kwh` and its parts over all processes; nothing of a kind that one of them should know and does not."""
    everyone, found = gather_object([joules]), dict[str, float]()
    for kind in (GPU_ENERGY, CPU_ENERGY):
        if (parts := [part[kind] for part in everyone if kind in part]) and all(parts):
            found[kind] = sum(map(sum, parts)) / 3.6e6
    later = {"energy_since_step": since} if since else {}
    return {"energy_kwh": sum(found.values()), **found, **later} if found else {}
