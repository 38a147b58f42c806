"""The machine: memory, processors, threads, and settings of the process that suit them."""

import ctypes
import math
import mmap
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minilm.utils.launch_variables import count_local_processes, is_distributed

# Kernels of oneDNN to keep. A micro-batch needs fewer, so that each layer reuses those of the layer before it.
_KERNELS = 16


def keep_freed_memory(device: torch.device) -> None:
    """Let a CPU process keep the memory that it frees, in huge pages, so that steps need no memory from the kernel.

    By default the C library returns every large block at once, which costs a small model a tenth of its time. Its pages
    of 4 kB are too many for the processor's TLB, which costs another tenth or more. This function does nothing for a C
    library other than glibc, or if the environment has settings for it (MALLOC_…).
    """
    if (
        device.type != "cpu"
        or platform.libc_ver()[0] != "glibc"
        or any(key.startswith("MALLOC_") for key in os.environ)
    ):
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX in malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, -1)  # never
    if hasattr(mmap, "MADV_HUGEPAGE") and not _memory_is_rationed():
        _grow_in_huge_pages(libc, os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2)


def _grow_in_huge_pages(libc: Any, size: int) -> None:
    """Let the next `size` bytes of the heap have pages of 2 MB, once the process writes to them.

    Linux takes such a request only for addresses that the process has. So this function allocates a block and frees it
    again: the addresses stay part of the heap, and hold no memory.
    """
    libc.malloc.restype = ctypes.c_void_p
    block = libc.malloc(ctypes.c_size_t(size))
    if block is None:
        return
    skipped = -block % mmap.PAGESIZE
    libc.madvise(ctypes.c_void_p(block + skipped), ctypes.c_size_t(size - skipped), mmap.MADV_HUGEPAGE)
    libc.free(ctypes.c_void_p(block))


def _memory_is_rationed() -> bool:
    """Return whether reserved addresses count as used memory, by a limit of the process or of the system."""
    import resource  # POSIX only

    if any(
        resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    ):
        return True
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip() == "2"
    except OSError:
        return True


def keep_few_kernels(precision: str) -> None:
    """Let oneDNN keep few of its kernels if matrix products are in fp32. Then oneDNN computes only GELUs.

    oneDNN makes a kernel for each number of tokens, which takes almost no time. By default it keeps a thousand. They
    lie between tensors and leave gaps that no other tensor fits: memory grows by 5 MB a step, and new pages take time.

    precision: the value of `run.precision`.

    Call this before the first product of the process: oneDNN reads its variable once.
    """
    # CPUs with these capabilities have no bf16.
    if precision == "fp32" or torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_KERNELS))


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held: torch's tensors on a GPU, else its resident memory.

    Returns 0 on a system that does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # POSIX only
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The main memory, in bytes."""

    free: int
    total: int
    limited: bool
    """Whether a container limits it."""


def measure_memory() -> Memory | None:
    """Return the memory of the machine within the limit of this container, or None on a system that hides it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {name: 1024 * int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
        free, total = sizes["MemAvailable"], sizes["MemTotal"]
    except (OSError, KeyError, ValueError):
        return None
    # This file holds the word `max` if there is no limit.
    limit = _read_number("/sys/fs/cgroup/memory.max")
    if limit is None or limit >= total:
        return Memory(free=free, total=total, limited=False)
    left = limit - (_read_number("/sys/fs/cgroup/memory.current") or 0)
    return Memory(free=min(free, left), total=limit, limited=True)


def _read_number(path: str) -> int | None:
    """Return the number in a file, or None if there is none."""
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def repeat_to_the_bit(wanted: bool) -> None:
    """Restrict torch to algorithms that give the same bits each time, or lift that restriction.

    Call this before the first product of the process: cuBLAS reads its variable once.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    set_deterministic(wanted)


def set_deterministic(wanted: bool, *, warn_only: bool = False) -> None:
    """Do what `torch.use_deterministic_algorithms` does, which imports torch's compiler, if that changes anything."""
    if (wanted, warn_only) != (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    ):
        torch.use_deterministic_algorithms(wanted, warn_only=warn_only)


def describe(device: torch.device) -> dict[str, object]:
    """Return a description of the machine for run.json and the model card."""
    capability = _cpu_capability()
    source = ", set by ATEN_CPU_CAPABILITY" if os.environ.get("ATEN_CPU_CAPABILITY") else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu_name()} ({capability}{source})"
    return {
        "device": name,
        "cpu_capability": capability,
        "threads_per_process": torch.get_num_threads(),
    }


def _cpu_facts() -> list[str]:
    """Return the lines of Linux's file about the processors; none on other systems."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _cpu_name() -> str:
    names = [line.split(":", 1)[1].strip() for line in _cpu_facts() if line.startswith("model name")]
    name, count = (names[0], len(names)) if names else (platform.processor() or platform.machine(), os.cpu_count())
    return f"{name}, {count} processors"


def _cpu_capability() -> str:
    """Return torch's name of the instructions that it uses, or AMX or AVX512_BF16 if the CPU has them too."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = {flag for line in _cpu_facts() if line.startswith("flags") for flag in line.split()}
    if capability == "AVX512":
        return "AMX" if "amx_bf16" in flags else "AVX512_BF16" if "avx512_bf16" in flags else capability
    return capability


def usable_processors() -> int:
    """Return the number of processors on which this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fair_threads(environment: Mapping[str, str]) -> int | None:
    """Return this process's share of the machine's processors if a launcher has set OMP_NUM_THREADS to 1.

    Launchers set 1 because they do not know a better number. Returns None for any other value, or without a launcher.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in environment or is_distributed(environment)
    if not launched or environment.get("OMP_NUM_THREADS") != "1":
        return None
    return max(1, usable_processors() // count_local_processes(environment))


def advise_threads(busy: float, threads: int, usable: int) -> str | None:
    """Return what would make a run on CPUs faster if other programs take `busy` of the usable processors, or None."""
    left = max(1, usable - math.ceil(busy - 0.5))
    if busy <= 0.5 or threads <= left:
        return None
    return (
        f"other programs take {busy:.1f} of the {usable} processors, and the {threads} threads of a run wait for each "
        f"other: end the programs, or start the recipe with OMP_NUM_THREADS={left} python"
    )
