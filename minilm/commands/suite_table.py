"""The results of `minilm suite`, as JSON, Markdown and LaTeX. This file does not import torch."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from minilm.commands.suite_runs import SuiteRun
from minilm.data.glue import TASKS, Task

NOTE = (
    "The learning rate of each task is the one with the highest median on the validation set that the figures come "
    "from. This is the usual practice, and it makes the figures a little higher than those on new data would be: more "
    "so for small validation sets (WNLI, CB, COPA, RTE) and for many rates."
)

Figures = Mapping[str, float]


def summarise(model: str, runs: Sequence[SuiteRun]) -> dict[str, Any]:
    """Return the summary of the finished runs, as JSON types.

    The score of a run is the mean of the figures of its task. The best learning rate of a task has the highest median
    of the scores over seeds; the first one of several. The figures of a task are the medians over the seeds of that
    rate, with the lowest and the highest value. The average of a benchmark is the mean of its tasks' scores, without
    WNLI. None stands for a number that is not finite.
    """
    tasks = {}
    for task in dict.fromkeys(run.task.name for run in runs):
        rates: dict[float, dict[int, Figures]] = {}
        for run in runs:
            if run.task.name == task and (figures := run.read_figures()) is not None:
                rates.setdefault(run.config.optim.lr, {})[run.config.run.seed] = figures
        if rates:
            tasks[task] = _summarise_task(TASKS[task], rates)
    averages = {}
    for benchmark in dict.fromkeys(TASKS[name].benchmark for name in tasks):
        counted = [name for name in tasks if TASKS[name].benchmark == benchmark and name != "wnli"]
        scores = [tasks[name]["score"] for name in counted]
        if counted:
            average = None if None in scores else statistics.fmean(scores)
            averages[benchmark] = {"score": average, "tasks": counted}
    return {"model": model, "tasks": tasks, "averages": averages, "note": NOTE}


def _summarise_task(task: Task, rates: Mapping[float, Mapping[int, Figures]]) -> dict[str, Any]:
    medians = {rate: _median([*map(_score, seeds.values())]) for rate, seeds in rates.items()}
    best = max(medians, key=lambda rate: medians[rate])
    chosen = rates[best]
    figures = {}
    for name in task.figures:
        values = [figures_of_run[name] for figures_of_run in chosen.values()]
        numbers = {"median": _median(values), "lowest": min(map(_order, values)), "highest": max(map(_order, values))}
        figures[name] = {key: _finite(value) for key, value in numbers.items()}
    return {
        "benchmark": task.benchmark,
        "rate": best,
        "seeds": [*chosen],
        "score": _finite(medians[best]),
        "figures": figures,
        "rates": {
            f"{rate:g}": {
                "score": _finite(medians[rate]),
                "runs": {
                    str(seed): {name: _finite(value) for name, value in own.items()} for seed, own in seeds.items()
                },
            }
            for rate, seeds in rates.items()
        },
    }


def _score(figures: Figures) -> float:
    return statistics.fmean(figures.values())


def _median(values: Sequence[float]) -> float:
    """Return the median, in which a figure that is not a number counts as the lowest."""
    return statistics.median(map(_order, values))


def _order(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


_HEADER = ("task", "figure", "median", "lowest to highest", "best rate", "seeds")


def _list_cells(summary: Mapping[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    """Return the cells of a row for each task, and for each average."""
    rows = []
    for name, result in summary["tasks"].items():
        task = TASKS[name]
        figures = [result["figures"][figure] for figure in task.figures]
        spread = " / ".join(f"{_percent(each['lowest'])} to {_percent(each['highest'])}" for each in figures)
        medians = " / ".join(_percent(each["median"]) for each in figures)
        rows.append(
            [
                task.title,
                " / ".join(task.figures.values()),
                medians,
                spread,
                f"{result['rate']:g}",
                str(len(result["seeds"])),
            ]
        )
    averages = []
    for benchmark, average in summary["averages"].items():
        without = " without WNLI" if benchmark == "GLUE" else ""
        count = f"{len(average['tasks'])} task{'s' if len(average['tasks']) > 1 else ''}"
        averages.append([f"{benchmark} average{without}", count, _percent(average["score"]), "", "", ""])
    return rows, averages


def _percent(value: float | None) -> str:
    """Return a figure times 100, as papers print it."""
    return "-" if value is None else f"{100 * value:.1f}"


def format_markdown(summary: Mapping[str, Any]) -> str:
    """Return the table as Markdown, with columns of equal width, and the note about the choice of the rate."""
    rows, averages = _list_cells(summary)
    table = [list(_HEADER), *rows, *averages]
    widths = [max(len(row[column]) for row in table) for column in range(len(_HEADER))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:]), "", summary["note"]])


def format_latex(summary: Mapping[str, Any]) -> str:
    """Return the table as LaTeX, which needs no package."""
    rows, averages = _list_cells(summary)
    header, body, end = ([f"{' & '.join(row)} \\\\" for row in part] for part in ([_HEADER], rows, averages))
    lines = ["\\hline", *header, "\\hline", *body, "\\hline", *end, "\\hline"]
    return "\n".join([f"% {summary['note']}", "\\begin{tabular}{llrrrr}", *lines, "\\end{tabular}"])
