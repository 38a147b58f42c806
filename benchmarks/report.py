"""The output of a benchmark: rows of figures on the screen, and JSON and a plot in benchmarks/results."""

import json
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import Precision, TurnResult

from minilm.distributed.hardware import describe
from minilm.distributed.precision import Peak, choose_precision, device_peak
from minilm.runs.run_facts import library_versions

RESULTS = Path(__file__).parent / "results"
OURS, OTHERS, IDEAL = "#c44e52", "#8c8c8c", "#4c72b0"  # colours
COLUMNS = f"{'':<42} real tokens/s   of the first (middle half)   padding    MFU   memory"
COLUMNS_WITHOUT_MFU = COLUMNS.replace("    MFU", "")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The device and precision of a benchmark."""

    device: torch.device
    precision: Precision
    peak: Peak
    hardware: dict[str, Any]

    @property
    def title(self) -> str:
        """The device, threads and precision in a few words."""
        where = "" if self.device.type == "cuda" else f"{self.hardware['threads_per_process']} threads, "
        return f"{self.hardware['device']}, {where}{self.precision}"


def describe_machine(asked: Precision = "auto") -> Machine:
    """Return the first GPU or else the CPU, with the requested precision or the fastest one, and print it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision: Any = choose_precision(asked, device).name
    machine = Machine(
        device=device, precision=precision, peak=device_peak(device, precision), hardware=describe(device)
    )
    print(f"{machine.title}; MFU against {machine.peak.flops / 1e9:,.0f} GFLOP/s, {machine.peak.source}")
    return machine


def compute_ratios(turns: list[TurnResult], others: list[TurnResult]) -> dict[str, float]:
    """Return how many times faster the turns are than `others` of the same rounds: median and interquartile range."""
    pairs = zip(turns, others, strict=True)
    found = sorted((a.tokens / a.seconds) / (b.tokens / b.seconds) for a, b in pairs)
    quarter = len(found) // 4
    return {"ratio": statistics.median(found), "ratio_low": found[quarter], "ratio_high": found[-1 - quarter]}


def compute_figures(turns: list[TurnResult], first: list[TurnResult], peak: Peak | None = None) -> dict[str, float]:
    """Return the figures of one row, with the MFU if there is a peak. `first` are the turns to compare with."""
    seconds, tokens = sum(turn.seconds for turn in turns), sum(turn.tokens for turn in turns)
    mfu = {} if peak is None else {"mfu": sum(turn.flops for turn in turns) / seconds / peak.flops}
    return {
        "tokens_per_second": tokens / seconds,
        **compute_ratios(turns, first),
        "padding": 1 - tokens / sum(turn.padded_tokens for turn in turns),
        "peak_memory": turns[-1].memory,
        **mfu,
        "rounds": len(turns),
    }


def compute_loss_difference(a: list[TurnResult], b: list[TurnResult]) -> float:
    """Return the largest difference of the losses of a step, in nats; NaN if a loss is NaN."""
    ours, theirs = (np.concatenate([turn.losses for turn in turns]) for turns in (a, b))
    return float(np.abs(ours - theirs).max())


def line(name: str, row: dict[str, Any]) -> str:
    """Return a row of the table under `COLUMNS`, or under `COLUMNS_WITHOUT_MFU` if the row has no MFU."""
    mfu = f"  {row['mfu']:5.0%}" if "mfu" in row else ""
    return (
        f"{name:<42} {row['tokens_per_second']:13,.0f}   {spread(row):<26} {row['padding']:8.1%}{mfu}  "
        f"{row['peak_memory'] / 1e9:4.1f} GB"
    )


def spread(row: dict[str, float]) -> str:
    """Return a ratio with its interquartile range as text."""
    return f"{row['ratio']:.2f}x ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"


def bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the tokens per second of the rows as bars, with their ratios at the ends."""
    colours = [OURS if row["ours"] else OTHERS for row in rows]
    drawn = axes.barh([row["label"] for row in rows], [row["tokens_per_second"] for row in rows], color=colours)
    axes.bar_label(drawn, [f"{row['ratio']:.2f}x" for row in rows], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlabel("real tokens per second")


def write(
    name: str, machine: Machine, content: dict[str, Any], draw: Callable[[Any], None], size: Any, *, quick: bool = False
) -> Path:
    """Write `content`, the hardware and the versions as JSON, and a plot by `draw`; return the path of the JSON file.

    size: of the figure, in inches. The files of a quick run have other names than those of a full run.
    """
    RESULTS.mkdir(exist_ok=True)
    name += "-quick" if quick else ""
    path = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', f'{name} {machine.title}'.lower()).strip('-')}.json"
    facts = {"hardware": machine.hardware, "versions": library_versions(), "precision": machine.precision}
    path.write_text(json.dumps({**facts, **content}, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}", end="")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('; for a plot, pip install -e ".[report]"')
        return path
    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    figure.suptitle(machine.title, fontsize=10)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(f" and {path.with_suffix('.png').name}")
    return path
