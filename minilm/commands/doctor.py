"""`minilm doctor`: the hardware and versions of this machine, what a run would choose, and what to fix first."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from torch.multiprocessing.spawn import spawn

from minilm.distributed.hardware import advise_threads, describe, measure_memory, usable_processors
from minilm.distributed.precision import choose_precision, device_peak
from minilm.utils.cache import CacheError, get_cache_folder
from minilm.utils.processor_load import ProcessorLoad

# Seconds within which two processes must connect. An idle machine needs a few.
_TIMEOUT_SECONDS = 120.0
# Number of processes that connect in the check.
_PROCESSES = 2
# Bytes of memory or disk below which the small recipes do not fit.
_LOW_BYTES = 2e9
# Optional packages, and what needs them.
_EXTRAS = {"peft": "LoRA", "matplotlib": "report --png"}
# This file exists if the driver of an NVIDIA GPU is loaded.
_NVIDIA = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check; one line of the output."""

    what: str
    """What was checked, in one word."""
    found: str
    """What the check found."""
    fix: str = ""
    """What to do; empty if nothing is wrong."""


def check_machine() -> Iterator[Finding]:
    """Yield the result of each check as soon as it is known. The slowest check, of two processes, comes last."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    yield _hardware(device)
    yield _precision(device)
    yield _memory(device)
    yield _threads()
    yield _versions()
    yield _disk()
    yield from _caches()
    yield _processes()


def _hardware(device: torch.device) -> Finding:
    facts = describe(device)
    count = torch.accelerator.device_count()
    found = f"{count} x {facts['device']}" if count else f"{facts['device']}; no GPU"
    fix = ""
    if not count and _NVIDIA.exists():
        fix = f"torch {torch.__version__} does not see the NVIDIA GPU of this machine: install a CUDA build of torch"
    return Finding(what="hardware", found=found, fix=fix)


def _precision(device: torch.device) -> Finding:
    try:
        precision = choose_precision("auto", device)
    except ValueError as error:
        return Finding(what="precision", found="none", fix=str(error))
    peak = device_peak(device, precision.name)
    found = f"{precision.name}: {precision.reason}; peak {peak.flops / 1e12:.3g} TFLOP/s, {peak.source}"
    return Finding(what="precision", found=found)


def _memory(device: torch.device) -> Finding:
    """Check the free memory of the GPU, or that of the machine within the limit of this container."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        where = "of the GPU"
    else:
        memory = measure_memory()
        if memory is None:
            return Finding(what="memory", found="unknown: /proc/meminfo cannot be read")
        free, total, where = memory.free, memory.total, "allowed here" if memory.limited else "of the machine"
    fix = "end other programs, or lower --batch.micro-tokens" if free < _LOW_BYTES else ""
    return Finding(what="memory", found=f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB {where}", fix=fix)


def _threads() -> Finding:
    threads, usable = torch.get_num_threads(), usable_processors()
    found = f"{threads} for one process, {usable} processors to use"
    busy = _busy_processors()
    if advice := advise_threads(busy, threads, usable):
        found += f"; {advice}"
    fix = ""
    if threads < usable and busy <= 0.5 and os.environ.get("OMP_NUM_THREADS"):
        fix = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} slows down a process without a launcher: unset it"
    elif threads > usable:
        fix = f"set OMP_NUM_THREADS={usable}: with more threads than processors, threads wait for each other"
    return Finding(what="threads", found=found, fix=fix)


def _busy_processors(seconds: float = 0.5) -> float:
    """Return how many of the processors that this process may use are busy, measured for `seconds`."""
    load = ProcessorLoad()
    time.sleep(seconds)
    return load.others()


def _versions() -> Finding:
    """Check the versions of Python and of the packages that minilm requires."""
    names, wrong = [], []
    for required in map(Requirement, requires("minilm") or []):
        if required.marker is not None and not required.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(required.name)
        except PackageNotFoundError:
            installed = "missing"
        names.append(f"{required.name} {installed}")
        if installed == "missing" or not required.specifier.contains(installed, prereleases=True):
            wrong.append(f'"{required}"')
    extras = [f"{name} for {use} {'is' if find_spec(name) else 'is not'} installed" for name, use in _EXTRAS.items()]
    found = f"Python {sys.version.split()[0]}, {', '.join(names)}; {', '.join(extras)}"
    return Finding(what="versions", found=found, fix=f"pip install {' '.join(wrong)}" if wrong else "")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free
    fix = "free some, or give --run.output-dir on another disk" if free < _LOW_BYTES else ""
    return Finding(what="disk", found=f"{free / 1e9:.1f} GB free in {Path.cwd()}", fix=fix)


def _caches() -> Iterator[Finding]:
    try:
        folder = get_cache_folder()
        if not os.access(folder, os.W_OK):
            raise CacheError(f"the cache {folder} cannot be written; set HF_HOME to a folder that can be")
    except CacheError as error:
        found, _, fix = str(error).partition("; ")
        yield Finding(what="cache", found=found, fix=fix)
    else:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(folder).free
        found = f"{folder}: {size / 1e9:.2f} GB of prepared data and tokenizers, {free / 1e9:.1f} GB free"
        yield Finding(what="cache", found=found, fix="set HF_HOME to a folder with room" if free < _LOW_BYTES else "")
    offline = [name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(name, "0") not in ("0", "")]
    if offline:
        found = f"not used: {' and '.join(offline)} set"
    else:
        found = "used for models and data that are not in its cache"
    yield Finding(what="hub", found=found)


def _processes() -> Finding:
    """Check that two processes on CPUs connect, as the processes of a launcher must."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        job = spawn(_sum_ranks, (folder,), nprocs=_PROCESSES, join=False)  # type: ignore[no-untyped-call]
        try:
            while not (ended := job.join(1.0)) and time.perf_counter() - start < _TIMEOUT_SECONDS:
                pass
            problem = "" if ended else f"no answer within {_TIMEOUT_SECONDS:g} seconds"
        except Exception as error:
            # The message ends with the last line of the traceback of one process.
            problem = str(error).strip().splitlines()[-1]
        finally:
            for process in job.processes:
                process.kill()
                process.join()
    if not problem:
        found = f"{_PROCESSES} connected over gloo in {time.perf_counter() - start:.1f} s"
        return Finding(what="processes", found=found)
    fix = "allow local connections; if the name of this host does not resolve, set GLOO_SOCKET_IFNAME=lo"
    return Finding(what="processes", found=f"{_PROCESSES} did not connect ({problem})", fix=fix)


def _sum_ranks(rank: int, folder: str) -> None:
    """Connect to the other process and add up the ranks with it."""
    store = f"file://{folder}/store"
    timeout = timedelta(seconds=_TIMEOUT_SECONDS)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=_PROCESSES, timeout=timeout)
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    dist.destroy_process_group()
    if total.item() != sum(range(_PROCESSES + 1)):
        raise RuntimeError(f"the sum over the processes is {total.item()}")
