"""Reading of the records of a run: log.jsonl, run.json and all_results.json. This module does not import torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_COUNTERS = {"step", "epoch", "tokens", "seconds"}  # fields of a line that only rise, so that a curve says nothing
_PLACES = {"output_dir", "overwrite", "resume"}  # settings that do not change the result


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


@dataclass(kw_only=True)
class LoggedRun:
    """The records of one run."""

    folder: Path
    name: str
    """The name of the folder, or its path where several folders have that name."""
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
    notes: list[str] = field(default_factory=list)
    """What a reader should know before relying on the curves, a sentence each."""

    @property
    def last_step(self) -> int:
        """The last step in the log."""
        return max(curve.steps[-1] for curve in (*self.curves.values(), *self.evaluations.values()))

    def settings(self) -> dict[str, str]:
        """Return the settings by `group.name`, as text, except those in `_PLACES`."""
        settings: dict[str, str] = {}
        config = self.facts.get("config")
        for group, values in config.items() if isinstance(config, dict) else ():
            for name, value in values.items() if isinstance(values, dict) else ():
                inner = {f".{key}": part for key, part in value.items()} if isinstance(value, dict) else {"": value}
                settings |= {
                    f"{group}.{name}{key}": format_value(part) for key, part in inner.items() if name not in _PLACES
                }
        return settings


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


def read_runs(folders: Sequence[str]) -> list[LoggedRun]:
    """Return the runs in these folders. Raise ValueError for a folder whose log has no step and no evaluation."""
    paths = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    ends = [path.resolve().name for path in paths]
    names = [end if ends.count(end) == 1 else str(path) for path, end in zip(paths, ends, strict=True)]
    return [_read_run(path, name) for path, name in zip(paths, names, strict=True)]


def _read_run(folder: Path, name: str) -> LoggedRun:
    if not (folder / "log.jsonl").is_file():
        problem = "there is no log.jsonl in it" if folder.is_dir() else "there is no such folder"
        raise ValueError(f"{folder}: {problem}: give the output folder of a run (run.output_dir)")
    run, broken = LoggedRun(folder=folder, name=name), []
    with (folder / "log.jsonl").open("rb") as file:
        for number, text in enumerate(file, start=1):
            try:
                _add_line(run, json.loads(text))
            except (ValueError, RecursionError):
                broken.append(number)
    if not run.curves and not run.evaluations:
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
        for key, value in line.items():
            if key not in _COUNTERS and (value is None or isinstance(value, int | float)):
                target.setdefault(key, Curve()).add(step, value)


def _add_notes(run: LoggedRun) -> None:
    """Add notes on values that are not finite, spikes, a single step, and a run that is not finished."""
    for key, curve in (*run.curves.items(), *run.evaluations.items()):
        if bad := [step for step, value in zip(curve.steps, curve.values, strict=True) if math.isnan(value)]:
            run.notes.append(f"{key} is not a finite number at {_list_numbers('step', bad)}")
    if run.spikes:
        run.notes.append(
            f"the loss is far above the losses before it at {_list_numbers('step', run.spikes)} (see log.jsonl)"
        )
    if len({step for curve in run.curves.values() for step in curve.steps}) == 1:
        run.notes.append("the log has one step only, so each curve is a point")
    planned = run.facts.get("steps")
    if not run.results and isinstance(planned, int) and run.last_step < planned:
        run.notes.append(f"the run is not finished: it is at step {run.last_step:,} of {planned:,}")


def _list_numbers(what: str, numbers: list[int]) -> str:
    """Return text such as "3 steps: 7, 9, 12", with the first eight numbers."""
    several = f"{len(numbers):,} {what}s: " if len(numbers) > 1 else f"{what} "
    return several + ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
