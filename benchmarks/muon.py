"""Compare Muon with AdamW: the held-out loss over the steps, and the cost of a step.

    python benchmarks/muon.py --shakespeare tinyshakespeare.txt

Each side runs in its own process and takes turns of some steps. Both sides have the same model, initial weights,
examples, order and masks. Only the optimizer of the matrices inside the layers differs.

- pydocs: recipes/mlm_pydocs.py, all of its steps.
- shakespeare: recipes/clm_shakespeare.py, all of its steps, at the recipe's learning rate and at a lower one. It needs
  https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt.
- cost: the time of a step, for the model of mlm_pydocs.py, for the RoBERTa of throughput.py (6 layers, width 384) and
  for a model of the size of BERT-base. The table has the number of examples of a step, and of their tokens.

Evaluations follow the turns and do not count. The time of the optimizer is that of its `step`, which does not include
the norm of the gradients. Results go to benchmarks/results, as JSON and as a plot (`pip install -e ".[report]"`).
"""

import argparse
import runpy
import statistics
import time
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import report
from comparison import Contender, Rounds, Task, TurnResult, build_parts, compare, take_turns
from quality import seconds_to
from throughput import MASKED, PYDOCS, with_examples

from minilm.config import Config

RECIPES = Path(__file__).parents[1] / "recipes"
SHAKESPEARE: Config = runpy.run_path(str(RECIPES / "clm_shakespeare.py"))["CONFIG"]
NAMES: dict[Any, str] = {"adamw": "AdamW", "muon": "Muon"}
OPTIMIZER = "optimizer_seconds"
PARTS = 4  # the table shows the loss after each quarter of the steps


@dataclass(frozen=True, kw_only=True)
class Job:
    """A configuration, the learning rates of both optimizers, and the rounds."""

    config: Config
    rates: tuple[float, ...]
    """AdamW's best rate comes first."""
    block: int = 100
    """Steps of a turn."""

    @property
    def rounds(self) -> Rounds:
        """The rounds, in which each contender takes all steps of the recipe."""
        assert self.config.run.max_steps is not None
        return Rounds(count=self.config.run.max_steps // self.block, warm_up=0, block=self.block, evaluated=1)

    def contenders(self) -> list[Contender]:
        """Return both optimizers at each rate. The first one is AdamW at its best rate."""
        return [contender(self.config, name, rate) for rate in self.rates for name in NAMES]


def base_size(config: Config) -> Config:
    """Return the same configuration with a model of the size of BERT-base."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    return replace(config, model=replace(config.model, config={**config.model.config, **sizes}))


JOBS = {
    "pydocs": Job(config=PYDOCS, rates=(PYDOCS.optim.lr,)),
    "shakespeare": Job(config=SHAKESPEARE, rates=(3e-3, SHAKESPEARE.optim.lr)),
}
# For the cost of a step, the configurations and their rounds.
COSTS = {
    "mlm_pydocs.py": (PYDOCS, Rounds(count=9, warm_up=1, block=20)),
    "6 layers, width 384": (MASKED, Rounds(count=9, warm_up=1, block=2)),
    "6 layers, width 384, large step": (with_examples(MASKED, 512), Rounds(count=5, warm_up=1)),
    "BERT-base": (base_size(MASKED), Rounds(count=5, warm_up=1)),
    "BERT-base, large step": (with_examples(base_size(MASKED), 1024), Rounds(count=3, warm_up=0)),
}


def contender(config: Config, name: Any, rate: float) -> Contender:
    """Return one optimizer at one learning rate."""
    config = replace(config, optim=replace(config.optim, name=name, lr=rate))
    return Contender(name=f"{NAMES[name]} at {rate:g}", config=config, run=run_timed)


def run_timed(task: Task) -> None:
    """Run minilm, and add the seconds of the optimizer to the evaluation of each turn."""
    parts = build_parts(task.config)
    update, passed = parts.optimizer.step, [0.0]

    def step(*arguments: Any) -> Any:
        begin = time.perf_counter()
        result = update(*arguments)
        passed[0] += time.perf_counter() - begin
        return result

    parts.optimizer.step = step  # type: ignore[method-assign, assignment]
    task.connection.send(parts.work)
    turns = take_turns(parts, task.turns, task.block, lead_in=task.lead_in, evaluated=task.evaluated)
    while task.connection.recv():
        passed[0] = 0.0
        turn = next(turns)
        task.connection.send(replace(turn, evaluation={**turn.evaluation, OPTIMIZER: passed[0]}))


def steps_to(loss: float, turns: list[TurnResult], block: int) -> float | None:
    """Return the steps after which these turns reached this loss, by linear interpolation; None if they did not."""
    return seconds_to(loss, [replace(turn, seconds=float(block)) for turn in turns])


def rows_of(name: str, job: Job, taken: dict[str, list[TurnResult]]) -> list[dict[str, Any]]:
    """Return the rows of a job. The first contender is the one to compare with."""
    first, *_ = taken.values()
    goal, rows = float(first[-1].eval_loss or 0), []
    for side, turns in taken.items():
        passed = list(accumulate(turn.seconds for turn in turns))
        row: dict[str, Any] = {"job": name, "name": side, "steps_of_a_turn": job.block, "goal": goal}
        row |= {"seconds": passed, "eval_loss": [turn.eval_loss for turn in turns]}
        row["figures"] = {name: x for name, x in turns[-1].evaluation.items() if name != OPTIMIZER}
        row |= report.compute_ratios(turns, first)
        row["steps_to_goal"] = steps_to(goal, turns, job.block)
        rows.append(row)
    return rows


def format_table(lines: list[list[str]]) -> str:
    """Return a table of Markdown. The first line has the names of the columns."""
    first, *others = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([first, "|---" * len(lines[0]) + "|", *others])


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return the table of a job as Markdown."""
    block, turns = rows[0]["steps_of_a_turn"], len(rows[0]["eval_loss"])
    marks = [-(-turns * (part + 1) // PARTS) for part in range(PARTS)]
    names = [rows[0]["job"], *(f"loss after {mark * block:,} steps" for mark in marks), "bits per byte"]
    names += ["bits per byte / unigram's", "speed", f"loss {rows[0]['goal']:.3f} after"]
    lines = [names]
    for row in rows:
        figures, steps = row["figures"], row["steps_to_goal"]
        cells = [row["name"], *(f"{row['eval_loss'][mark - 1]:.3f}" for mark in marks)]
        cells += [f"{figures['bits_per_byte']:.3f}"]
        cells += [f"{figures['bits_per_byte'] / figures['unigram_bits_per_byte']:.3f}"]
        lines.append([*cells, report.spread(row), "–" if steps is None else f"{steps:,.0f} steps"])
    return format_table(lines)


def cost_of(name: str, config: Config, turns: dict[str, list[TurnResult]], rounds: Rounds) -> dict[str, Any]:
    """Return the cost of a step under both optimizers."""
    adamw, muon = (turns[side] for side in NAMES)
    row: dict[str, Any] = {"job": "cost", "name": name, "examples": config.batch.examples}
    row["tokens"] = sum(turn.tokens for turn in adamw) / len(adamw) / rounds.block
    for side, taken in turns.items():
        row[f"{side}_seconds"] = statistics.median(turn.seconds for turn in taken) / rounds.block
        row[f"{side}_optimizer_seconds"] = (
            statistics.median(turn.evaluation[OPTIMIZER] for turn in taken) / rounds.block
        )
    # The ratio of the seconds is that of AdamW's speed to Muon's.
    return row | report.compute_ratios(adamw, muon)


def cost_table_of(rows: list[dict[str, Any]]) -> str:
    """Return the table of costs as Markdown."""
    sides = [f"{name}'s {part}" for part in ("step", "update") for name in NAMES.values()]
    names = ["model", "examples", "tokens", *sides, "Muon's step / AdamW's"]
    lines = [names]
    for row in rows:
        cells = [row["name"], f"{row['examples']}", f"{row['tokens']:,.0f}"]
        cells += [f"{row[f'{side}_seconds'] * 1e3:,.0f} ms" for side in NAMES]
        cells += [f"{row[f'{side}_optimizer_seconds'] * 1e3:,.1f} ms" for side in NAMES]
        lines.append([*cells, report.spread(row)])
    return format_table(lines)


def measure_costs(machine: report.Machine) -> list[dict[str, Any]]:
    """Return the rows of the table of costs."""
    rows = []
    for name, (config, rounds) in COSTS.items():
        taken = compare([contender(config, side, config.optim.lr) for side in NAMES], machine.precision, rounds)
        rows.append(cost_of(name, config, dict(zip(NAMES, taken, strict=True)), rounds))
    return rows


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the loss over the steps, one plot for each job."""
    rows = [row for row in rows if row["job"] in JOBS]
    jobs = list(dict.fromkeys(row["job"] for row in rows))
    for axes, job in zip(figure.subplots(1, len(jobs), squeeze=False)[0], jobs, strict=True):
        own = [row for row in rows if row["job"] == job]
        for number, row in enumerate(own):
            steps = [row["steps_of_a_turn"] * (turn + 1) for turn in range(len(row["eval_loss"]))]
            colour = report.OURS if row["name"].startswith(NAMES["muon"]) else report.OTHERS
            axes.plot(steps, row["eval_loss"], "-" if number < len(NAMES) else "--", color=colour, label=row["name"])
        # The first losses would leave little room for the last ones.
        axes.set_ylim(top=max(row["eval_loss"][len(row["eval_loss"]) // 8] for row in own))
        axes.set_title(job)
        axes.set_xlabel("steps")
        axes.set_ylabel("held-out loss, nats")
        axes.legend()


def draw_costs(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the time of a step under both optimizers as bars, as shares of AdamW's."""
    axes = figure.subplots()
    names = [f"{row['name']}, {row['examples']} examples" for row in rows]
    drawn = axes.barh(names, [row["ratio"] for row in rows], color=report.OURS)
    axes.bar_label(drawn, [f"{row['ratio']:.2f}" for row in rows], padding=4)
    axes.axvline(1.0, color=report.OTHERS)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlabel("time of a step with Muon / with AdamW")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--job", choices=[*JOBS, "cost"], help="run only this job")
    parser.add_argument("--shakespeare", default="input.txt", metavar="FILE", help="the text (default: input.txt)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order and masks (default: 0)")
    parser.add_argument(
        "--precision", choices=["auto", "fp32", "bf16"], default="auto", help="precision of both sides (default: auto)"
    )
    options = parser.parse_args()
    machine, rows = report.describe_machine(options.precision), []
    for name in [options.job] if options.job in JOBS else [*JOBS] if options.job is None else []:
        config = replace(JOBS[name].config, run=replace(JOBS[name].config.run, seed=options.seed))
        if name == "shakespeare":
            config = replace(config, data=replace(config.data, source=options.shakespeare))
        job = replace(JOBS[name], config=config)
        sides = job.contenders()
        taken = compare(sides, machine.precision, job.rounds)
        rows += rows_of(name, job, dict(zip([side.name for side in sides], taken, strict=True)))
        print(f"\n{table_of([row for row in rows if row['job'] == name])}")
    suffix = f"-seed-{options.seed}" if options.seed else ""
    if rows:
        name = f"muon-{options.job}" if options.job else "muon"
        report.write(name + suffix, machine, {"rows": rows}, lambda figure: draw(figure, rows), (10, 4))
    if options.job in (None, "cost"):
        costs = measure_costs(machine)
        print(f"\n{cost_table_of(costs)}")
        report.write(f"muon-cost{suffix}", machine, {"rows": costs}, lambda figure: draw_costs(figure, costs), (8, 3))


if __name__ == "__main__":
    main()
