"""Measure how minilm's speed changes with the processes, the length, the model and the number of examples.

    python benchmarks/scaling.py --quick
    python benchmarks/scaling.py --processes --lengths

Without the flag of a part, all four parts run. All of them use `train_step`, a masked LM on Python's documentation
(`datasets` on synthetic text), and the fast precision of the machine. The sides of a comparison take turns, each in its
own process.

- processes: the same steps by 1, 2, 4, … processes, started by accelerate's launcher. Each process has a GPU, or one
  thread of the CPU. The ideal is the speed of one process times their number. On a CPU, the table also has the share of
  the speed of one process with all threads.
- lengths: full blocks of 64 to 8,192 tokens, with the same number of tokens per step.
- models: RoBERTa from 2 layers with a width of 128 up to 12 layers with 768 (24 with 1,024 on a GPU). For lengths and
  models, the ideal is the highest FLOP/s of all of them.
- datasets: 10^3 to 10^7 examples of about 12 words (synthetic.py), encoded beforehand. The table has the seconds until
  a fresh process has planned its first step, the milliseconds for the plan and the batch of a later step, the memory,
  and the speed of a small model. Ideally none of these changes.

`--quick` leaves out lengths above 1,024, models above 8 layers, and more than 10^5 examples. Results go to
benchmarks/results, as JSON and as a plot (`pip install -e ".[report]"`).
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import report
import torch
from comparison import Contender, Precision, Rounds, TurnResult, build_parts, compare, run_minilm, take_turns
from synthetic import write_corpus
from throughput import MASKED, in_blocks

from minilm.config import Batch, Config, Run

LENGTHS = tuple(2**power for power in range(6, 14))
SHAPES = ((2, 128), (4, 256), (6, 384), (8, 512), (12, 768), (24, 1024))  # layers, width
SIZES = tuple(10**power for power in range(3, 8))
QUICK, FULL = Rounds(count=2, warm_up=1), Rounds(count=7)
HEAD = 64  # width of an attention head


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement, and its ideal value."""

    at: int
    """The number of processes, tokens of an example, parameters, or examples."""
    tokens_per_second: float
    low: float
    """Lower end of the interquartile range over the rounds; `high` is the upper end."""
    high: float
    ideal: float
    extra: dict[str, float] = field(default_factory=dict)


def model_fields(layers: int, width: int, length: int) -> dict[str, Any]:
    """Return the fields of the model's configuration."""
    size = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // HEAD}
    return {**MASKED.model.config, **size, "intermediate_size": 4 * width, "max_position_embeddings": length + 2}


def sized_config(layers: int, width: int, length: int, tokens: int) -> Config:
    """Return a configuration with this many tokens per step, in full blocks of this length and one forward pass."""
    batch = Batch(examples=max(1, tokens // length), max_length=length, micro_tokens=max(tokens, length))
    model = replace(MASKED.model, config=model_fields(layers, width, length))
    return in_blocks(replace(MASKED, model=model, batch=batch))


def compute_speeds(turns: list[TurnResult]) -> tuple[float, float, float]:
    """Return the tokens per second: the median, and both ends of the interquartile range."""
    found = sorted(turn.tokens / turn.seconds for turn in turns)
    quarter = len(found) // 4
    return statistics.median(found), found[quarter], found[-1 - quarter]


def compute_points(places: list[int], taken: list[list[TurnResult]], peak: float) -> list[Point]:
    """Return a point for each place. The ideal is the FLOP/s of the best one."""
    found = [compute_speeds(turns) for turns in taken]
    flops = [turns[0].flops / turns[0].tokens for turns in taken]  # of a token
    rates = [median * cost for (median, _, _), cost in zip(found, flops, strict=True)]
    return [
        Point(
            at=place,
            tokens_per_second=median,
            low=low,
            high=high,
            ideal=max(rates) / cost,
            extra={"mfu": rate / peak, "memory": turns[-1].memory},
        )
        for place, (median, low, high), cost, rate, turns in zip(places, found, flops, rates, taken, strict=True)
    ]


def by_length(machine: report.Machine, quick: bool) -> list[Point]:
    """Measure the lengths."""
    tokens = 65536 if machine.device.type == "cuda" else 2048 if quick else 8192
    lengths = [length for length in LENGTHS if length <= 1024 or not quick]
    return measure_configs(
        [sized_config(6, 384, length, tokens) for length in lengths], lengths, machine, QUICK if quick else FULL
    )


def by_model(machine: report.Machine, quick: bool) -> list[Point]:
    """Measure the sizes of models."""
    cuda = machine.device.type == "cuda"
    shapes = SHAPES if cuda and not quick else SHAPES[:4] if quick else SHAPES[:5]
    configs = [sized_config(layers, width, 128, 65536 if cuda else 2048) for layers, width in shapes]
    parameters = [12 * layers * width**2 + MASKED.tokens.vocab_size * width for layers, width in shapes]
    return measure_configs(configs, parameters, machine, QUICK if quick else FULL)


def measure_configs(configs: list[Config], places: list[int], machine: report.Machine, rounds: Rounds) -> list[Point]:
    """Return a point for each of these configurations."""
    contenders = [Contender(name="minilm", config=config, run=run_minilm) for config in configs]
    return compute_points(places, compare(contenders, machine.precision, rounds), machine.peak.flops)


def take(config: Config, turns: Rounds) -> list[TurnResult]:
    """Take turns in this process, which is one process of a launched job."""
    parts = build_parts(config)
    if parts.accelerator.device.type == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # minilm may use more
    return list(take_turns(parts, turns.warm_up + turns.count, turns.block))[turns.warm_up :]


def run_launched(processes: int, machine: report.Machine, threads: int = 1) -> list[TurnResult]:
    """Return the turns of a run with this many processes and threads, under accelerate's launcher."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    words = [*launcher, *plain] if processes > 1 else []
    cpu = {"ACCELERATE_USE_CPU": "true"} if machine.device.type == "cpu" else {}
    command = [sys.executable, *words, __file__, "--worker", machine.precision]
    settings = {**os.environ, **cpu, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=settings, stdout=subprocess.PIPE, text=True, check=True)
    return [TurnResult(**turn) for turn in json.loads(done.stdout.splitlines()[-1])]


def work(precision: Precision) -> None:
    """Take turns in a launched process. The main process prints the results as JSON."""
    batch = replace(MASKED.batch, examples=512 if torch.cuda.is_available() else 128)
    turns = take(replace(MASKED, batch=batch, run=Run(precision=precision)), Rounds(count=6))
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps([asdict(turn) for turn in turns]))


def by_processes(machine: report.Machine, quick: bool) -> list[Point]:
    """Measure each number of processes in a few launches."""
    limit = torch.cuda.device_count() or os.cpu_count() or 1
    counts = [2**power for power in range(limit.bit_length())]
    taken: list[list[TurnResult]] = [[] for _ in counts]
    threaded: list[TurnResult] = []  # by one process with all threads
    for _ in range(1 if quick else 3):
        for turns, count in zip(taken, counts, strict=True):
            turns += run_launched(count, machine)
        if machine.device.type == "cpu":
            threaded += run_launched(1, machine, limit)
    found = [compute_speeds(turns) for turns in taken]
    whole = {"of_threads": compute_speeds(threaded)[0]} if threaded else {}
    return [
        Point(
            at=count,
            tokens_per_second=median,
            low=low,
            high=high,
            ideal=found[0][0] * count,
            extra={"first_loss": turns[0].losses[0], **{key: median / rate for key, rate in whole.items()}},
        )
        for count, (median, low, high), turns in zip(counts, found, taken, strict=True)
    ]


def time_dataset(config: Config, steps: int) -> dict[str, float]:
    """Return the seconds until the first step is planned, and those of the plan and batch of a later step."""
    begin = time.perf_counter()
    parts = build_parts(config)
    parts.plan.step(0)
    start = time.perf_counter() - begin
    seconds = []
    for index in range(1, steps):
        begin = time.perf_counter()
        step = parts.plan.step(index)
        (ids,) = step.micro_batches[0]
        parts.collator([parts.prepared.train[int(i)] for i in ids], ids, step.epoch)
        seconds.append(time.perf_counter() - begin)
    return {"start": start, "data": statistics.median(seconds)}


def by_dataset(machine: report.Machine, quick: bool, sizes: tuple[int, ...] = SIZES) -> list[Point]:
    """Measure the start-up with each number of examples in fresh processes, after one that encoded them, then steps."""
    places = [size for size in sizes if size <= 100_000 or not quick]
    model, context = replace(MASKED.model, config=model_fields(2, 128, 128)), multiprocessing.get_context("spawn")
    runs: list[list[dict[str, float]]] = [[] for _ in places]
    with tempfile.TemporaryDirectory() as folder:
        configs = []
        for size in places:
            data, tokens = write_corpus(Path(folder, str(size)), size, vocabulary=16384, median=10, sigma=0.6)
            config = replace(MASKED, data=data, tokens=tokens, model=model, run=Run(precision=machine.precision))
            configs.append(config)
        for number in range(2 if quick else 4):
            for found, config in zip(runs, configs, strict=True):
                with ProcessPoolExecutor(1, context) as pool:
                    figures = pool.submit(time_dataset, config, 40).result()
                if number > 0:  # the first one encodes
                    found.append(figures)
        points = measure_configs(configs, places, machine, Rounds(count=10 if quick else 50))
    for at, found in enumerate(runs):
        extra = {name: statistics.median(figures[name] for figures in found) for name in ("start", "data")}
        extra["memory"] = points[at].extra["memory"]
        points[at] = replace(points[at], ideal=points[0].tokens_per_second, extra=extra)
    return points


PARTS: dict[str, tuple[str, Callable[[report.Machine, bool], list[Point]]]] = {
    "processes": ("processes", by_processes),
    "lengths": ("tokens of an example", by_length),
    "models": ("parameters", by_model),
    "datasets": ("examples", by_dataset),
}
SHOWN = {
    "mfu": lambda value: f"MFU {value:.0%}",
    "memory": lambda value: f"{value / 1e6:,.0f} MB",
    "first_loss": lambda value: f"first loss {value:.6f}",
    "of_threads": lambda value: f"{value:.2f} of one process with all threads",
    "start": lambda value: f"start {value:.1f} s",
    "data": lambda value: f"plan and batch {1e3 * value:.1f} ms",
}


def show(name: str, points: list[Point]) -> None:
    """Print a part's table."""
    print(f"\n{PARTS[name][0]:>20}   real tokens/s (middle half)          of the ideal")
    for point in points:
        speed = f"{point.tokens_per_second:,.0f} ({point.low:,.0f} to {point.high:,.0f})"
        extra = ", ".join(SHOWN[key](value) for key, value in point.extra.items())
        print(f"{point.at:>20,}   {speed:<35}  {point.tokens_per_second / point.ideal:11.0%}   {extra}")


def draw(figure: Any, parts: dict[str, list[Point]]) -> None:
    """Draw a panel for each part, with the measurements and the ideal line."""
    panels = figure.subplots(1, len(parts), squeeze=False)[0]
    for axes, (name, points) in zip(panels, parts.items(), strict=True):
        places, speed = [point.at for point in points], [point.tokens_per_second for point in points]
        ends = [[p.tokens_per_second - p.low for p in points], [p.high - p.tokens_per_second for p in points]]
        axes.errorbar(places, speed, ends, color=report.OURS, marker="o", capsize=3, label="minilm")
        axes.plot(places, [point.ideal for point in points], color=report.IDEAL, linestyle="--", label="ideal")
        axes.set(xscale="log", yscale="log", xlabel=PARTS[name][0], ylabel="real tokens per second", title=name)
        axes.legend()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="leave out the parts that take long")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    for name in PARTS:
        parser.add_argument(f"--{name}", action="store_true", help="run only this part and other named ones")
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    machine = report.describe_machine()
    chosen = [name for name in PARTS if getattr(options, name)] or [*PARTS]
    parts = {}
    with tempfile.TemporaryDirectory() as folder:
        # The processes that this one starts keep their cache there, so that it is removed with the folder.
        os.environ["HF_HOME"] = f"{folder}/huggingface"
        for name in chosen:
            parts[name] = PARTS[name][1](machine, options.quick)
            show(name, parts[name])
    content = {name: [asdict(point) for point in points] for name, points in parts.items()}
    title = "scaling" if len(chosen) == len(PARTS) else f"scaling-{'-'.join(chosen)}"
    size = (4.2 * len(parts), 3.8)
    report.write(title, machine, content, lambda figure: draw(figure, parts), size, quick=options.quick)


if __name__ == "__main__":
    main()
