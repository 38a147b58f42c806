"""`--seeds`: the same run once per seed, in one job, and the mean and deviation of its figures."""

import json
import logging
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache

from minilm.config import Config, Run
from minilm.distributed.launch import explain_lost_contact, join_job, one_job, restore_on_error, together
from minilm.runs.early_stopping import TrainingStopped
from minilm.runs.output_folder import choose_output_dir, is_free, refuse_unwritable
from minilm.utils.atomic_files import write_atomically
from minilm.utils.folder_lock import lock_folder, unlock_at_end, unlock_folder
from minilm.utils.signals import get_last_signal

log = logging.getLogger("minilm")

SUMMARY = "seeds.json"


@explain_lost_contact()
@restore_on_error()
@unlock_at_end()
def sweep(
    config: Config, name: str, seeds: Sequence[int], trains: Callable[[Config, str], dict[str, float]]
) -> dict[str, Any]:
    """Call `trains(config, name)` once per seed, each into `seed-<n>` of the output folder, and return the summary.

    `seeds.json` is written after each seed, so that a sweep that ends early leaves the summary of the seeds that it
    finished. Raises whatever `trains` raises, and TrainingStopped after a signal between two seeds.
    """
    results: dict[int, dict[str, float]] = {}
    with one_job():
        main = join_job(config.run).is_main_process
        folder = together(lambda: _claim(config.run, name), main_only=True)
        for number, seed in enumerate(seeds, start=1):
            _stop_if_signalled(config, results)
            log.info(f"seed {seed}, {number} of {len(seeds)}")
            results[seed] = _train_seed(config, name, seed, folder, trains, results)
            clear_device_cache(garbage_collection=True)  # the next run has room for a model of its own
            summary = summarise(results)
            if main:
                write_atomically(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    if main:
        _show(summary, folder)
    return summary


def _claim(run: Run, name: str) -> Path:
    """Create the sweep's folder and lock it before the first seed, so that two sweeps never share it.

    Raises ValueError where another run has taken the folder, or where it cannot be written.
    """
    folder, _ = choose_output_dir(run, name)
    with refuse_unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
        free = run.overwrite or is_free(folder)
    if not free:
        raise ValueError(
            f"another run has taken run.output_dir {folder} in the meantime: give another --run.output-dir"
        )
    return folder


def _remove_empty(folder: Path) -> None:
    """Unlock the folder of a sweep whose first seed was refused, and remove it if it is empty."""
    unlock_folder(folder)
    with suppress(OSError):
        folder.rmdir()


def _train_seed(
    config: Config,
    name: str,
    seed: int,
    folder: Path,
    trains: Callable[[Config, str], dict[str, float]],
    finished: Mapping[int, object],
) -> dict[str, float]:
    place = str(folder / f"seed-{seed}")
    try:
        return trains(replace(config, run=replace(config.run, seed=seed, output_dir=place)), name)
    except ValueError:
        if not finished:
            _remove_empty(folder)
        raise
    except TrainingStopped as stopped:
        alone = f"--run.seed {seed} --run.output-dir {place} in place of --seeds"
        raise TrainingStopped(f"{stopped} (with {alone}); {_list_finished(finished)}", stopped.status) from stopped


def _stop_if_signalled(config: Config, finished: Mapping[int, object]) -> None:
    """Raise TrainingStopped on all processes where one of them received a signal too late for its run."""
    join_job(config.run)
    if number := max(gather_object([get_last_signal()])):
        raise TrainingStopped(f"{signal.Signals(number).name} between seeds; {_list_finished(finished)}", 128 + number)


def _list_finished(finished: Mapping[int, object]) -> str:
    return f"finished seeds: {', '.join(map(str, finished)) or 'none'}"


def summarise(results: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Return the mean, the standard deviation of the sample (divisor n - 1) and the values by seed of each figure.

    None stands for numbers that are not finite, which JSON lacks, such as the deviation of a single value.
    """
    summary: dict[str, Any] = {}
    for name in dict.fromkeys(name for figures in results.values() for name in figures):
        values = {str(seed): figures[name] for seed, figures in results.items() if name in figures}
        array = np.array(list(values.values()), np.float64)
        with np.errstate(invalid="ignore"):
            std = float(array.std(ddof=1)) if len(array) > 1 else math.nan
        finite = {seed: _finite(value) for seed, value in values.items()}
        summary[name] = {"mean": _finite(float(array.mean())), "std": _finite(std), "values": finite}
    return summary


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _show(summary: Mapping[str, Any], folder: Path) -> None:
    width = max(map(len, summary))
    print(f"{'':<{width}}  {'mean':>12}  {'deviation':>12}")
    for name, figure in summary.items():
        mean, std = ("-" if figure[key] is None else f"{figure[key]:.5g}" for key in ("mean", "std"))
        print(f"{name:<{width}}  {mean:>12}  {std:>12}")
    print(f"values by seed: {folder / SUMMARY}", flush=True)
