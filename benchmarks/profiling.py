"""Show where the time of a recipe's steps goes: shares of a step, the operators that cost most, and a trace.

    python benchmarks/profiling.py recipes/mlm_pydocs.py --steps 20
    python benchmarks/profiling.py recipes/mlm_finetune.py --model.name FOLDER --data.source my_text.txt

Every flag of the recipe works. chrome://tracing and https://ui.perfetto.dev show the trace.
"""

import argparse
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comparison import Parts, build_parts, get_precision, take_turns
from torch.profiler import ProfilerActivity, profile, record_function

from minilm.config import Config
from minilm.config.command_line import parse_flags

WARM_UP = 3  # steps before all others
ROOM = 2**24  # bytes of records that the profiler may keep for a step
PHASES = ("data", "forward", "backward", "optimizer")


def label(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` under a name for the profiler."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return call


def label_parts(config: Config) -> Parts:
    """Return the parts of a run, with names for the phases of a step that the profiler shows."""
    parts = build_parts(config)
    # Only the functions that train_step calls get names, so that the loop itself stays as it is.
    parts.accelerator.backward = label("backward", parts.accelerator.backward)
    parts.optimizer.step = label("optimizer", parts.optimizer.step)  # type: ignore[method-assign]
    parts.model.forward = label("forward", parts.model.forward)
    name = type(parts.network).__name__
    print(f"{name}, {get_precision(parts)}, {config.batch.examples} examples per step", file=sys.stderr)
    return parts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("recipe", type=Path, help="file of a recipe; the flags of the recipe may follow")
    parser.add_argument(
        "--steps", type=int, default=10, help="number of steps to time, and then to profile (default: 10)"
    )
    parser.add_argument("--rows", type=int, default=20, help="number of operators to show (default: 20)")
    parser.add_argument(
        "--trace", type=Path, default=Path("trace.json"), help="file for the trace (default: trace.json)"
    )
    options, flags = parser.parse_known_args()
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    config = parse_flags(runpy.run_path(str(options.recipe))["CONFIG"], arguments=flags)
    parts = label_parts(config)
    steps, cuda = take_turns(parts, WARM_UP + 2 * options.steps), parts.accelerator.device.type == "cuda"
    for _ in range(WARM_UP):
        next(steps)
    alone = [next(steps) for _ in range(options.steps)]
    # This allocates the memory for the profiler's records, so that no operator waits for it.
    torch.zeros(options.steps * ROOM, dtype=torch.uint8)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        taken = [next(steps) for _ in range(options.steps)]
    if not parts.accelerator.is_main_process:
        return
    events = {event.key: event for event in profiler.key_averages()}
    total, undisturbed = (sum(step.seconds for step in part) for part in (taken, alone))
    print(profiler.key_averages().table(sort_by=f"self_{'cuda' if cuda else 'cpu'}_time_total", row_limit=options.rows))
    shares = {name: events[name].cpu_time_total / 1e6 / total for name in PHASES if name in events}
    names = ("c10d::", "gloo:", "nccl:")
    shares["communication"] = (
        sum(e.self_cpu_time_total for e in events.values() if e.key.startswith(names)) / 1e6 / total
    )
    shares["rest"] = max(0.0, 1 - sum(shares[name] for name in PHASES if name in shares))
    print(
        f"{options.steps} steps, {undisturbed / options.steps * 1e3:.1f} ms each, "
        f"{sum(step.tokens for step in alone) / undisturbed:,.0f} tokens/s; "
        f"under the profiler {total / options.steps * 1e3:.1f} ms each"
    )
    print("share of a step: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    print("memory after each of the first, MB: " + ", ".join(f"{step.memory / 1e6:,.0f}" for step in alone))
    profiler.export_chrome_trace(str(options.trace))
    print(f"trace: {options.trace}")


if __name__ == "__main__":
    main()
