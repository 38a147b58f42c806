"""Reading of the records of a run: log.jsonl, run.json, history.jsonl and all_results.json, without torch."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from minilm.runs.run_history import flatten_tree, read_history
from minilm.utils.folder_lock import is_locked

_COUNTERS = {"step", "epoch", "tokens", "seconds"}  # fields of a line that only rise, so that a curve says nothing
_PLACES = {"run.output_dir", "run.overwrite", "run.resume"}  # settings that do not change the result
# How deep runs are looked for in a folder that is not a run itself.
_DEPTH = 3


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The values of a figure by step, in the order of the log. NaN stands for a value that is not a finite number."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: object) -> None:
        """Add the value that the log holds for a step."""
        finite = isinstance(value, int | float) and math.isfinite(value)
        self.steps.append(step)
        self.values.append(float(value) if finite else math.nan)  # type: ignore[arg-type]

    def finite(self) -> list[float]:
        """Return the finite values."""
        return [value for value in self.values if not math.isnan(value)]


@dataclass(frozen=True, kw_only=True)
class Status:
    """How a run stands."""

    kind: str
    """`running`, `finished`, `stopped`, `failed`, `killed`, or `unknown` for a run without a history."""
    text: str
    """The step, and the reason if there is one."""


@dataclass(kw_only=True)
class LoggedRun:
    """The records of one run."""

    folder: Path
    name: str
    """The name of the folder, or the end of its path where several folders have that name."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """The figures of the steps: loss, lr, grad_norm, …"""
    evaluations: dict[str, Curve] = field(default_factory=dict)
    """The figures of the evaluations: eval_loss, perplexity, accuracy, …"""
    spikes: list[int] = field(default_factory=list)
    """The steps whose loss was far above those before."""
    samples: dict[str, str] = field(default_factory=dict)
    """The output of the finished model for each text of `run.samples`."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The content of run.json."""
    results: dict[str, Any] = field(default_factory=dict)
    """The content of all_results.json; empty while the run is not finished."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """The events of history.jsonl; empty for a run of an earlier version."""
    running: bool = False
    """Whether a process holds the lock of the folder."""
    counts: list[tuple[int, float, float]] = field(default_factory=list)
    """For each step in the log: the step, and the tokens and the seconds of training up to it."""
    notes: list[str] = field(default_factory=list)
    """What a reader should know before relying on the curves, a sentence each."""

    @property
    def last_step(self) -> int:
        """The last step in the log; 0 if it has none."""
        return max((curve.steps[-1] for curve in (*self.curves.values(), *self.evaluations.values())), default=0)

    @property
    def status(self) -> Status:
        """How the run stands, by its records and its lock."""
        planned = self.facts.get("steps")
        of = f" of {planned:,}" if isinstance(planned, int) else ""
        at = f"step {self.last_step:,}{of}"
        last = self.history[-1] if self.history else {}
        if self.results:
            return Status(kind="finished", text=f"after {self.last_step:,} steps")
        if self.running:
            return Status(kind="running", text=at)
        if last.get("event") == "end":
            reason = f": {last['reason']}" if last.get("reason") else ""
            kind = str(last.get("status"))
            known = kind in ("finished", "stopped", "failed")
            return Status(kind=kind if known else "unknown", text=f"at {at}{reason}")
        if last:
            return Status(kind="killed", text=f"at {at}, without a record of why: the process or the machine was ended")
        return Status(kind="unknown", text=f"not finished, at {at}")

    @property
    def resumed(self) -> list[int]:
        """The steps after which the run was resumed, or began as a branch of another run."""
        steps = [event.get("step") for event in self.history if event["event"] == "start"]
        return sorted({step for step in steps if isinstance(step, int) and step > 0})

    @property
    def started(self) -> datetime | None:
        """The time of the first start in the history."""
        return _read_time(self.history[0]) if self.history else None

    @property
    def duration(self) -> float | None:
        """The seconds from each start to its end, added up. The log tells when a killed process was last alive."""
        if not self.history:
            return None
        alive = datetime.now(UTC) if self.running else datetime.fromtimestamp(self._log_time, UTC)
        # A killed process that another one resumed has left no end, so that its time is not known.
        pairs = [
            (_read_time(event), _read_time(following) if following else alive)
            for event, following in zip(self.history, [*self.history[1:], None], strict=True)
            if event["event"] == "start" and (following is None or following["event"] == "end")
        ]
        seconds = [(end - start).total_seconds() for start, end in pairs if start is not None and end is not None]
        return sum(max(0.0, each) for each in seconds)

    @property
    def _log_time(self) -> float:
        return (self.folder / "log.jsonl").stat().st_mtime

    @property
    def _last_start(self) -> dict[str, Any]:
        return next((event for event in reversed(self.history) if event["event"] == "start"), {})

    @property
    def command(self) -> str:
        """The command line of the last start; empty if it was not recorded."""
        return str(self._last_start.get("command", ""))

    @property
    def changed(self) -> dict[str, list[Any]] | None:
        """The settings that differ from the recipe's, with both values; None if that was not recorded."""
        changed = self._last_start.get("changed")
        if not isinstance(changed, dict):
            return None
        pairs = {name: pair for name, pair in changed.items() if isinstance(pair, list) and len(pair) == 2}
        return {name: pair for name, pair in pairs.items() if name not in _PLACES}

    def settings(self) -> dict[str, str]:
        """Return the settings by `group.name`, as text, except those in `_PLACES`."""
        config = self.facts.get("config")
        settings = flatten_tree(config) if isinstance(config, dict) else {}
        return {name: format_value(value) for name, value in settings.items() if name not in _PLACES}


def format_value(value: object) -> str:
    """Return a value of a JSON file as text for a reader."""
    if value is None or value in ("", [], {}):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.5g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, list):
        return ("\n" if any(isinstance(part, str) and " " in part for part in value) else ", ").join(
            map(format_value, value)
        )
    return str(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _read_time(event: dict[str, Any]) -> datetime | None:
    try:
        time = datetime.fromisoformat(str(event.get("time")))
    except ValueError:
        return None
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def find_run_folders(folder: Path) -> list[Path]:
    """Return the folder itself if it is that of a run, and otherwise those of the runs in it, by name.

    Runs inside that have not recorded anything yet are left out.
    """
    if (folder / "log.jsonl").is_file():
        return [folder]
    found = []
    for place, inner, files in os.walk(folder):
        if "log.jsonl" in files and ("run.json" in files or Path(place, "log.jsonl").stat().st_size):
            found.append(Path(place))
        if "log.jsonl" in files or len(Path(place).relative_to(folder).parts) >= _DEPTH:
            inner.clear()
    return sorted(found)


def read_runs(folders: Sequence[str]) -> list[LoggedRun]:
    """Return the runs in these folders. Each is the output folder of a run, or a folder that holds such folders.

    Raise ValueError for a folder without a run, and for a run without any record.
    """
    found: list[Path] = []
    for name in folders:
        inside = find_run_folders(Path(name))
        if not inside:
            problem = "there is no log.jsonl in it" if Path(name).is_dir() else "there is no such folder"
            raise ValueError(
                f"{name}: {problem}: give the output folder of a run (run.output_dir), or a folder of them"
            )
        found += inside
    paths = list({path.resolve(): path for path in found}.values())
    return [_read_run(path, name) for path, name in zip(paths, _name_folders(paths), strict=True)]


def _name_folders(paths: Sequence[Path]) -> list[str]:
    """Return the last parts of each path, as many as tell the paths apart: two or more for a folder of `--seeds`."""
    parts = [path.resolve().parts for path in paths]
    least = [1 + bool(re.fullmatch(r"seed-\d+", each[-1])) for each in parts]
    for more in range(max(map(len, parts))):
        names = ["/".join(each[-count - more :]) for each, count in zip(parts, least, strict=True)]
        if len(set(names)) == len(names):
            break
    return names


def _read_run(folder: Path, name: str) -> LoggedRun:
    run, broken = LoggedRun(folder=folder, name=name, running=is_locked(folder), history=read_history(folder)), []
    with (folder / "log.jsonl").open("rb") as file:
        for number, text in enumerate(file, start=1):
            try:
                _add_line(run, json.loads(text))
            except (ValueError, RecursionError):
                broken.append(number)
    if not run.curves and not run.evaluations and not (folder / "run.json").exists():
        raise ValueError(f"{folder / 'log.jsonl'} has no record of a step or an evaluation yet: wait for the first")
    if broken:
        lines = _list_numbers("line", broken)
        run.notes.append(f"log.jsonl has lines that are not records, which are left out: {lines}")
    for file_name in ("run.json", "all_results.json"):
        try:
            content = json.loads((folder / file_name).read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("it is not a JSON object")
            if file_name == "run.json":
                run.facts = content
            else:
                run.results = content
        except FileNotFoundError:
            if file_name == "run.json":
                run.notes.append("there is no run.json, so the settings and the hardware are unknown")
        except (OSError, ValueError, RecursionError) as error:
            run.notes.append(f"{file_name} cannot be read ({error})")
    _add_notes(run)
    return run


def _add_line(run: LoggedRun, line: Any) -> None:
    """Add a line of the log to the run. Raise ValueError if it is not a record."""
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        raise ValueError
    step = line["step"]
    if "spike_loss" in line:
        run.spikes.append(step)
    elif "sample" in line:
        run.samples[str(line["sample"])] = str(line.get("output", ""))
    else:
        target = run.curves if "loss" in line else run.evaluations
        if "loss" in line:
            tokens, seconds = (line.get(name) for name in ("tokens", "seconds"))
            before = run.counts[-1] if run.counts else (0, 0.0, 0.0)
            known = [
                value if isinstance(value, int | float) and math.isfinite(value) else old
                for value, old in zip((tokens, seconds), before[1:], strict=True)
            ]
            run.counts.append((step, *known))
        for key, value in line.items():
            if key not in _COUNTERS and (value is None or isinstance(value, int | float)):
                target.setdefault(key, Curve()).add(step, value)


def _add_notes(run: LoggedRun) -> None:
    """Add notes on values that are not finite, spikes, and a single step."""
    for key, curve in (*run.curves.items(), *run.evaluations.items()):
        if bad := [step for step, value in zip(curve.steps, curve.values, strict=True) if math.isnan(value)]:
            run.notes.append(f"{key} is not a finite number at {_list_numbers('step', bad)}")
    if run.spikes:
        run.notes.append(
            f"the loss is far above the losses before it at {_list_numbers('step', run.spikes)} (see log.jsonl)"
        )
    if len({step for curve in run.curves.values() for step in curve.steps}) == 1:
        run.notes.append("the log has one step only, so each curve is a point")


def _list_numbers(what: str, numbers: list[int]) -> str:
    """Return text such as "3 steps: 7, 9, 12", with the first eight numbers."""
    several = f"{len(numbers):,} {what}s: " if len(numbers) > 1 else f"{what} "
    return several + ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
