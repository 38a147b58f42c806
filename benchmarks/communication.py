"""Predict what communication costs a step. This is a model, not a measurement; docs/network_costs.md explains it.

    python benchmarks/communication.py
    python benchmarks/communication.py --measure

The first command prints the two tables of that page: the predictions, and the model beside what NVIDIA published for
its trainers of BERT-large and BART-large. `--measure` also times an all-reduce (gloo) between two CPU processes of this
machine, and compares the model's prediction with what benchmarks/scaling.py measures with two processes.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

RATE = 0.4 * 989e12  # FLOP/s: assumed, 40% of an H200's bf16 peak
NVLINK = 400e9  # bytes/s: assumed bus bandwidth of an all-reduce inside a host
NETWORKS = {f"{bits} Gb/s": bits * 1e9 / 8 for bits in (25, 100, 400)}  # bytes/s of a host
MICRO_TOKENS = 16384
# Both models have 12 layers and a width of 768. For each: the parameters, the FLOPs of a token in forward and backward
# (layers, attention, head), and the tokens of a step.
LAYERS, WIDTH = 12, 768
MODELS = {
    "BERT-base": (110e6, 72 * LAYERS * WIDTH**2 + 12 * LAYERS * WIDTH * 128 + 0.15 * 6 * WIDTH * 30522, 1024 * 128),
    "GPT-2": (124e6, 72 * LAYERS * WIDTH**2 + 12 * LAYERS * WIDTH * 1024 + 6 * WIDTH * 50257, 512 * 1024),
}


@dataclass(frozen=True)
class Cluster:
    """What NVIDIA published for a trainer in its DeepLearningExamples. A step is one micro-batch."""

    job: str
    place: str
    parameters: float
    gradient_bytes: int
    """Bytes per parameter in the all-reduce."""
    examples: int
    """Examples of a GPU in a step."""
    alone: tuple[int, float]
    """The number of GPUs of the smallest measurement, one GPU or one host, and its examples per second."""
    bandwidth: float
    """Bytes per second of the slowest link, by the datasheet: NVLink, or all network cards of a host."""
    speedups: dict[int, float]
    """By the number of GPUs: how many times as fast as the smallest measurement."""


V100, A100 = "DGX-1 (V100), 400 Gb/s", "DGX A100, 1,600 Gb/s"
# PyTorch/LanguageModeling/BERT/README.md (fp16, March 2020) and PyTorch/LanguageModeling/BART/README.md (bf16, December
# 2022) of github.com/NVIDIA/DeepLearningExamples, "Training performance results".
PUBLISHED = (
    Cluster("BART-large, 128 tokens", "A100, NVLink", 406e6, 4, 200, (1, 326.53), 300e9, {8: 7.88}),
    Cluster("BART-large, 512 tokens", "A100, NVLink", 406e6, 4, 32, (1, 69.31), 300e9, {8: 7.93}),
    Cluster("BART-large, 128 tokens", A100, 406e6, 4, 200, (8, 2572.86), 200e9, {160: 20.39, 320: 37.71}),
    Cluster("BART-large, 512 tokens", A100, 406e6, 4, 32, (8, 549.67), 200e9, {160: 19.14, 320: 36.29}),
    Cluster("BERT-large, 128 tokens", V100, 336e6, 2, 16, (8, 874.24), 50e9, {32: 3.53, 128: 13.89}),
    Cluster("BERT-large, 512 tokens", V100, 336e6, 2, 4, (8, 195.93), 50e9, {32: 3.57, 128: 14.02}),
)


def all_reduce(parameters: float, processes: int, bandwidth: float, size: int = 4) -> float:
    """Return the seconds of a ring all-reduce of gradients.

    bandwidth: of the slowest link, bytes/s. size: bytes per parameter, 4 for float32.
    """
    return 2 * (processes - 1) / processes * size * parameters / bandwidth


def step_time(compute: float, communication: float, micro_batches: int = 1) -> float:
    """Return the seconds of a step. The last backward, two thirds of a micro-batch's time, hides communication."""
    return max(compute, compute - 2 / 3 * compute / micro_batches + communication)


def predict(name: str, processes: int, bandwidth: float, steps: int = 1) -> tuple[float, float, float]:
    """Return the seconds of computing, communication and the step, for a step `steps` times as large as in MODELS."""
    parameters, flops, tokens = MODELS[name]
    own = steps * tokens / processes
    compute, communication = own * flops / RATE, all_reduce(parameters, processes, bandwidth)
    return compute, communication, step_time(compute, communication, math.ceil(own / MICRO_TOKENS))


def table() -> list[str]:
    """Return the table as lines of Markdown, and lines on the gain of larger steps on a slow network."""
    places = [(f"{n} GPU{'s' * (n > 1)}", n, "NVLink" if n > 1 else "none", NVLINK) for n in (1, 2, 4, 8)]
    places += [(f"{n} hosts of 8", 8 * n, *network) for n in (2, 4, 8) for network in NETWORKS.items()]
    columns = " | ".join(f"{name}: compute | all-reduce | step | of ideal" for name in MODELS)
    lines = [f"| | slowest link | {columns} |", "|---|---|" + "---:|" * 8]
    for place, processes, link, bandwidth in places:
        predictions = [predict(name, processes, bandwidth) for name in MODELS]
        cells = [f"{1e3 * c:.1f} ms | {1e3 * r:.1f} ms | {1e3 * s:.1f} ms | {c / s:.0%}" for c, r, s in predictions]
        lines.append(f"| {place} | {link} | {' | '.join(cells)} |")
    for name in MODELS:
        words = []
        for times in (1, 4, 16, 64):
            compute, _, step = predict(name, 16, NETWORKS["25 Gb/s"], times)
            words.append(f"x{times} {compute / step:.0%} ({predict(name, 8, NVLINK, times)[2] / step:.1f})")
        lines.append(
            f"{name}, 2 hosts, 25 Gb/s, larger steps: of ideal (times the speed of one host): {', '.join(words)}"
        )
    return lines


def compare_with_published() -> list[str]:
    """Return the published speed-ups beside those of the model, as lines of Markdown."""
    lines = ["| | slowest link | GPUs | published | model | model without overlap |", "|---|---|---:|---:|---:|---:|"]
    for cluster in PUBLISHED:
        fewest, speed = cluster.alone
        compute = fewest * cluster.examples / speed
        for gpus, published in cluster.speedups.items():
            seconds = all_reduce(cluster.parameters, gpus, cluster.bandwidth, cluster.gradient_bytes)
            more = gpus / fewest
            overlapped, added = (more * compute / step for step in (step_time(compute, seconds), compute + seconds))
            cells = [cluster.job, cluster.place, str(gpus), *(f"{x:.2f}" for x in (published, overlapped, added))]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def time_all_reduce(rank: int, address: str, parameters: int, times: int = 10) -> float:
    """Return the median seconds of an all-reduce of `parameters` float32 numbers between two processes at `address`."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    gradient, seconds = torch.zeros(parameters), []
    for _ in range(times + 1):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(gradient)
        seconds.append(time.perf_counter() - start)
    dist.destroy_process_group()
    return statistics.median(seconds[1:])  # the first connects


def measure_all_reduce(parameters: int) -> float:
    """Return the seconds of an all-reduce between two processes of this machine."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2, context) as pool:
        return max(pool.map(time_all_reduce, range(2), [f"file://{folder}/meeting"] * 2, [parameters] * 2))


def measure() -> None:
    """Print the bandwidth of this machine, and the predicted and the measured speed of two processes."""
    import report
    import scaling
    from throughput import MASKED

    layers, width = scaling.SHAPES[2]  # MASKED's
    parameters = 12 * layers * width**2 + MASKED.tokens.vocab_size * width
    seconds = measure_all_reduce(parameters)
    print(f"all-reduce of {parameters / 1e6:.1f} M numbers: {seconds:.3f} s, {4e-9 * parameters / seconds:.2f} GB/s")
    machine = report.describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder  # the launched processes read it
        one, two = (scaling.run_launched(processes, machine) for processes in (1, 2))
    alone = statistics.median(turn.seconds for turn in one)
    speedup = alone / step_time(alone / 2, seconds)
    measured = scaling.compute_speeds(two)[0] / scaling.compute_speeds(one)[0]
    print(f"two processes: {speedup:.2f} times the speed of one by the model, {measured:.2f} times measured")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--measure", action="store_true", help="compare with two processes of this machine")
    if parser.parse_args().measure:
        measure()
    else:
        print("\n".join([*table(), "", *compare_with_published()]))


if __name__ == "__main__":
    main()
