"""What the machine can do, and what a step costs it: precision, matrix-product rate, FLOPs, launch checks."""

import ctypes
import mmap
import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minilm.head import Head
from minilm.job import is_one_of_several, processes_here
from minilm.plan import Step

# Dense peaks in TFLOP/s from the makers' datasheets: (substring of the device's name, bf16 and fp16, fp32).
# The fp32 column is that of plain fp32, since torch keeps TF32 off unless it is asked for.
_PEAKS = (
    ("H200", 989.0, 67.0),
    ("H100 PCIe", 756.0, 51.0),
    ("H100 NVL", 835.0, 60.0),
    ("H100", 989.0, 67.0),
    ("A100", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("L4", 121.0, 30.3),
    ("A10", 125.0, 31.2),
    ("V100", 125.0, 15.7),
    ("T4", 65.0, 8.1),
    ("4090", 165.2, 82.6),
    ("3090", 71.0, 35.6),
)
_KERNELS = 16  # of oneDNN, more than a micro-batch has: each layer finds those of the one before
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def gemm_rate(dtype: torch.dtype, size: int = 512, seconds: float = 0.02, device: str = "cpu") -> float:
    """FLOP/s of a square matrix product, the best of the repetitions that fit into `seconds` (at least one).

    Where that is fewer than ten, as beside a program that takes a processor, more are taken, in up to five times that.
    """
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    torch.mm(a[:64, :64], b[:64, :64])  # loads the kernel
    taken: list[float] = []
    begin = time.perf_counter()
    while not taken or (passed := time.perf_counter() - begin) < seconds or (len(taken) < 10 and passed < 5 * seconds):
        start = time.perf_counter()
        torch.mm(a, b)
        if device != "cpu":
            torch.accelerator.synchronize()
        taken.append(time.perf_counter() - start)
    return 2 * size**3 / min(taken)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The arithmetic of the matrix products, and why it was chosen."""

    name: str
    """`fp32`, `bf16` or `fp16`."""
    reason: str


def choose_precision(asked: str, device: torch.device) -> Precision:
    """`auto` takes the fastest that this device does; what was asked is obeyed.

    On a CPU it measures: bf16 is nine times as fast as fp32 with AMX, four with AVX512_BF16, and a hundredth with AVX2.
    Raises ValueError for fp16 on a CPU, whose small gradients it would lose without a gain in speed.
    """
    reason = "asked for"
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked == "auto" and launcher in ("bf16", "fp16"):
        asked, reason = launcher, "asked for at launch"
    if device.type == "cpu" and asked == "fp16":
        raise ValueError("run.precision fp16 needs a GPU; on a CPU use auto, bf16 or fp32")
    if device.type == "cpu" and asked != "fp32":
        ratio = gemm_rate(torch.bfloat16, 256) / gemm_rate(torch.float32, 256)
        times = f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}"
        measured = f"a bf16 matrix product here runs at {times} times the rate of fp32"
        if asked == "auto":
            return Precision(name="bf16" if ratio > 1.5 else "fp32", reason=measured)
        return Precision(name="bf16", reason=f"{reason}; {'WARNING: ' if ratio < 1 else ''}{measured}")
    if asked != "auto":
        return Precision(name=asked, reason=reason)
    if device.type == "cuda":
        # The hardware's own bf16, not the emulation that torch also reports as support.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(name="bf16", reason="this GPU computes bf16")
        return Precision(name="fp16", reason="this GPU has no bf16")
    return Precision(name="fp32", reason=f"nothing faster is known to be safe on {device.type}")


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The rate that MFU is measured against, for one device."""

    flops: float
    """FLOP/s."""
    source: str
    """`datasheet`, or `measured` by a matrix product."""


def device_peak(device: torch.device, precision: str) -> Peak:
    """The device's datasheet peak at this precision; where none is known, its measured matrix-product rate."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, half, full in _PEAKS:
            if re.search(rf"\b{part}\b", name):
                return Peak(flops=1e12 * (full if precision == "fp32" else half), source="datasheet")
    size = 1024 if device.type == "cpu" else 8192
    return Peak(flops=gemm_rate(_DTYPES[precision], size, 0.1, device.type), source="measured")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs of training on one step: forward and backward (twice the forward), recomputation not counted.

    A forward costs `per_token` for each real token, `per_square` for the square of each example's length (attention),
    and `per_target` for each target (the head).
    """

    per_token: float
    per_square: float
    per_target: float

    def step(self, step: Step, rate: float) -> float:
        """Model FLOPs of a step over all its processes, of whose tokens a share of `rate` are targets.

        Padding costs nothing here, so that it counts as waste in MFU.
        """
        per_token = self.per_token + self.per_target * rate
        forward = per_token * step.tokens + self.per_square * step.square_lengths
        return 3 * forward


def count_flops(model: Head, max_length: int) -> Cost:
    """Count a forward's matrix products at two lengths and two numbers of targets, and solve for the three costs."""
    training = model.training

    def forward(length: int, targets: int) -> int:
        ids_T, packing = model.draw_rows([length])
        # The counter does not know the fused CPU kernel of attention. Nothing of what the other saves for a gradient is
        # kept: it would be the scores of all layers. (Without gradients the counter fails on DeBERTa.)
        forgetting = saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)
        with forgetting, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.logits(ids_T, packing, ids_T.new_zeros(targets))
        return int(counter.get_total_flops())

    model.eval()
    short, long = max(2, max_length // 2), max_length
    one, two, at_long = forward(short, 1), forward(short, 2), forward(long, 1)
    per_target = two - one
    at_short, at_long = one - per_target, at_long - per_target
    model.train(training)
    per_square = (at_long / long - at_short / short) / (long - short)
    return Cost(per_token=at_short / short - per_square * short, per_square=per_square, per_target=per_target)


def keep_freed_memory(device: torch.device) -> None:
    """Let a CPU process keep the memory that it frees, in huge pages; a step then asks the kernel for none of it again.

    The C library's defaults return every large block at once, which costs a small model a tenth of its time, and its
    pages of 4 kB are more than the processor knows the places of, which costs another tenth and more. Only glibc is
    told so, and not where the environment has settings of its own (MALLOC_…).
    """
    if (
        device.type != "cpu"
        or platform.libc_ver()[0] != "glibc"
        or any(key.startswith("MALLOC_") for key in os.environ)
    ):
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # names of mallopt's parameters in malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, -1)  # never
    if hasattr(mmap, "MADV_HUGEPAGE") and not _memory_is_rationed():
        _grow_in_huge_pages(libc, os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2)


def _grow_in_huge_pages(libc: Any, size: int) -> None:
    """Have the next `size` bytes of the heap in pages of 2 MB, once they are written to.

    Linux gives them to who asks for them, for addresses that there are: so a block is taken and freed, which stays part
    of the heap and holds no memory.
    """
    libc.malloc.restype = ctypes.c_void_p
    block = libc.malloc(ctypes.c_size_t(size))
    if block is None:
        return
    skipped = -block % mmap.PAGESIZE
    libc.madvise(ctypes.c_void_p(block + skipped), ctypes.c_size_t(size - skipped), mmap.MADV_HUGEPAGE)
    libc.free(ctypes.c_void_p(block))


def _memory_is_rationed() -> bool:
    """Whether addresses count as memory, by a limit of the process or by the system's accounting."""
    import resource  # POSIX only

    if any(
        resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    ):
        return True
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip() == "2"
    except OSError:
        return True


def keep_few_kernels(asked: str) -> None:
    """Have oneDNN forget all but a few of its kernels, where products are in fp32, of which it computes GELUs alone.

    It makes a kernel for each number of tokens, in no time. What it keeps of each of a thousand lies between tensors,
    in whose place no other of their size fits then: memory grows by 5 MB a step, for pages that each cost a while.

    asked: `Run.precision`. It is for the process, before its first product: oneDNN looks at its variable once.
    """
    if asked == "fp32" or torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):  # these have no bf16
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_KERNELS))


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most so far: on a GPU torch's tensors, else the process's resident memory.

    0 where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # POSIX only
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def repeat_to_the_bit(wanted: bool) -> None:
    """Have torch use only algorithms that give the same bits each time, or any again.

    cuBLAS looks at its variable once, before the first product of the process.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def describe(device: torch.device) -> dict[str, object]:
    """What the run ran on, for run.json and the model card."""
    capability = _cpu_capability()
    told = ", as told" if os.environ.get("ATEN_CPU_CAPABILITY") else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu_name()} ({capability}{told})"
    return {
        "device": name,
        "cpu_capability": capability,
        "threads_per_process": torch.get_num_threads(),
    }


def _cpu_facts() -> list[str]:
    """The lines of what Linux tells of the processors, none elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _cpu_name() -> str:
    names = [line.split(":", 1)[1].strip() for line in _cpu_facts() if line.startswith("model name")]
    name, count = (names[0], len(names)) if names else (platform.processor() or platform.machine(), os.cpu_count())
    return f"{name}, {count} processors"


def _cpu_capability() -> str:
    """Torch's word for the instructions that it uses, or for those with bf16 besides AVX-512."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = {flag for line in _cpu_facts() if line.startswith("flags") for flag in line.split()}
    if capability == "AVX512":
        return "AMX" if "amx_bf16" in flags else "AVX512_BF16" if "avx512_bf16" in flags else capability
    return capability


_RIGHT_LAUNCH = (
    "on CPUs type: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N …, "
    "on GPUs: accelerate launch --multi_gpu --num_processes N …"
)


def check_launch(processes: int, environment: Mapping[str, str]) -> None:
    """Refuse launches that look like several processes and are not, before any of them does work.

    `processes` is what accelerate made of the environment. Raises ValueError with the command that works.
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
    """Refuse more processes on this machine than it has GPUs, of which each process takes one; 0 means CPUs."""
    here = processes_here(environment)
    if devices and here > devices:
        raise ValueError(
            f"{here} processes were started and there are {devices} GPUs here: "
            f"type accelerate launch --multi_gpu --num_processes {devices} …"
        )


def usable_processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fair_threads(environment: Mapping[str, str]) -> int | None:
    """CPU threads that a process should use: its share of the machine's, where a launcher cut it down to one.

    Launchers set OMP_NUM_THREADS=1 for want of a better guess; None where the variable says anything else.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in environment or is_one_of_several(environment)
    if not launched or environment.get("OMP_NUM_THREADS") != "1":
        return None
    return max(1, usable_processors() // processes_here(environment))
