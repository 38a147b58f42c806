"""Where the time of a recipe's steps goes: shares of a step, the operators that cost most, and a trace to look at.

    python benchmarks/profiling.py recipes/mlm_pydocs.py --steps 20
    python benchmarks/profiling.py recipes/mlm_finetune.py --model.name FOLDER --data.source my_text.txt

Every flag of the recipe works. The trace opens in chrome://tracing or https://ui.perfetto.dev.
"""

import argparse
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sides import peak_memory
from torch.profiler import ProfilerActivity, profile, record_function

from minilm.config import Config
from minilm.head import freeze_unused
from minilm.launch import start
from minilm.objectives import build, objective_of, prepare
from minilm.optim import build_optimizer, learning_rate
from minilm.settings import parse
from minilm.train import lay_out, load_steps, seed_dropout, train_step

WARM_UP = 3  # steps before the profiler looks
PHASES = ("data", "forward", "backward", "optimizer")


def labelled(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, seen by the profiler under `name`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return call


def steps_of(config: Config, count: int) -> tuple[Any, Iterator[int]]:
    """(the accelerator, an iterator that takes a step each time and gives its real tokens)."""
    accelerator, precision = start(config.run)
    prepared, objective = prepare(config), objective_of(config.objective)
    network = build(config, prepared)
    head = objective.head(network.to(accelerator.device), prepared)
    freeze_unused(head)
    model, optimizer = accelerator.prepare(head, build_optimizer(head, config.optim))
    plan, collator, _ = lay_out(config, accelerator, head, prepared)
    # The phases are what train_step calls, seen from outside, so that the loop stays as it is.
    accelerator.backward = labelled("backward", accelerator.backward)
    optimizer.step = labelled("optimizer", optimizer.step)
    model.forward = labelled("forward", model.forward)
    model.train()
    print(f"{type(network).__name__}, {precision.name}, {config.batch.examples} examples a step", file=sys.stderr)

    def run() -> Iterator[int]:
        loader = iter(load_steps(plan, prepared.train, collator, accelerator, range(count), config.batch.workers))
        for index in range(count):
            with record_function("data"):
                step, micro_batches = next(loader)
            seed_dropout(config.run.seed, index, accelerator.process_index)
            lr = learning_rate(config.optim, index, count)
            train_step(accelerator, model, optimizer, micro_batches, lr=lr, max_grad_norm=config.optim.max_grad_norm)
            yield step.tokens

    return accelerator, run()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("recipe", type=Path, help="a recipe's file; its flags may follow")
    parser.add_argument("--steps", type=int, default=10, help="steps to profile (default: 10)")
    parser.add_argument("--rows", type=int, default=20, help="operators to show (default: 20)")
    parser.add_argument("--trace", type=Path, default=Path("trace.json"), help="where to (default: trace.json)")
    options, flags = parser.parse_known_args()
    config = parse(runpy.run_path(str(options.recipe))["CONFIG"], arguments=flags)
    accelerator, steps = steps_of(config, WARM_UP + options.steps)
    cuda = accelerator.device.type == "cuda"
    for _ in range(WARM_UP):
        next(steps)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    memory, seconds, tokens = [], [], 0
    with profile(activities=activities) as seen:
        for _ in range(options.steps):
            mark = time.perf_counter()
            tokens += next(steps)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - mark)
            memory.append(torch.cuda.max_memory_allocated() if cuda else peak_memory())
    if not accelerator.is_main_process:
        return
    events = {event.key: event for event in seen.key_averages()}
    total = sum(seconds)
    print(seen.key_averages().table(sort_by=f"self_{'cuda' if cuda else 'cpu'}_time_total", row_limit=options.rows))
    shares = {name: events[name].cpu_time_total / 1e6 / total for name in PHASES if name in events}
    names = ("c10d::", "gloo:", "nccl:")
    shares["communication"] = (
        sum(e.self_cpu_time_total for e in events.values() if e.key.startswith(names)) / 1e6 / total
    )
    shares["rest"] = max(0.0, 1 - sum(shares[name] for name in PHASES if name in shares))
    print(
        f"{options.steps} steps, {total / options.steps * 1e3:.1f} ms each under the profiler, "
        f"{tokens / total:,.0f} tokens/s"
    )
    print("share of a step: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    print("memory after each step, MB: " + ", ".join(f"{size / 1e6:,.0f}" for size in memory))
    seen.export_chrome_trace(str(options.trace))
    print(f"trace: {options.trace}")


if __name__ == "__main__":
    main()
