"""What a run left in its folder (log.jsonl, run.json, all_results.json), read back as it is. Imports no torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_COUNTERS = {"step", "epoch", "tokens", "seconds"}  # figures of a step that only ever rise
_PLACES = {"output_dir", "overwrite", "resume"}  # settings of a run that change nothing in it


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A figure at some steps, in the order of the log; a value that is no finite number is NaN."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: object) -> None:
        """Add what the log has at a step."""
        known = isinstance(value, int | float) and math.isfinite(value)
        self.steps.append(step)
        self.values.append(float(value) if known else math.nan)  # type: ignore[arg-type]

    def finite(self) -> list[float]:
        """The values that are numbers."""
        return [value for value in self.values if not math.isnan(value)]


@dataclass(kw_only=True)
class LoggedRun:
    """One run, as far as its folder tells."""

    folder: Path
    name: str
    """Of the folder, or as much of its path as tells it from the others."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """Figures of the steps: loss, lr, grad_norm, …"""
    evaluations: dict[str, Curve] = field(default_factory=dict)
    """Figures of the evaluations: eval_loss, perplexity, accuracy, …"""
    spikes: list[int] = field(default_factory=list)
    """Steps whose loss was far above those before."""
    samples: dict[str, str] = field(default_factory=dict)
    """What the finished model made of each text."""
    facts: dict[str, Any] = field(default_factory=dict)
    """run.json."""
    results: dict[str, Any] = field(default_factory=dict)
    """all_results.json; nothing while the run is not finished."""
    notes: list[str] = field(default_factory=list)
    """What a reader should know before trusting the curves."""

    @property
    def last_step(self) -> int:
        """The last step in the log."""
        return max(curve.steps[-1] for curve in (*self.curves.values(), *self.evaluations.values()))

    def settings(self) -> dict[str, str]:
        """`group.name` to value, as text, without the places that it was written to."""
        found: dict[str, str] = {}
        config = self.facts.get("config")
        for group, values in config.items() if isinstance(config, dict) else ():
            for name, value in values.items() if isinstance(values, dict) else ():
                inner = {f".{key}": part for key, part in value.items()} if isinstance(value, dict) else {"": value}
                found |= {
                    f"{group}.{name}{key}": format_value(part) for key, part in inner.items() if name not in _PLACES
                }
        return found


def format_value(value: object) -> str:
    """A value of a JSON file as a reader wants it."""
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
    """The runs in these folders. ValueError for a folder without a record of any step or evaluation."""
    paths = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    ends = [path.resolve().name for path in paths]
    names = [end if ends.count(end) == 1 else str(path) for path, end in zip(paths, ends, strict=True)]
    return [_read_run(path, name) for path, name in zip(paths, names, strict=True)]


def _read_run(folder: Path, name: str) -> LoggedRun:
    if not (folder / "log.jsonl").is_file():
        found = "there is no log.jsonl in it" if folder.is_dir() else "there is no such folder"
        raise ValueError(f"{folder}: {found}: give the output folder of a run (run.output_dir)")
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
        run.notes.append(f"left out of log.jsonl, as no records: {_list_numbers('line', broken)}")
    for file_name in ("run.json", "all_results.json"):
        try:
            found = json.loads((folder / file_name).read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("no JSON object")
            run.facts, run.results = (found, run.results) if file_name == "run.json" else (run.facts, found)
        except FileNotFoundError:
            if file_name == "run.json":
                run.notes.append("there is no run.json: settings and hardware are unknown")
        except (OSError, ValueError, RecursionError) as error:
            run.notes.append(f"{file_name} cannot be read ({error})")
    _add_notes(run)
    return run


def _add_line(run: LoggedRun, line: Any) -> None:
    """Sort a line of the log; ValueError where it is none."""
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
    """Note what the curves alone do not tell."""
    for key, curve in (*run.curves.items(), *run.evaluations.items()):
        if bad := [step for step, value in zip(curve.steps, curve.values, strict=True) if math.isnan(value)]:
            run.notes.append(f"{key} is no finite number at {_list_numbers('step', bad)}")
    if run.spikes:
        run.notes.append(f"loss far above those before at {_list_numbers('step', run.spikes)} (see log.jsonl)")
    if len({step for curve in run.curves.values() for step in curve.steps}) == 1:
        run.notes.append("one step only: a point in place of each curve")
    planned = run.facts.get("steps")
    if not run.results and isinstance(planned, int) and run.last_step < planned:
        run.notes.append(f"not finished: step {run.last_step:,} of {planned:,}")


def _list_numbers(what: str, numbers: list[int]) -> str:
    several = f"{len(numbers):,} {what}s: " if len(numbers) > 1 else f"{what} "
    return several + ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
