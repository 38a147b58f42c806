"""Trackers: TensorBoard, wandb, trackio and MLflow receive the figures of log.jsonl through accelerate's classes.

Each tracker has a thread of its own, so that it does not slow the steps down. If a tracker fails or hangs, minilm logs
one warning and continues without it.
"""

import atexit
import importlib.util
import json
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from minilm.utils.atomic_files import write_atomically

log = logging.getLogger("minilm")

RUNS = "trackers.json"  # the name or id of the run in each tracker
_PATIENCE_SECONDS = 120.0  # how long all trackers together may take to start, and each one to finish
_BACKLOG_LINES = 10_000  # a tracker that is further behind is dropped


def start_trackers(
    accelerator: Accelerator, names: Sequence[str], settings: dict[str, Any], folder: Path, step: int
) -> None:
    """Start the trackers of `run.trackers`, `names`, and add them to the accelerator's, for `accelerator.log`.

    The main process calls it. `trackers.json` names the run in each tracker, and a run that is resumed after `step`
    continues that one. If a tracker is not installed or does not start, a warning says so, and the run continues
    without it.

    settings: the settings to show, by `group.name`.
    """
    runs = _read_runs(folder / RUNS) if step else {}
    feeds = []
    for name in dict.fromkeys(names):
        if importlib.util.find_spec(name) is None:
            log.warning(f"run.trackers {name} is not installed, and the run continues without it: pip install {name}")
            continue
        feeds.append(_Feed(name, folder, runs.get(name), settings, step))
    end = time.monotonic() + _PATIENCE_SECONDS
    runs |= {feed.name: feed.run for feed in feeds if feed.wait_for_start(end)}
    if runs:
        write_atomically(folder / RUNS, json.dumps(runs) + "\n")
    else:
        (folder / RUNS).unlink(missing_ok=True)
    accelerator.trackers.extend(feeds)


def _read_runs(path: Path) -> dict[str, str]:
    """Return the name or id of the earlier run in each tracker. A file that is missing or damaged holds none."""
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        runs = None
    if isinstance(runs, dict) and all(isinstance(run, str) for run in runs.values()):
        return runs
    log.warning(f"{path} cannot be read, so each tracker starts a new run")
    return {}


class _Feed:
    """A tracker with accelerate's interface. One thread makes all calls of the real tracker.

    run: the name or id of the resumed run in the tracker; None starts a new run. settings: the settings to show.
    """

    def __init__(self, name: str, folder: Path, run: str | None, settings: dict[str, Any], step: int) -> None:
        self.name, self.run = name, run or ""
        self._folder, self._settings, self._step = folder, settings, step
        self._lines: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(_BACKLOG_LINES)
        self._started, self._dropped = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        atexit.register(self.finish)  # in case the run fails
        self._thread.start()

    def wait_for_start(self, end: float) -> bool:
        """Wait until `end` of the monotonic clock, and return whether the tracker has started."""
        if not self._started.wait(max(0.0, end - time.monotonic())):
            self._drop("it did not start in time")
        return not self._dropped

    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        """Queue the figures for the thread, and return at once."""
        self._put((values, step or 0))

    def finish(self) -> None:
        """Send the remaining figures, and end the tracker's run."""
        atexit.unregister(self.finish)
        self._put(None)
        self._thread.join(0.0 if self._dropped else _PATIENCE_SECONDS)
        if self._thread.is_alive():
            self._drop("it did not finish in time")

    def _put(self, line: tuple[dict[str, float], int] | None) -> None:
        try:
            if not self._dropped:
                self._lines.put_nowait(line)
        except queue.Full:
            self._drop(f"it is {_BACKLOG_LINES:,} lines behind")

    def _drop(self, reason: str) -> None:
        if not self._dropped:
            self._dropped = True
            log.warning(
                f"run.trackers {self.name}: {reason}; the run continues without it, and log.jsonl has all figures"
            )

    def _work(self) -> None:
        try:
            tracker = LOGGER_TYPE_TO_CLASS[self.name](**_arguments(self.name, self._folder, self.run, self._step))
            tracker.start()
            if not self.run or self.name in ("wandb", "trackio"):  # these keep the latest settings
                settings = self._settings.items()
                plain = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in settings}
                tracker.store_init_configuration(plain)
            self.run = _name_of_run(self.name, tracker)
            self._started.set()
            while (line := self._lines.get()) is not None and not self._dropped:
                tracker.log(line[0], step=line[1])
            tracker.finish()
        except (Exception, SystemExit) as error:  # a tracker may raise anything
            self._drop(" ".join(str(error).split())[:300] or type(error).__name__)
        finally:
            self._started.set()


def _arguments(name: str, folder: Path, run: str, step: int) -> dict[str, Any]:
    """Return the arguments of accelerate's class for this tracker; `run` is empty for a new run."""
    title = folder.resolve().name
    if name == "tensorboard":  # its readers drop later steps that are already in the file
        return {"run_name": name, "logging_dir": folder, "purge_step": step + 1}
    if name == "mlflow":
        return {"experiment_name": "minilm", "run_name": title, "run_id": run or None}
    if name == "wandb":
        resumed = {"id": run, "resume": "allow"} if run else {}
        return {"run_name": os.environ.get("WANDB_PROJECT", "minilm"), "name": title, "dir": str(folder), **resumed}
    named = {"name": run, "resume": "allow"} if run else {"name": f"{title}-{uuid.uuid4().hex[:6]}"}
    return {"run_name": os.environ.get("TRACKIO_PROJECT", "minilm"), **named}


def _name_of_run(name: str, tracker: Any) -> str:
    if name == "tensorboard":
        return name
    return str(
        tracker.run.id if name == "wandb" else tracker.run.name if name == "trackio" else tracker.active_run.info.run_id
    )
