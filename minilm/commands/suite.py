"""`minilm suite`: fine-tune a model on the tasks of GLUE and SuperGLUE with several learning rates and seeds."""

import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minilm.commands.fast_imports import quick_imports
from minilm.commands.job_pool import JobPool
from minilm.commands.suite_runs import SuiteRun, check_files, list_runs, parse_tasks
from minilm.commands.suite_table import format_latex, format_markdown, summarise
from minilm.utils.atomic_files import write_atomically
from minilm.utils.errors import TrainingStopped
from minilm.utils.folder_lock import lock_folder, unlock_at_end
from minilm.utils.launch_variables import is_distributed
from minilm.utils.quantities import format_duration
from minilm.utils.validation import check

if TYPE_CHECKING:
    from minilm.commands.suite_jobs import PreparedTask

log = logging.getLogger("minilm")

# Memory of a run besides weights, gradients and moments: libraries, activations and examples.
_RUN_BYTES = 2e9
# The size of the weights of a model on the hub, which is not known before it is loaded: BERT-base.
_UNKNOWN_MODEL_BYTES = 4.4e8
# Weights, gradients, two moments, and a copy of the weights while they are saved.
_COPIES = 5


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The runs of a suite, and how to run them."""

    model: str
    runs: list[SuiteRun]
    output: Path
    jobs: int | None
    """The number of runs side by side; None for as many as fit."""
    keep_models: bool


def plan_suite(
    model: str,
    *,
    tasks: Sequence[str],
    folders: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    output: str | None,
    jobs: int | None,
    keep_models: bool,
    flags: Sequence[str],
) -> Suite:
    """Return the suite that these arguments describe. Raise ValueError for arguments that it cannot run with."""
    check(
        not is_distributed(os.environ),
        "minilm suite starts its own processes: start it without accelerate launch or torchrun",
    )
    local = Path(model).expanduser()
    check(
        not local.is_dir() or (local / "config.json").is_file(),
        f"{model} has no config.json: give the folder of a checkpoint, or a hub id",
    )
    place = Path(output or Path("out", f"suite-{Path(model).resolve().name if local.is_dir() else Path(model).name}"))
    place = place.expanduser()
    runs = list_runs(model, parse_tasks(tasks), folders, rates, seeds, place, flags)
    return Suite(model=model, runs=runs, output=place, jobs=jobs, keep_models=keep_models)


@unlock_at_end()
def train_suite(suite: Suite) -> None:
    """Run what is not finished, write `table.md`, `table.tex` and `suite.json`, and print the table as Markdown.

    If all runs are finished, no file changes. Raise ValueError for data, settings or a folder that the suite cannot
    use, before any run starts; TrainingStopped after a signal, and at the end if a run failed. A later call continues.
    """
    _check_runs(suite)
    unfinished = [run for run in suite.runs if not run.is_done()]
    failures = dict[str, str]()
    if unfinished:
        suite.output.mkdir(parents=True, exist_ok=True)
        lock_folder(suite.output)
        failures = _train_all(suite, unfinished)
    print(_write_tables(suite), flush=True)
    if failures:
        name, why = next(iter(failures.items()))
        count = f"{len(failures)} of {len(suite.runs)} runs failed"
        raise TrainingStopped(f"{count} and are not in the table, such as {name}: {why}", 1)


def _check_runs(suite: Suite) -> None:
    """Raise ValueError if the output folder holds runs with other settings, or of other data."""
    check_files(suite.runs, suite.output)
    for run in suite.runs:
        run.check_settings()


def _train_all(suite: Suite, unfinished: list[SuiteRun]) -> dict[str, str]:
    """Prepare the tasks of these runs, and train the runs, the longest first. Return the names of those that failed.

    The dictionary has the reason for each of them.
    """
    from minilm.commands.suite_jobs import Training, train_run

    failures = {}
    finished, total = len(suite.runs) - len(unfinished), len(suite.runs)
    with _open_pool(suite, len(unfinished)) as pool:
        tasks = _prepare_tasks(pool, unfinished, suite.output, measure=False)
        work = {run.name: tasks[run.task.name].tokens for run in unfinished}
        # A long run that starts last would run alone at the end.
        queue = sorted(unfinished, key=lambda run: -work[run.name])
        start, done = time.monotonic(), 0.0
        try:
            for job, failure in pool.call(
                train_run, [Training(run=run, keep_models=suite.keep_models) for run in queue]
            ):
                run = job.run
                finished, done = finished + 1, done + work[run.name]
                left = format_duration((time.monotonic() - start) * (sum(work.values()) / done - 1))
                if failure is not None:
                    failures[run.name] = failure
                log.info(f"[{finished}/{total}] {run.name}: {_describe_result(run)}; about {left} left")
        except KeyboardInterrupt:
            log.info("the runs save their checkpoints; the same command continues the suite")
            raise
        except TrainingStopped as stopped:
            raise TrainingStopped(f"{stopped}; the same command continues the suite", stopped.status) from stopped
    return failures


def _describe_result(run: SuiteRun) -> str:
    figures = run.read_figures()
    if figures is None:
        return "failed"
    return ", ".join(f"{title} {figures[name]:.3f}" for name, title in run.task.figures.items())


def _prepare_tasks(
    pool: JobPool, runs: Sequence[SuiteRun], output: Path, *, measure: bool
) -> dict[str, "PreparedTask"]:
    """Read and encode the data of all tasks, before any run starts, and return what a run of each takes."""
    from minilm.commands.suite_jobs import Preparation, prepare_task

    first = {run.task.name: run for run in reversed(runs)}
    log.info(f"reading and encoding {', '.join(reversed(first))} …")
    prepared = {}
    for job, result in pool.call(
        prepare_task, [Preparation(run=run, output=output, measure=measure) for run in reversed(first.values())]
    ):
        prepared[job.run.task.name] = result
        for note in result.notes:
            log.warning(note)
    return prepared


def _open_pool(suite: Suite, runs: int) -> JobPool:
    """Return a pool with as many processes as fit the processors and the memory, or one for each GPU."""
    with quick_imports():
        import torch

        from minilm.distributed.hardware import measure_memory, usable_processors
    processors = usable_processors()
    devices = [str(number) for number in range(torch.cuda.device_count())]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        devices = visible.split(",")[: len(devices)]
    memory = measure_memory()
    needed = _RUN_BYTES + _COPIES * _measure_model(suite.model)
    fitting = len(devices) or (processors if memory is None else min(processors, int(memory.free / needed)))
    jobs = min(runs, suite.jobs or max(1, fitting))
    threads = max(1, processors // jobs)
    log.info(f"{jobs} run{'s' if jobs > 1 else ''} side by side, {threads} thread{'s' if threads > 1 else ''} each")
    return JobPool(jobs, threads, devices)


def _measure_model(name: str) -> float:
    """Return the size of the weights of a model in bytes, in float32."""
    sizes = [path.stat().st_size for path in Path(name).expanduser().glob("*.safetensors")]
    return sum(sizes) or _UNKNOWN_MODEL_BYTES


def describe_suite(suite: Suite) -> str:
    """Return the runs of the suite with their steps, states and estimated times. Nothing is written to its folder."""
    _check_runs(suite)
    unfinished = [run for run in suite.runs if not run.is_done()]
    tasks: dict[str, PreparedTask] = {}
    jobs = 1
    if unfinished:
        with tempfile.TemporaryDirectory() as folder, _open_pool(suite, len(unfinished)) as pool:
            jobs = pool.jobs
            tasks = _prepare_tasks(pool, unfinished, Path(folder), measure=True)
    lines, seconds = [], 0.0
    for run in suite.runs:
        if run.read_figures() is not None:
            lines.append(f"{run.name:<32} finished")
            continue
        task, step = tasks[run.task.name], run.find_step()
        left = (task.seconds or 0.0) * (1 - step / task.steps)
        seconds += left
        state = f"from step {step:,} of {task.steps:,}" if step else f"{task.steps:,} steps"
        lines.append(f"{run.name:<32} {state}, {format_duration(left)}")
    lines.append(f"{len(unfinished)} of {len(suite.runs)} runs to do in {suite.output}, {jobs} side by side")
    if unfinished:
        lines.append(f"about {format_duration(seconds / jobs)}; starts and saving are not counted")
    return "\n".join(lines)


def _write_tables(suite: Suite) -> str:
    """Write the results of the finished runs to the output folder, and return the table as Markdown."""
    summary = summarise(suite.model, suite.runs)
    table = format_markdown(summary)
    files = {"table.md": table, "table.tex": format_latex(summary), "suite.json": json.dumps(summary, indent=2)}
    for name, content in files.items():
        path, text = suite.output / name, f"{content}\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, text)
    return table
