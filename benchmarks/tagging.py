"""Compare minilm with HF Trainer on the tags of words: F1 on held-out sentences and tokens per second, several seeds.

    python benchmarks/tagging.py MODEL --data.source train.jsonl --data.eval-source test.jsonl \
        --data.label-column chunk_tags --optim.lr 2e-4 --run.epochs 1

The settings are those of recipes/tag.py, and its flags change them. Trainer gets minilm's initial weights, examples,
batches and learning rates, DataCollatorForTokenClassification and fused AdamW. With `group_by_length` it makes its own
batches of rows of one length. In bf16 that side has transformers' eager attention, which is faster there. The masks of
dropout differ; with `--no-dropout` all updates are the same, up to rounding.

Each side runs in its own process, and only one side works at a time: they take turns of some steps, from the first step
to the last. The time of a side is that of its turns. seqeval's figures are those of the trained models on the same
sentences. Results go to benchmarks/results, as JSON and as a plot (`pip install -e ".[report]"`).
"""

import argparse
import math
import runpy
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import report
from comparison import Contender, Rounds, TurnResult, compare, run_minilm
from hf_trainer import run_trainer

from minilm.config import Config, Model
from minilm.config.command_line import parse_flags
from minilm.objectives.factory import prepare_data

CONFIG: Config = runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "tag.py"))["CONFIG"]
ROUNDS = 20
DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
FIGURES = ("f1", "accuracy", "eval_loss")


def find_contenders(config: Config, precision: str) -> list[Contender]:
    """Return minilm and its rivals. The first one has Trainer's defaults."""
    eager = precision == "bf16"
    grouped = partial(run_trainer, grouping="group_by_length", attention="eager" if eager else "auto")
    name = f"HF Trainer, group_by_length{', eager' if eager else ''}"
    return [
        Contender(name="HF Trainer", config=config, run=run_trainer),
        Contender(name=name, config=config, run=grouped),
        Contender(name="minilm", config=config, run=run_minilm),
    ]


def plan_rounds(config: Config) -> Rounds:
    """Return rounds that train for as long as the configuration says. An evaluation follows the last one."""
    steps = config.run.count_steps(math.ceil(len(prepare_data(config).train) / config.batch.examples))
    count = min(ROUNDS, steps)
    return Rounds(count=count, warm_up=0, block=steps // count, evaluated=count)


def compute_rows(names: list[str], seeds: list[list[list[TurnResult]]], peak: Any) -> list[dict[str, Any]]:
    """Return the figures of each contender. The speed is that of the turns of all seeds.

    seeds: the turns of each contender, for each seed.
    """
    joined = [[turn for turns in own for turn in turns] for own in zip(*seeds, strict=True)]
    return [
        {
            "label": name,
            "ours": name == "minilm",
            **report.compute_figures(turns, joined[0], peak),
            **{figure: [taken[at][-1].evaluation[figure] for taken in seeds] for figure in FIGURES},
            "losses": [[sum(turn.losses) / len(turn.losses) for turn in taken[at]] for taken in seeds],
        }
        for at, (name, turns) in enumerate(zip(names, joined, strict=True))
    ]


def format_seeds(values: list[float]) -> str:
    """Return the mean of a figure and its range over seeds."""
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], epilog="The flags of recipes/tag.py work too."
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of the model to fine-tune")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each side (default: 3)")
    parser.add_argument("--no-dropout", action="store_true", help="train both without dropout, to the same result")
    options, rest = parser.parse_known_args()
    fields: dict[str, Any] = dict.fromkeys(DROPOUT, 0.0) if options.no_dropout else {}
    config = parse_flags(replace(CONFIG, model=Model(name=options.model, config=fields)), arguments=rest)
    machine = report.describe_machine(config.run.precision)
    contenders = find_contenders(config, machine.precision)
    rounds = plan_rounds(config)
    seeds = []
    for seed in range(options.seeds):
        own = [replace(c, config=replace(c.config, run=replace(config.run, seed=seed))) for c in contenders]
        seeds.append(compare(own, machine.precision, rounds))
    rows = compute_rows([contender.name for contender in contenders], seeds, machine.peak)
    sentences = rounds.steps * config.batch.examples
    steps = f"{rounds.steps} steps of {config.batch.examples} ({sentences:,} sentences)"
    print(f"\n{steps}{', without dropout' * options.no_dropout}, mean of {options.seeds} seeds")
    print(f"{'':<34} F1                          evaluation loss             real tokens/s  times (middle half)")
    for row in rows:
        figures = f"{format_seeds(row['f1'])}  {format_seeds(row['eval_loss'])}"
        print(f"{row['label']:<34} {figures}  {row['tokens_per_second']:13,.0f}  {report.spread(row)}")
    name = "tagging-without-dropout" if options.no_dropout else "tagging"
    content = {"rows": rows, "steps": rounds.steps, "examples": config.batch.examples, "lr": config.optim.lr}
    report.write(name, machine, content, lambda figure: report.bars(figure.subplots(), rows), (8, 3))


if __name__ == "__main__":
    main()
