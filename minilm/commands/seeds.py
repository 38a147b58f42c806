"""The flag `--seeds`: train once per seed in one job, and write the mean and deviation of the figures."""

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
from minilm.distributed.launch import broadcast_from_main, join_job, lost_peer_as_error, one_job, restore_on_error
from minilm.runs.output_folder import choose_output_dir, explain_unwritable_folder, is_free
from minilm.runs.train_result import TrainResult
from minilm.utils.atomic_files import write_atomically
from minilm.utils.errors import TrainingStopped
from minilm.utils.folder_lock import lock_folder, unlock_at_end, unlock_folder
from minilm.utils.signals import get_last_signal

log = logging.getLogger("minilm")

SUMMARY = "seeds.json"


@lost_peer_as_error()
@restore_on_error()
@unlock_at_end()
def train_seeds(
    config: Config, name: str, seeds: Sequence[int], train_function: Callable[[Config, str], TrainResult]
) -> dict[str, Any]:
    """Call `train_function(config, name)` once per seed, and return the summary of the figures.

    Each run writes to `seed-<n>` of the output folder. `seeds.json` there is written after each seed, so that it has
    the summary of the finished seeds even if a later one fails. Raise whatever `train_function` raises, and
    TrainingStopped after a signal between two seeds.
    """
    results: dict[int, dict[str, float]] = {}
    with one_job():
        main = join_job(config.run).is_main_process
        folder = broadcast_from_main(lambda: _claim_folder(config.run, name))
        for number, seed in enumerate(seeds, start=1):
            _stop_if_signalled(config, results)
            log.info(f"seed {seed}, {number} of {len(seeds)}")
            results[seed] = _train_once(config, name, seed, folder, train_function, results)
            # Free the memory of this model before the next one is built.
            clear_device_cache(garbage_collection=True)
            summary = summarise_seeds(results)
            if main:
                write_atomically(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    if main:
        _print_summary(summary, folder)
    return summary


def _claim_folder(run: Run, name: str) -> Path:
    """Create the folder of all seeds, lock it against other jobs, and return it.

    Raise ValueError if another run has taken the folder, or if it cannot be written.
    """
    folder, _ = choose_output_dir(run, name)
    with explain_unwritable_folder(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
        free = run.overwrite or is_free(folder)
    if not free:
        raise ValueError(
            f"another run has taken run.output_dir {folder} in the meantime: give another --run.output-dir"
        )
    return folder


def _remove_empty(folder: Path) -> None:
    """Unlock the folder after the first seed was refused, and remove it if it is empty."""
    unlock_folder(folder)
    with suppress(OSError):
        folder.rmdir()


def _train_once(
    config: Config,
    name: str,
    seed: int,
    folder: Path,
    train_function: Callable[[Config, str], TrainResult],
    finished: Mapping[int, object],
) -> dict[str, float]:
    """Train one seed. If it ends early, say how to resume that seed alone, and which seeds are finished."""
    place = str(folder / f"seed-{seed}")
    try:
        return train_function(replace(config, run=replace(config.run, seed=seed, output_dir=place)), name).figures
    except ValueError:
        if not finished:
            _remove_empty(folder)
        raise
    except TrainingStopped as stopped:
        alone = f"--run.seed {seed} --run.output-dir {place} in place of --seeds"
        raise TrainingStopped(f"{stopped} (with {alone}); {_list_finished(finished)}", stopped.status) from stopped


def _stop_if_signalled(config: Config, finished: Mapping[int, object]) -> None:
    """Raise TrainingStopped on all processes if one of them received a signal after its last run had ended."""
    join_job(config.run)
    if number := max(gather_object([get_last_signal()])):
        raise TrainingStopped(f"{signal.Signals(number).name} between seeds; {_list_finished(finished)}", 128 + number)


def _list_finished(finished: Mapping[int, object]) -> str:
    return f"finished seeds: {', '.join(map(str, finished)) or 'none'}"


def summarise_seeds(results: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Return for each figure the mean, the sample standard deviation (divisor n - 1) and the values by seed.

    None stands for a number that is not finite, such as the deviation of a single value: JSON has no such numbers.
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


def _print_summary(summary: Mapping[str, Any], folder: Path) -> None:
    width = max(map(len, summary))
    print(f"{'':<{width}}  {'mean':>12}  {'deviation':>12}")
    for name, figure in summary.items():
        mean, std = ("-" if figure[key] is None else f"{figure[key]:.5g}" for key in ("mean", "std"))
        print(f"{name:<{width}}  {mean:>12}  {std:>12}")
    print(f"values by seed: {folder / SUMMARY}", flush=True)
