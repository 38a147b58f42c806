"""The sections of the report besides its charts, as rows of text: facts, results, settings, comparison, ledger."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from minilm.commands.charts import CONSTANTS, SHARES, TITLES, find_best
from minilm.config import Config
from minilm.config.serialization import from_dict, to_dict
from minilm.objectives.metrics import lower_is_better
from minilm.runs.ledger import ExampleTable, find_evaluations, read_evaluation
from minilm.runs.run_history import flatten_tree
from minilm.runs.run_log import LoggedRun, format_value
from minilm.utils.quantities import format_amount, format_duration, format_rate, format_share

Rows = dict[str, list[str]]
"""The cells of a table by the name of their row, one for each run."""

# The hardest examples of a run in the section on the ledger.
_HARD_EXAMPLES = 5
# Comparisons of more than this many runs with the first one would take long, and nobody reads them.
_MOST_COMPARISONS = 8
_TITLES = TITLES | {
    "eval_loss": "Evaluation loss",
    "unigram_bits_per_byte": "Bits per byte of a unigram model",
    "steps": "Steps",
    "tokens": "Tokens",
    "train_seconds": "Training time",
    "tokens_per_second": "Speed",
    "mfu": "MFU",
    "memory_gb": "Most memory",
    "energy_kwh": "Energy",
}


def name_figure(name: str) -> str:
    """Return the name of a figure for a reader."""
    return _TITLES.get(name, name)


def format_figure(name: str, value: object) -> str:
    """Return a figure as people write it: 36%, 1.2 GB, 2 min 5 s."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return format_value(value)
    if name in SHARES or name.endswith(("_share", "unknown")):
        return format_share(value)
    if name == "tokens_per_second":
        return format_rate(value, "tokens")
    if name.endswith("seconds"):
        return format_duration(value)
    if name == "memory_gb":
        return f"{format_amount(value)} GB"
    if name.startswith("energy_kwh"):
        return f"{format_amount(value)} kWh"
    return format_value(value)


def find_best_figure(run: LoggedRun) -> tuple[str, int, float] | None:
    """Return the name, the step and the value of the run's best evaluation, by `run.best_metric`."""
    config = run.facts.get("config")
    chosen = str(config["run"].get("best_metric")) if isinstance(config, dict) and "run" in config else "eval_loss"
    for name in (chosen, "eval_loss", *run.evaluations):
        best = find_best(name, run.evaluations[name]) if name in run.evaluations else None
        if best is not None:
            return name, *best
    return None


def read_last(run: LoggedRun) -> dict[str, Any]:
    """Return the results of a finished run, or the last figures of another one under the same names."""
    last = {key: curve.values[-1] for key, curve in run.evaluations.items()}
    if run.counts:
        step, tokens, seconds = run.counts[-1]
        last |= {"steps": step, "tokens": int(tokens), "train_seconds": seconds}
        if seconds:
            last["tokens_per_second"] = tokens / seconds
    memory = run.curves["memory_gb"].finite() if "memory_gb" in run.curves else []
    return {**last, **run.results, **({"memory_gb": max(memory)} if memory else {})}


def format_steps_per_second(run: LoggedRun) -> str:
    """Return the rate of the steps in the log; empty without one."""
    if not run.counts or not run.counts[-1][2]:
        return ""
    step, _, seconds = run.counts[-1]
    return format_rate(step / seconds, "steps")


def format_time(time: datetime | None) -> str:
    """Return a time in the zone of this machine, to the minute."""
    return "not recorded" if time is None else time.astimezone().strftime("%Y-%m-%d %H:%M %Z")


def format_duration_of(run: LoggedRun) -> str:
    """Return how long the run took, with its start and its evaluations where the history has them."""
    if run.duration is not None:
        return format_duration(run.duration)
    return f"{format_duration(run.counts[-1][2])} of training" if run.counts else "not recorded"


def describe_hardware(run: LoggedRun) -> str:
    """Return the device, the number of processes and the precision; empty if run.json does not have them."""
    hardware = run.facts.get("hardware")
    if not isinstance(hardware, dict) or "device" not in hardware:
        return ""
    processes = run.facts.get("processes")
    parts = [str(hardware["device"])]
    if isinstance(processes, int):
        parts.append(f"{processes} process" + ("es" if processes > 1 else ""))
    if "precision" in run.facts:
        parts.append(str(run.facts["precision"]))
    return ", ".join(parts)


def align(columns: Iterable[Mapping[str, Any]]) -> Rows:
    """Return a row for each key of any column, as text."""
    columns = list(columns)
    keys = dict.fromkeys(key for column in columns for key in column)
    return {key: [format_figure(key, column.get(key)) for column in columns] for key in keys}


def result_rows(runs: Sequence[LoggedRun]) -> Rows:
    """Return the figures of the runs: the results of finished runs, and the last figures of the others."""
    columns = [read_last(run) for run in runs]
    return {name_figure(key): cells for key, cells in align(columns).items()}


def best_cells(runs: Sequence[LoggedRun]) -> set[tuple[str, int]]:
    """Return the row of each figure of an evaluation with the number of the best run; none where all are the same."""
    last = [read_last(run) for run in runs]
    best = set()
    for key in dict.fromkeys(key for run in runs for key in run.evaluations):
        values = [columns.get(key) for columns in last]
        finite = {
            at: value for at, value in enumerate(values) if isinstance(value, int | float) and math.isfinite(value)
        }
        if len(set(finite.values())) > 1:
            sign = 1 if lower_is_better(key) else -1
            best.add((name_figure(key), min(finite, key=lambda at: sign * finite[at])))
    return best


def setting_rows(runs: Sequence[LoggedRun]) -> tuple[str, list[str], Rows]:
    """Return a title, the names of the first columns, and the settings that are worth a look.

    These are the settings that a run changed of its recipe, and those in which the runs differ. Runs without a recipe
    show what is not a default of minilm.
    """
    columns = [run.settings() for run in runs]
    differing = [key for key, values in align(columns).items() if len(set(values)) > 1]
    if all(run.changed is not None for run in runs):
        recipe: dict[str, str] = {}
        for run in runs:
            recipe |= {name: format_value(pair[0]) for name, pair in (run.changed or {}).items()}
        names = [
            name for name in dict.fromkeys(name for c in columns for name in c) if name in recipe or name in differing
        ]
        first = {name: recipe.get(name, "the same") for name in names}
        rows = {name: [first[name], *(column.get(name, "–") for column in columns)] for name in names}
        return "Settings that are not the recipe's", ["recipe"], rows
    if len(runs) > 1:
        return "Settings that differ", [], {key: [column.get(key, "–") for column in columns] for key in differing}
    config = runs[0].facts.get("config")
    objective = config.get("objective") if isinstance(config, dict) else None
    try:
        default = from_dict({"objective": {"name": objective["name"]}})  # type: ignore[index]
    except (ValueError, TypeError, KeyError):
        default = Config()
    plain = LoggedRun(folder=Path(), name="", facts={"config": to_dict(default)}).settings()
    rows = {key: [value] for key, value in columns[0].items() if plain.get(key, "–") != value}
    return "Settings other than the defaults", [], rows


def fact_rows(runs: Sequence[LoggedRun]) -> Rows:
    """Return the facts that each run recorded about its data, model, hardware and versions."""
    columns = []
    for run in runs:
        facts = {key: value for key, value in run.facts.items() if key not in ("config", "sources")}
        columns.append({"folder": str(run.folder), "command": run.command, **flatten_tree(facts, ", ")})
    return {key.replace("_", " "): cells for key, cells in align(columns).items()}


def group_seeds(runs: Sequence[LoggedRun]) -> list[tuple[str, list[int]]]:
    """Return the name and the numbers of the runs that have all settings but the seed in common, where several do."""
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for number, run in enumerate(runs):
        settings = run.settings()
        if settings.pop("run.seed", None) is not None:
            groups.setdefault(tuple(settings.items()), []).append(number)
    seeds = [[runs[number].settings()["run.seed"] for number in members] for members in groups.values()]
    return [
        (f"{_name_group(runs, members)} ({len(members)} seeds)", members)
        for members, values in zip(groups.values(), seeds, strict=True)
        if len(set(values)) > 1
    ]


def seed_rows(runs: Sequence[LoggedRun], groups: Sequence[tuple[str, list[int]]]) -> Rows:
    """Return for each figure of an evaluation the mean and the standard deviation over the seeds of each group."""
    rows: Rows = {}
    keys = dict.fromkeys(key for _, members in groups for number in members for key in runs[number].evaluations)
    for key in (key for key in keys if key not in CONSTANTS):
        cells = []
        for _, members in groups:
            values = [read_last(runs[number]).get(key) for number in members]
            finite = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
            deviation = statistics.stdev(finite) if len(finite) > 1 else None
            spread = (
                "" if deviation is None else f" ± {format_share(deviation) if key in SHARES else f'{deviation:.2g}'}"
            )
            cells.append(f"{format_figure(key, statistics.fmean(finite))}{spread}" if finite else "–")
        rows[name_figure(key)] = cells
    return rows


def _name_group(runs: Sequence[LoggedRun], members: Sequence[int]) -> str:
    """Return the name of the folder that holds these runs and none of the others, or else that of the first one."""
    parents = [run.folder.resolve().parent for run in runs]
    holders = {parents[number] for number in members}
    alone = all(number in members for number, parent in enumerate(parents) if parent in holders)
    return holders.pop().name if alone and len(holders) == 1 else runs[members[0]].name


def compare_runs(runs: Sequence[LoggedRun], groups: Sequence[tuple[str, list[int]]]) -> list[list[str]]:
    """Return rows of two runs and the difference of their last evaluations, by the documents that both evaluated.

    Each run is compared with the first one, and runs of several seeds with the first such group. A row that cannot be
    computed says why.
    """
    ended = [run for run in runs if run.status.kind != "running" and find_evaluations(run.folder)]
    rows = []
    for run in ended[1 : 1 + _MOST_COMPARISONS]:
        first, second = (find_evaluations(each.folder)[-1] for each in (ended[0], run))
        rows += [[f"{run.name} − {ended[0].name}", *cells] for cells in _compare(((str(first), str(second)),))]
    grouped = [(name, {_seed(runs[n]): runs[n] for n in members if runs[n] in ended}) for name, members in groups]
    for name, members in grouped[1:]:
        first_name, firsts = grouped[0]
        pairs = tuple(
            (str(find_evaluations(firsts[seed].folder)[-1]), str(find_evaluations(members[seed].folder)[-1]))
            for seed in sorted(firsts.keys() & members.keys())
        )
        rows += [[f"{name} − {first_name}", *cells] for cells in _compare(pairs)]
    return rows


def _seed(run: LoggedRun) -> str:
    return run.settings()["run.seed"]


@lru_cache
def _compare(pairs: tuple[tuple[str, str], ...]) -> list[list[str]]:
    """Return the cells of one row for each figure: its name, difference with the interval, p-value and count.

    pairs: files of evaluations, of one pair of runs or of a pair for each seed.
    """
    # It imports torch.
    from minilm.commands.compare import compare_seeds, compare_tables

    try:
        tables = [tuple(read_evaluation(Path(path)) for path in pair) for pair in pairs]
        differences = compare_tables(*tables[0]) if len(tables) == 1 else compare_seeds(tables)
    except ValueError as error:
        return [["–", str(error), "", ""]]
    cells = []
    for each in differences:
        half = (each.high - each.low) / 2
        digits = min(6, max(3, 1 - math.floor(math.log10(half)))) if half else 3
        clear = each.low > 0 or each.high < 0
        better = (each.difference < 0) == lower_is_better(each.figure)
        verdict = ("better" if better else "worse") if clear else "no clear difference"
        p = "< 0.001" if each.p < 0.001 else f"{each.p:.2g}"
        cells.append(
            [
                name_figure(each.figure),
                f"{each.difference:+.{digits}f} ± {half:.{digits}f}: {verdict}".replace("-", "−"),
                p,
                f"{each.count:,} {each.unit}",
            ]
        )
    return cells


def ledger_rows(run: LoggedRun) -> tuple[Rows, list[list[str]]]:
    """Return what the ledger of a run says: rows of each evaluation, and rows of the hardest examples.

    Both are empty for a run without a ledger, or with a ledger that cannot be read.
    """
    try:
        files = find_evaluations(run.folder)
        tables = [read_evaluation(path) for path in files]
    except ValueError:
        return {}, []
    if not tables:
        return {}, []
    steps = [path.stem.removeprefix("eval-") for path in files]
    rows: Rows = {}
    for step, table in zip(steps, tables, strict=True):
        quarters = np.quantile(table.mean_loss, [0.1, 0.5, 0.9])
        better = float((table.mean_loss < tables[0].mean_loss).mean())
        change = "–" if table is tables[0] else format_share(better)
        rows[f"step {int(step):,}"] = [*(f"{value:.3f}" for value in quarters), change]
    return rows, _hardest(tables)


def _hardest(tables: Sequence[ExampleTable]) -> list[list[str]]:
    first, last = tables[0], tables[-1]
    order = np.argsort(-last.mean_loss, kind="stable")[:_HARD_EXAMPLES]
    return [
        [f"example {i:,}", f"{first.mean_loss[i]:.3f}", f"{last.mean_loss[i]:.3f}", f"{last.arrays['targets'][i]:,}"]
        for i in map(int, order)
    ]
