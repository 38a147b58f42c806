"""The number type of matrix products, and the speed of a device in each."""

import logging
import os
import re
import time
from dataclasses import dataclass

import torch

log = logging.getLogger("minilm")

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
# The comparison of bf16 with fp32: measurements of each, and the time of one.
_PROBE_ROUNDS, _PROBE_SECONDS = 8, 0.004
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def gemm_rate(dtype: torch.dtype, size: int = 512, seconds: float = 0.02, device: str = "cpu") -> float:
    """Return the FLOP/s of a square matrix product, the best of the repetitions in `seconds` (at least one).

    If that gives fewer than ten, for example because another program uses the processor, the function takes up to five
    times as long.
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


def _bf16_speedup() -> float:
    """Return how many times faster than in fp32 a matrix product is in bf16 on the CPU.

    Other programs may slow down any of the measurements, so they are short and take turns, and the best counts.
    """
    best = {torch.bfloat16: 0.0, torch.float32: 0.0}
    for _ in range(_PROBE_ROUNDS):
        for dtype, rate in best.items():
            best[dtype] = max(rate, gemm_rate(dtype, 256, _PROBE_SECONDS))
    return best[torch.bfloat16] / best[torch.float32]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The number type of the matrix products, and the reason for it."""

    name: str
    """`fp32`, `bf16` or `fp16`."""
    reason: str


def choose_precision(setting: str, device: torch.device) -> Precision:
    """Return the precision of a run. `auto` follows the launcher if it names bf16 or fp16, or else chooses a fast one.

    setting: the value of `run.precision`.

    On a CPU the function measures: compared with fp32, bf16 is nine times as fast with AMX, four times with
    AVX512_BF16, and a hundred times slower with AVX2. Raises ValueError for fp16 on a CPU, which would lose small
    gradients and not be faster.
    """
    name, reason, advice = setting, "set by run.precision", "on a CPU use auto, bf16 or fp32"
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if setting == "auto" and launcher in ("bf16", "fp16"):
        name, reason, advice = launcher, "set by the launcher", "launch with --mixed_precision no"
    if device.type == "cpu" and name == "fp16":
        raise ValueError(f"fp16, {reason}, needs a GPU: {advice}")
    if device.type == "cpu" and name != "fp32":
        log.info("measuring the rates of bf16 and fp32 …")
        ratio = _bf16_speedup()
        times = f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}"
        measured = f"a bf16 matrix product here runs at {times} times the rate of fp32"
        if name == "auto":
            return Precision(name="bf16" if ratio > 1.5 else "fp32", reason=measured)
        return Precision(name="bf16", reason=f"{reason}; {'WARNING: ' if ratio < 1 else ''}{measured}")
    if name != "auto":
        return Precision(name=name, reason=reason)
    if device.type == "cuda":
        # By default torch reports emulated bf16 as support too.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(name="bf16", reason="this GPU computes bf16")
        return Precision(name="fp16", reason="this GPU has no bf16")
    return Precision(name="fp32", reason=f"minilm has no faster precision for {device.type}")


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
