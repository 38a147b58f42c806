"""Charts: the curves of several runs as SVG or as one PNG picture (with matplotlib), and plots of plain characters."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from minilm.runs.run_log import Curve, LoggedRun

# Colours of the runs' lines on a light and on a dark page, with enough contrast for text.
COLOURS = ("#0072b2", "#c44e00", "#00815f", "#b0508a", "#6a4fb3", "#8a7000")
DARK_COLOURS = ("#56b4e9", "#ff9550", "#2ec4a0", "#e39ac6", "#a995f0", "#e0c040")
# The seventh run and later ones repeat the colours with other dashes.
_DASHES = ("", "6 3", "2 2", "8 3 2 3")

# Titles of figures by their names in the log. A figure without a title is shown under its name.
_TITLES = {
    "loss": "Training loss (nats per target)",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_second": "Real tokens per second",
    "mfu": "MFU (fraction of the peak)",
    "memory_gb": "Most memory so far (GB)",
    "eval_loss": "Evaluation loss",
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
}
_NOISY = {"loss", "grad_norm", "tokens_per_second", "mfu"}
# This figure is constant in a run and is among the results.
_LEFT_OUT = {"unigram_bits_per_byte"}
_FROM_ZERO = {"lr", "tokens_per_second", "mfu", "memory_gb"}
# An axis is logarithmic where the largest value is more than this many times the smallest.
_WIDE_RANGE = 30
# Maximum number of points of a curve. A chart has fewer pixels across.
_MOST_POINTS = 600
_WIDTH, _HEIGHT = 380, 210
# Edges of the area of the curves, in the units of the SVG.
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 360, 10, 186


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The chart of one figure, with a curve for each run that has it."""

    title: str
    curves: dict[int, Curve]
    """Curves by the number of the run."""
    noisy: bool
    """Whether the bold line is a running mean over a fiftieth of the curve. Otherwise it is the curve itself."""
    dots: bool
    """Whether each value has a dot, since there are few."""
    steps: tuple[float, float]
    """Ends of the horizontal axis."""
    values: tuple[float, float]
    """Ends of the vertical axis."""
    log: bool
    """Whether the vertical axis is logarithmic."""

    def main_line(self, number: int) -> Curve:
        """Return the bold line of a run: its curve, or the running mean of a noisy one."""
        curve = self.curves[number]
        window = len(curve.steps) // 50 if self.noisy else 0
        return Curve(steps=curve.steps, values=_running_means(curve.values, window)) if window > 1 else curve


def build_panels(runs: Sequence[LoggedRun]) -> list[Panel]:
    """Return a panel for each figure of the steps and then of the evaluations, in the order of the logs."""
    steps = [
        step for run in runs for curves in (run.curves, run.evaluations) for c in curves.values() for step in c.steps
    ]
    ends = (float(min(0, *steps)), float(max(1, *steps)))
    built = []
    for part in ("curves", "evaluations"):
        for key in dict.fromkeys(key for run in runs for key in getattr(run, part) if key not in _LEFT_OUT):
            curves = {i: getattr(run, part)[key] for i, run in enumerate(runs) if key in getattr(run, part)}
            longest = max(len(curve.steps) for curve in curves.values())
            noisy = key in _NOISY and longest >= 100
            values = [value for curve in curves.values() for value in curve.finite()]
            low, high, log = _axis_range(values, from_zero=key in _FROM_ZERO)
            title = _TITLES.get(key, key)
            dots = part == "evaluations" or longest <= 2
            built.append(
                Panel(title=title, curves=curves, noisy=noisy, dots=dots, steps=ends, values=(low, high), log=log)
            )
    return built


def _axis_range(values: list[float], *, from_zero: bool) -> tuple[float, float, bool]:
    """Return the ends of an axis for these values, and whether it is logarithmic."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if not from_zero and low > 0 and high / low > _WIDE_RANGE:
        return low / 1.1, high * 1.1, True
    low = min(0.0, low) if from_zero else low
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low if from_zero else low - room, high + room, False


def _running_means(values: list[float], window: int) -> list[float]:
    """Return at each position the mean of the last `window` values that are not NaN; NaN if all of them are."""
    means, total, count = [], 0.0, 0
    for at, value in enumerate(values):
        if not math.isnan(value):
            total, count = total + value, count + 1
        if at >= window and not math.isnan(old := values[at - window]):
            total, count = total - old, count - 1
        means.append(total / count if count else math.nan)
    return means


def _thin(curve: Curve) -> list[tuple[int, float]]:
    """Return the points of a curve. If it has too many, keep the lowest, highest and missing ones of each stretch."""
    points = list(zip(curve.steps, curve.values, strict=True))
    if len(points) <= _MOST_POINTS:
        return points
    size, kept = math.ceil(2 * len(points) / _MOST_POINTS), []
    for at in range(0, len(points), size):
        part = points[at : at + size]
        finite = [point for point in part if not math.isnan(point[1])]
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else set()
        gap = {next(point for point in part if math.isnan(point[1]))} if len(finite) < len(part) else set()
        kept += sorted(ends | gap)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def choose_ticks(low: float, high: float, *, log: bool, most: int = 6) -> list[float]:
    """Return round numbers from low to high, at most about `most` of them."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        few = (1, 2, 5) if len(decades) <= 4 else (1,)
        numbers = [factor * 10.0**decade for decade in decades for factor in few]
        inside = [number for number in numbers if low <= number <= high]
        return inside[:: math.ceil(len(inside) / (2 * most))]
    raw = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw * 0.999)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def format_number(value: float) -> str:
    """Return a short form of a number for an axis: 0.05, 12, 20k, 1.5M, 1e-05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size * 10 <= abs(value) < 1e12 or (size <= abs(value) < 1e12 and letter != "k"):
            return f"{value / size:g}{letter}"
    return f"{value:.4g}"


def colour_variable(number: int) -> str:
    """Return the CSS variable with a run's colour. The page sets it to one of COLOURS or DARK_COLOURS."""
    return f"var(--run{number % len(COLOURS)})"


def line_style(number: int) -> str:
    """Return the colour and dashes of a run's lines as SVG attributes."""
    dashes = _DASHES[number // len(COLOURS) % len(_DASHES)]
    return f'style="stroke:{colour_variable(number)}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")


def draw_svg(panel: Panel, names: Sequence[str]) -> str:
    """Return the panel as an SVG element.

    Its attribute data-curves has the values to show under the pointer, as JSON.
    """
    (first, last), (low, high) = panel.steps, panel.values

    def place(step: float, value: float) -> tuple[float, float]:
        scale = math.log if panel.log else float
        height = (scale(value) - scale(low)) / (scale(high) - scale(low))
        return _LEFT + (_RIGHT - _LEFT) * (step - first) / (last - first), _BOTTOM - (_BOTTOM - _TOP) * height

    parts = [f'<path class="axis" d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}"/>']
    for tick in choose_ticks(low, high, log=panel.log):
        _, y = place(first, tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{format_number(tick)}</text>')
    for tick in filter(float.is_integer, choose_ticks(first, last, log=False, most=5)):
        x, _ = place(tick, high)
        parts.append(f'<text x="{x:.1f}" y="{_BOTTOM + 17}" text-anchor="middle">{format_number(tick)}</text>')
    data_curves, summaries = [], []
    for number, curve in panel.curves.items():
        bold = panel.main_line(number)
        lines = [*([("thin", curve)] if panel.noisy else []), ("bold", bold)]
        for kind, line in lines:
            parts.append(f'<path class="{kind}" {line_style(number)} d="{_draw_path(_thin(line), place)}"/>')
        if panel.dots:
            spots = [place(*point) for point in _thin(curve) if not math.isnan(point[1])]
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:{colour_variable(number)}"/>' for x, y in spots
            ]
        bad = [place(step, high)[0] for step, value in _thin(curve) if math.isnan(value)]
        parts += [f'<path class="bad" d="M{x:.1f} {_BOTTOM - 9}v9"/>' for x in bad]
        points = [(step, None if math.isnan(v) else float(f"{v:.5g}")) for step, v in _thin(bold)]
        data_curves.append({"run": number, "steps": [p[0] for p in points], "values": [p[1] for p in points]})
        finite = curve.finite()
        summaries.append(
            f"{names[number]}: " + (f"{finite[0]:.4g} to {finite[-1]:.4g}" if finite else "no finite value")
        )
    data = json.dumps(
        {"from": first, "to": last, "left": _LEFT, "right": _RIGHT, "curves": data_curves}, separators=(",", ":")
    )
    label = escape(f"{panel.title}; {'; '.join(summaries)}")
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}" data-curves="{escape(data)}">'
        f'{"".join(parts)}<path class="cursor" d="M0 {_TOP}V{_BOTTOM}" visibility="hidden"/></svg>'
    )


def _draw_path(points: list[tuple[int, float]], place: Callable[[float, float], tuple[float, float]]) -> str:
    """Return the commands of an SVG path through the points. The path is broken where a value is missing."""
    commands, drawing = [], False
    for step, value in points:
        if math.isnan(value):
            drawing = False
            continue
        x, y = place(step, value)
        commands.append(f"{'L' if drawing else 'M'}{x:.1f} {y:.1f}" + ("" if drawing else "h0"))
        drawing = True
    return "".join(commands)


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
        for number, curve in panel.curves.items():
            if panel.noisy:
                axes.plot(curve.steps, curve.values, color=styles[number]["color"], alpha=0.3, linewidth=0.6)
            bold, marker = panel.main_line(number), "o" if panel.dots else None
            axes.plot(bold.steps, bold.values, marker=marker, markersize=3, **styles[number])
        axes.set(title=panel.title, xlim=panel.steps, ylim=panel.values, yscale="log" if panel.log else "linear")
        axes.grid(alpha=0.3)
    for axes in list(grid)[len(panels) :]:
        axes.set_visible(False)
    legend = [Line2D([], [], **style) for style in styles]
    figure.legend(legend, [name.replace("$", r"\$") for name in names], loc="outside lower center", ncols=3)
    figure.savefig(path, format="png", dpi=120)
