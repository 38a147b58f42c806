"""Charts: the curves of several runs as data for the page or as one PNG picture, and plots of plain characters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilm.objectives.metrics import lower_is_better
from minilm.runs.run_log import Curve, LoggedRun

# Colours of the runs' lines on a light and on a dark page, with enough contrast for text.
COLOURS = ("#0072b2", "#c44e00", "#00815f", "#b0508a", "#6a4fb3", "#8a7000")
DARK_COLOURS = ("#56b4e9", "#ff9550", "#2ec4a0", "#e39ac6", "#a995f0", "#e0c040")
# The seventh run and later ones repeat the colours with other dashes.
_DASHES = ("", "6 3", "2 2", "8 3 2 3")

# Titles of figures by their names in the log. A figure without a title is shown under its name.
TITLES = {
    "loss": "Loss (nats per target)",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_second": "Real tokens per second",
    "mfu": "MFU (share of the peak)",
    "memory_gb": "Most memory so far (GB)",
    "eval_loss": "Evaluation loss",
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "accuracy": "Accuracy",
}
_NOISY = {"loss", "grad_norm", "tokens_per_second", "mfu"}
# This figure is constant in a run and is among the results.
CONSTANTS = {"unigram_bits_per_byte"}
_FROM_ZERO = {"lr", "tokens_per_second", "mfu", "memory_gb"}
# Figures that are shares of 1, which a reader expects in percent.
SHARES = {"mfu", "accuracy"}
# An axis is logarithmic where the largest value is more than this many times the smallest.
_WIDE_RANGE = 30
# Maximum number of points of a curve on the page. A chart has hardly more pixels across.
_MOST_POINTS = 600


@dataclass(frozen=True, kw_only=True)
class Line:
    """The curve of one run in a chart."""

    run: int
    """The number of the run."""
    part: str
    """`training` or `evaluation`."""
    curve: Curve
    best: tuple[int, float] | None = None
    """The step and the value of the best evaluation."""


@dataclass(kw_only=True)
class Panel:
    """The chart of one figure."""

    key: str
    """The name of the figure in the log."""
    title: str
    lines: list[Line] = field(default_factory=list)

    @property
    def values(self) -> list[float]:
        """All values that are finite."""
        return [value for line in self.lines for value in line.curve.finite()]

    @property
    def log(self) -> bool:
        """Whether the values are so different that the vertical axis should be logarithmic."""
        low, high = min(self.values, default=1.0), max(self.values, default=1.0)
        return self.key not in _FROM_ZERO and low > 0 and high / low > _WIDE_RANGE

    @property
    def noisy(self) -> bool:
        """Whether the curves are worth smoothing."""
        return self.key in _NOISY and max(len(line.curve.steps) for line in self.lines) >= 100


def build_panels(runs: Sequence[LoggedRun]) -> list[Panel]:
    """Return a panel for each figure of the steps and then of the evaluations, in the order of the logs.

    The losses of training and evaluation share a panel.
    """
    panels: dict[str, Panel] = {}
    for part in ("training", "evaluation"):
        for number, run in enumerate(runs):
            curves = run.curves if part == "training" else run.evaluations
            for name, curve in curves.items():
                key = "loss" if name == "eval_loss" and any("loss" in each.curves for each in runs) else name
                if key not in CONSTANTS:
                    panel = panels.setdefault(key, Panel(key=key, title=TITLES.get(key, key)))
                    best = find_best(name, curve) if part == "evaluation" else None
                    panel.lines.append(Line(run=number, part=part, curve=curve, best=best))
    return list(panels.values())


def find_best(name: str, curve: Curve) -> tuple[int, float] | None:
    """Return the step and the value of the best evaluation by the figure of this name, the first if several are."""
    points = [point for point in zip(curve.steps, curve.values, strict=True) if not math.isnan(point[1])]
    sign = 1 if lower_is_better(name) else -1
    return min(points, key=lambda point: sign * point[1]) if points else None


def describe_panel(panel: Panel, names: Sequence[str]) -> str:
    """Return a sentence that describes the curves of a panel to a screen reader."""
    parts = []
    for line in panel.lines:
        finite = line.curve.finite()
        values = f"{finite[0]:.4g} to {finite[-1]:.4g}" if finite else "no finite value"
        best = f", best {line.best[1]:.4g} at step {line.best[0]:,}" if line.best else ""
        part = f", {line.part}" if len({each.part for each in panel.lines}) > 1 else ""
        parts.append(f"{names[line.run]}{part}: {values}{best}")
    return f"{panel.title}. {'; '.join(parts)}."


def chart_data(runs: Sequence[LoggedRun], panels: Sequence[Panel], groups: Sequence[tuple[str, list[int]]]) -> Any:
    """Return what `report.js` draws, as JSON types.

    groups: the name and the numbers of the runs that differ in their seed alone.
    """
    return {
        "runs": [
            {
                "name": run.name,
                "colour": colour_variable(number),
                "dashes": _DASHES[number // len(COLOURS) % len(_DASHES)],
                "axis": _axis(run),
                "resumed": run.resumed,
            }
            for number, run in enumerate(runs)
        ],
        "groups": [{"name": name, "runs": members} for name, members in groups],
        "panels": [
            {
                "key": panel.key,
                "log": panel.log,
                "noisy": panel.noisy,
                "percent": panel.key in SHARES,
                "from_zero": panel.key in _FROM_ZERO,
                "lower": lower_is_better("eval_loss" if panel.key == "loss" else panel.key),
                "parts": len({line.part for line in panel.lines}),
                "curves": [_curve_data(line) for line in panel.lines],
            }
            for panel in panels
        ],
    }


def _axis(run: LoggedRun) -> dict[str, list[float]]:
    """Return steps with the tokens and the seconds of training up to each, at most about `_MOST_POINTS` of them."""
    counts = run.counts
    stride = math.ceil(len(counts) / _MOST_POINTS) or 1
    kept = [(0, 0.0, 0.0), *counts[::stride]]
    if counts and kept[-1] != counts[-1]:
        kept.append(counts[-1])
    return {
        "step": [step for step, _, _ in kept],
        "tokens": [tokens for _, tokens, _ in kept],
        "seconds": [round(seconds, 2) for _, _, seconds in kept],
    }


def _curve_data(line: Line) -> dict[str, Any]:
    """Return a curve as points. A point of a long curve is the mean of several steps, with their lowest and highest."""
    curve = line.curve
    size = math.ceil(len(curve.steps) / _MOST_POINTS)
    parts = [slice(at, at + size) for at in range(0, len(curve.steps), size)]
    values = [[value for value in curve.values[part] if not math.isnan(value)] for part in parts]
    bad = [step for step, value in zip(curve.steps, curve.values, strict=True) if math.isnan(value)]
    data: dict[str, Any] = {
        "run": line.run,
        "part": line.part,
        "steps": [curve.steps[part][-1] for part in parts],
        "values": [_short(sum(part) / len(part)) if part else None for part in values],
        "bad": bad[:: math.ceil(len(bad) / _MOST_POINTS) or 1],
        "best": line.best and {"step": line.best[0], "value": _short(line.best[1])},
    }
    if size > 1:
        data["low"] = [_short(min(part)) if part else None for part in values]
        data["high"] = [_short(max(part)) if part else None for part in values]
    return data


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def format_number(value: float) -> str:
    """Return a short form of a number for an axis: 0.05, 12, 20k, 1.5M, 1e-05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size * 10 <= abs(value) < 1e12 or (size <= abs(value) < 1e12 and letter != "k"):
            return f"{value / size:g}{letter}"
    return f"{value:.4g}"


def colour_variable(number: int) -> str:
    """Return the CSS variable with a run's colour. The page sets it to one of COLOURS or DARK_COLOURS."""
    return f"var(--run{number % len(COLOURS)})"


def draw_swatch(number: int) -> str:
    """Return a short line in a run's colour and dashes, as an SVG element."""
    dashes = _DASHES[number // len(COLOURS) % len(_DASHES)]
    style = f'style="--own:{colour_variable(number)}"'
    return (
        f'<svg class="swatch" data-run="{number}" viewBox="0 0 24 10" aria-hidden="true" {style}>'
        f'<path d="M0 5H24" stroke-dasharray="{dashes}"/></svg>'
    )


def draw_text(points: Sequence[tuple[int, float]], high: float, *, rows: int = 6) -> list[str]:
    """Return a plot of plain characters, with one column for each (step, value).

    The values lie between 0, at the bottom, and `high`, at the top. The last line has the first and the last step.
    """
    heights = [round((rows - 1) * value / high) for _, value in points]
    labels = [format_number(high), *[""] * (rows - 2), "0"]
    margin = max(map(len, labels))
    lines = []
    for row, label in zip(reversed(range(rows)), labels, strict=True):
        marks = "".join("*" if height == row else " " for height in heights)
        lines.append(f"{label:>{margin}} |{marks}".rstrip())
    first, last = f"step {points[0][0]:,}", f"{points[-1][0]:,}" if len(points) > 1 else ""
    lines.append(f"{'':{margin}}  {first}{last:>{max(len(last) + 1, len(points) - len(first))}}".rstrip())
    return lines


def write_png(path: Path, panels: Sequence[Panel], names: Sequence[str]) -> None:
    """Write all panels as one picture, three in a row. Raise ValueError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ValueError('--png needs matplotlib: pip install "minilm[report]"') from error
    rows = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(13, 2.9 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, 3, squeeze=False).flat
    styles: list[dict[str, Any]] = [
        {"color": COLOURS[n % 6], "linestyle": ("-", "--", ":", "-.")[n // 6 % 4]} for n in range(len(names))
    ]
    for axes, panel in zip(grid, panels, strict=False):
        for line in panel.lines:
            curve, style = line.curve, styles[line.run]
            window = len(curve.steps) // 50 if panel.noisy and line.part == "training" else 0
            if window > 1:
                axes.plot(curve.steps, curve.values, color=style["color"], alpha=0.3, linewidth=0.6)
            bold = running_means(curve.values, window) if window > 1 else curve.values
            marker = "o" if line.part == "evaluation" or len(curve.steps) < 3 else None
            axes.plot(curve.steps, bold, marker=marker, markersize=3, **style)
        axes.set(title=panel.title, yscale="log" if panel.log else "linear")
        if panel.key in _FROM_ZERO:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    for axes in list(grid)[len(panels) :]:
        axes.set_visible(False)
    legend = [Line2D([], [], **style) for style in styles]
    figure.legend(legend, [name.replace("$", r"\$") for name in names], loc="outside lower center", ncols=3)
    figure.savefig(path, format="png", dpi=120)


def running_means(values: list[float], window: int) -> list[float]:
    """Return at each position the mean of the last `window` values that are not NaN; NaN if all of them are."""
    means, total, count = [], 0.0, 0
    for at, value in enumerate(values):
        if not math.isnan(value):
            total, count = total + value, count + 1
        if at >= window and not math.isnan(old := values[at - window]):
            total, count = total - old, count - 1
        means.append(total / count if count else math.nan)
    return means
