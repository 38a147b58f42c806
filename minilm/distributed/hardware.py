"""The machine's precision and speed, the FLOPs and memory of a step, and checks of the launch."""

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

from minilm.data.batch_plan import Step
from minilm.models.head import Head
from minilm.utils.launch_variables import count_local_processes, is_distributed

# Dense peaks in TFLOP/s from the makers' datasheets: (substring of the device's name, bf16 and fp16, fp32).
# The fp32 column is for plain fp32, since torch keeps TF32 off by default.
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
_KERNELS = 16  # of oneDNN: more than a micro-batch needs, so that each layer reuses those of the layer before
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def gemm_rate(dtype: torch.dtype, size: int = 512, seconds: float = 0.02, device: str = "cpu") -> float:
    """Return the FLOP/s of a square matrix product, the best of the repetitions in `seconds` (at least one).

    If that gives fewer than ten, for example because another program uses the processor, the function goes on for up to
    five times as long.
    """
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    torch.mm(a[:64, :64], b[:64, :64])  # loads the kernel
    durations: list[float] = []
    begin = time.perf_counter()
    while True:
        start = time.perf_counter()
        passed = start - begin
        if durations and passed >= seconds and (len(durations) >= 10 or passed >= 5 * seconds):
            break
        torch.mm(a, b)
        if device != "cpu":
            torch.accelerator.synchronize()
        durations.append(time.perf_counter() - start)
    return 2 * size**3 / min(durations)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The number type of the matrix products, and the reason for it."""

    name: str
    """`fp32`, `bf16` or `fp16`."""
    reason: str


def choose_precision(asked: str, device: torch.device) -> Precision:
    """Return the precision that `run.precision` asks for; for `auto`, the fastest that this device has.

    On a CPU the function measures: compared with fp32, bf16 is nine times as fast with AMX, four times with
    AVX512_BF16, and a hundred times slower with AVX2. Raises ValueError for fp16 on a CPU, which would lose small
    gradients and not be faster.
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
        # By default torch reports emulated bf16 as support too.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(name="bf16", reason="this GPU computes bf16")
        return Precision(name="fp16", reason="this GPU has no bf16")
    return Precision(name="fp32", reason=f"minilm knows nothing faster that is safe on {device.type}")


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The rate of one device that counts as an MFU of 100%."""

    flops: float
    """FLOP/s."""
    source: str
    """`datasheet`, or `measured` by a matrix product."""


def device_peak(device: torch.device, precision: str) -> Peak:
    """Return the device's datasheet peak at this precision, or its measured matrix-product rate if it has none."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, half, full in _PEAKS:
            if re.search(rf"\b{part}\b", name):
                return Peak(flops=1e12 * (full if precision == "fp32" else half), source="datasheet")
    size = 1024 if device.type == "cpu" else 8192
    return Peak(flops=gemm_rate(_DTYPES[precision], size, 0.1, device.type), source="measured")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs of training on one step: forward and backward (twice the forward), without recomputation.

    A forward costs `per_token` for each real token, `per_square` for the square of each example's length (attention),
    and `per_target` for each target (the head).
    """

    per_token: float
    per_square: float
    per_target: float

    def step(self, step: Step, rate: float) -> float:
        """Return the model FLOPs of a step over all processes. A share of `rate` of its tokens are targets.

        Padding adds nothing here, so that it lowers the MFU.
        """
        per_token = self.per_token + self.per_target * rate
        forward = per_token * step.tokens + self.per_square * step.square_lengths
        return 3 * forward


def count_flops(model: Head, max_length: int) -> Cost:
    """Count a forward's matrix products at two lengths and two numbers of targets, and solve for the three costs."""
    training = model.training

    def forward(length: int, targets: int) -> int:
        ids_T, packing = model.draw_rows([length])
        # The counter does not know the fused CPU kernel of attention. The plain one saves the scores of all layers for
        # the gradient, so the hooks drop what it saves. (With gradients disabled, the counter fails on DeBERTa.)
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
    """Let a CPU process keep the memory that it frees, in huge pages, so that a step asks the kernel for no memory.

    By default the C library returns every large block at once, which costs a small model a tenth of its time. And its
    pages of 4 kB are too many for the processor's table of addresses, which costs another tenth or more. This function
    does nothing for a C library other than glibc, or if the environment has settings for it (MALLOC_…).
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
    """Return whether addresses count as memory, by a limit of the process or by the system's accounting."""
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
    """Let oneDNN keep few of its kernels if products are in fp32, where it computes GELUs only.

    oneDNN makes a kernel for each number of tokens, which takes almost no time. By default it keeps a thousand. They
    lie between tensors and leave gaps that no other tensor fits: memory grows by 5 MB a step, and new pages take time.

    asked: the value of `run.precision`. Call this before the first product of the process: oneDNN reads its variable
    once.
    """
    # CPUs with these capabilities have no bf16.
    if asked == "fp32" or torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
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


def repeat_to_the_bit(wanted: bool) -> None:
    """Restrict torch to algorithms that give the same bits each time, or lift that restriction.

    Call this before the first product of the process: cuBLAS reads its variable once.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def describe(device: torch.device) -> dict[str, object]:
    """Return a description of the machine for run.json and the model card."""
    capability = _cpu_capability()
    told = ", as told" if os.environ.get("ATEN_CPU_CAPABILITY") else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu_name()} ({capability}{told})"
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


def usable_processors() -> int:
    """Return the number of processors on which this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fair_threads(environment: Mapping[str, str]) -> int | None:
    """Return the CPU threads of this process, its share of the machine's, if a launcher has set OMP_NUM_THREADS to 1.

    Launchers set 1 because they do not know a better number. Returns None for any other value, or without a launcher.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in environment or is_distributed(environment)
    if not launched or environment.get("OMP_NUM_THREADS") != "1":
        return None
    return max(1, usable_processors() // count_local_processes(environment))
