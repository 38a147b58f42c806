"""`minilm doctor`: what this machine offers to a run, what a run would choose, and what to mend before one."""

import math
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

import psutil
import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from torch.multiprocessing.spawn import spawn

from minilm.distributed.hardware import choose_precision, describe, device_peak, usable_processors
from minilm.utils.cache import CacheError, get_cache_folder

_PATIENCE = 120.0  # seconds for processes to meet, which takes a few on a machine that has nothing else to do
_TOGETHER = 2  # processes that are to meet
_LITTLE = 2e9  # bytes of memory or disk below which the small recipes do not fit
_EXTRAS = {"peft": "LoRA", "matplotlib": "report --png"}  # what else is made use of
_NVIDIA = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    what: str
    found: str
    fix: str = ""
    """What to do; empty where all is well."""


def findings() -> Iterator[Finding]:
    """One after the other as they are found; two processes that meet, which takes seconds, come last."""
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
    """Free and all, of the GPU or of the machine; less where the container of the process is allowed less."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        where = "of the GPU"
    else:
        try:
            lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
            sizes = {name: 1024 * int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
            free, total, where = sizes["MemAvailable"], sizes["MemTotal"], "of the machine"
        except (OSError, KeyError, ValueError):
            return Finding(what="memory", found="unknown: this system does not tell")
        limit = _number("/sys/fs/cgroup/memory.max")
        if limit is not None and limit < total:
            left = limit - (_number("/sys/fs/cgroup/memory.current") or 0)
            free, total, where = min(free, left), limit, "allowed here"
    fix = "end other programs, or lower --batch.micro-tokens" if free < _LITTLE else ""
    return Finding(what="memory", found=f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB {where}", fix=fix)


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):  # `max` stands for no limit
        return None


def _threads() -> Finding:
    threads, usable = torch.get_num_threads(), usable_processors()
    found = f"{threads} for one process, {usable} processors to use"
    if (busy := _busy()) > 0.5:
        left = max(1, usable - math.ceil(busy - 0.5))
        found += (
            f"; other programs take {busy:.1f} of them now, for which a run's threads wait: end those, or start by "
            f"OMP_NUM_THREADS={left} python in place of accelerate launch"
        )
    fix = ""
    if threads < usable and busy <= 0.5 and os.environ.get("OMP_NUM_THREADS"):
        fix = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} holds a process started without launcher down: unset it"
    elif threads > usable:
        fix = f"set OMP_NUM_THREADS={usable}: more threads than processors wait for each other"
    return Finding(what="threads", found=found, fix=fix)


def _busy(seconds: float = 0.5) -> float:
    """How many of the processors that this process may run on were at work for others just now."""
    shares = psutil.cpu_percent(seconds, percpu=True)
    ours = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(shares))
    busy: float = sum(share for number, share in enumerate(shares) if number in ours) / 100
    return busy


def _versions() -> Finding:
    """Of Python and of what minilm requires."""
    names, wrong = [], []
    for required in map(Requirement, requires("minilm") or []):
        if required.marker is not None and not required.marker.evaluate({"extra": ""}):
            continue
        try:
            have = version(required.name)
        except PackageNotFoundError:
            have = "missing"
        names.append(f"{required.name} {have}")
        if have == "missing" or not required.specifier.contains(have, prereleases=True):
            wrong.append(f'"{required}"')
    extras = [f"{name} {'is' if find_spec(name) else 'not'} there for {use}" for name, use in _EXTRAS.items()]
    found = f"Python {sys.version.split()[0]}, {', '.join(names)}; {', '.join(extras)}"
    return Finding(what="versions", found=found, fix=f"pip install {' '.join(wrong)}" if wrong else "")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free
    fix = "free some, or give --run.output-dir on another disk" if free < _LITTLE else ""
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
        yield Finding(what="cache", found=found, fix="set HF_HOME to a folder with room" if free < _LITTLE else "")
    offline = [name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(name, "0") not in ("0", "")]
    said = (
        f"not asked: {' and '.join(offline)} set" if offline else "asked for models and data that are not in its cache"
    )
    yield Finding(what="hub", found=said)


def _processes() -> Finding:
    """Whether two processes on CPUs find each other, as those of a launcher have to."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        job = spawn(_meet, (folder,), nprocs=_TOGETHER, join=False)  # type: ignore[no-untyped-call]
        try:
            while not (ended := job.join(1.0)) and time.perf_counter() - start < _PATIENCE:
                pass
            said = "" if ended else f"no answer within {_PATIENCE:g} seconds"
        except Exception as error:  # of one of the processes, with its traceback
            said = str(error).strip().splitlines()[-1]
        finally:
            for process in job.processes:
                process.kill()
                process.join()
    if not said:
        found = f"{_TOGETHER} found each other over gloo, {time.perf_counter() - start:.1f} s"
        return Finding(what="processes", found=found)
    fix = "let local connections through; where the host's own name does not resolve, set GLOO_SOCKET_IFNAME=lo"
    return Finding(what="processes", found=f"{_TOGETHER} did not find each other ({said})", fix=fix)


def _meet(rank: int, folder: str) -> None:
    """Add up the ranks with the other process."""
    store = f"file://{folder}/store"
    wait = timedelta(seconds=_PATIENCE)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=_TOGETHER, timeout=wait)
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    dist.destroy_process_group()
    if total.item() != sum(range(_TOGETHER + 1)):
        raise RuntimeError(f"the sum over the processes is {total.item()}")
