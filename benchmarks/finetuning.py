"""Compare AdamW and Muon in fine-tuning: the figures on held-out examples, for several learning rates and seeds.

    python benchmarks/finetuning.py classify f1 MODEL --data.source mrpc_train.tsv \
        --data.eval-source mrpc_validation.tsv --data.column sentence1 --data.pair-column sentence2
    python benchmarks/finetuning.py tag f1 MODEL --data.source train.jsonl --data.eval-source test.jsonl \
        --data.label-column chunk_tags

The settings are those of the recipe, and its flags change them. Results go to benchmarks/results, as JSON and as a plot
(`pip install -e ".[report]"`).
"""

import argparse
import runpy
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import report

from minilm.config import Config, Model
from minilm.config.command_line import parse_flags
from minilm.train import train

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES: dict[Any, str] = {"adamw": "AdamW", "muon": "Muon"}


def run_once(config: Config) -> dict[str, float]:
    """Return the figures of a run. Its model is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        return train(replace(config, run=replace(config.run, output_dir=folder, save_every=0))).figures


def compute_rows(config: Config, rates: list[float], seeds: int) -> list[dict[str, Any]]:
    """Return the figures of all seeds for each optimizer and learning rate."""
    rows = []
    for name, label in NAMES.items():
        for rate in rates:
            optim = replace(config.optim, name=name, lr=rate)
            runs = [run_once(replace(config, optim=optim, run=replace(config.run, seed=seed))) for seed in range(seeds)]
            rows.append({"label": f"{label} at {rate:g}", "ours": name == "muon", "figures": runs})
    return rows


def format_spread(values: list[float]) -> str:
    """Return the mean of a figure and its range over seeds."""
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def table_of(rows: list[dict[str, Any]], metric: str) -> str:
    """Return the table as Markdown."""
    lines = [f"| optimizer | {metric} | evaluation loss | seconds of training |", "|---|---|---|---|"]
    for row in rows:
        columns = [[run[name] for run in row["figures"]] for name in (metric, "eval_loss", "train_seconds")]
        cells = [format_spread(columns[0]), format_spread(columns[1]), f"{statistics.median(columns[2]):.0f}"]
        lines.append(f"| {' | '.join([row['label'], *cells])} |")
    return "\n".join(lines)


def draw(axes: Any, rows: list[dict[str, Any]], metric: str) -> None:
    """Draw the figure of each seed as a point."""
    for row in rows:
        values = [run[metric] for run in row["figures"]]
        axes.plot(values, [row["label"]] * len(values), "o", color=report.OURS if row["ours"] else report.OTHERS)
    axes.invert_yaxis()
    axes.set_xlabel(metric)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], epilog="The flags of the recipe work too."
    )
    parser.add_argument("recipe", choices=["classify", "tag"], help="recipe to take the settings from")
    parser.add_argument("metric", metavar="METRIC", help="figure to compare, such as f1 or accuracy")
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of the model to fine-tune")
    parser.add_argument(
        "--rates", type=float, nargs="+", metavar="LR", help="learning rates of both (default: the recipe's)"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each side (default: 3)")
    options, rest = parser.parse_known_args()
    recipe: Config = runpy.run_path(str(RECIPES / f"{options.recipe}.py"))["CONFIG"]
    config = parse_flags(replace(recipe, model=Model(name=options.model)), arguments=rest)
    machine = report.describe_machine(config.run.precision)
    config = replace(config, run=replace(config.run, precision=machine.precision))
    rows = compute_rows(config, options.rates or [config.optim.lr], options.seeds)
    print(f"\n{table_of(rows, options.metric)}")
    content = {"rows": rows, "metric": options.metric, "examples": config.batch.examples, "epochs": config.run.epochs}
    report.write(
        f"finetuning-{options.recipe}",
        machine,
        content,
        lambda figure: draw(figure.subplots(), rows, options.metric),
        (8, 3),
    )


if __name__ == "__main__":
    main()
