"""Measure the held-out loss after equal training time, and how soon each side reaches the loss of HF Trainer.

    python benchmarks/quality.py --contenders all

There are two jobs. Each side runs in its own process and takes turns of some steps, until its turns have taken
`--seconds`. minilm's exact evaluation measures the loss after each turn. The time of a side is that of its turns,
without start-up and evaluations. All sides have the same model, initial weights and hyper-parameters, but for the
optimizer and its learning rate. The learning rate stays constant after its warm-up, so that the loss after some steps
does not depend on the number of steps that follow. Each side first tries its learning rates for a fifth of the time
each, and then starts anew with the one that had the lowest loss.

- documents: the RoBERTa of throughput.py (6 layers, width 384, vocabulary 16,384), with 32 documents of at most 128
  tokens per step.
- pydocs: the model of recipes/mlm_pydocs.py, a small ModernBERT on full blocks.

HF Trainer and minilm have the same batches, and fused AdamW. `--contenders` adds more sides, by name, or `all`:

- fastest: Trainer with the unbiased settings that are fastest in throughput.py: `batch_rebalance` with 4 micro-batches
  for documents, `sparse_prediction` for pydocs, and in bf16 `eager` attention. The sides below have these settings too.
- adafactor, adagrad, rmsprop, sgd (with Nesterov's momentum): the optimizers of Trainer that need no other package.
- torch-muon: `torch.optim.Muon` for the matrices inside the layers and fused AdamW for the rest.
- group_by_length: Trainer with batches of documents of one length.
- defaults: Trainer's own hyper-parameters, but for the schedule.
- muon: minilm with `optim.name=muon`.
- epoch: minilm with batches of documents of one length (`group=epoch`).

The time at which a side reached a loss is interpolated between two evaluations. Results go to benchmarks/results, as
JSON and as a plot (`pip install -e ".[report]"`).
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import report
from comparison import Contender, Rounds, Task, TurnResult, compare, run_minilm
from hf_trainer import MUON, find_obstacle, run_trainer
from throughput import MASKED, MICRO_BATCHES, PYDOCS

from minilm.config import Config, MaskedLM, Optim

TRAINER, MINILM = "HF Trainer", "minilm"
STYLES = ("-", "--", "-.", ":", (0, (1, 3)), (0, (5, 5)), (0, (3, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))
TRIAL = 0.2  # part of the time for which a side tries each of its learning rates


def constant(config: Config, **changed: Any) -> Config:
    """Return the same configuration with a constant learning rate after the warm-up."""
    return replace(config, optim=replace(config.optim, schedule="constant", **changed))


@dataclass(frozen=True, kw_only=True)
class Job:
    """A configuration, the learning rates of each optimizer, and Trainer's fastest settings."""

    config: Config
    rates: dict[str, tuple[float, ...]]
    """Learning rates to choose from, by optimizer."""
    block: int
    """Steps of a turn."""
    speed: float
    """An upper bound of the steps per second of each side."""
    fastest: dict[str, Any]
    """Arguments of `run_trainer` for the fastest unbiased settings of Trainer."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's configuration that belong to these settings."""
    documents: bool = False
    """Whether the lengths of the examples differ."""

    def rounds(self, seconds: float) -> Rounds:
        """Return rounds in which each side trains for these seconds."""
        count = math.ceil(self.speed * seconds / self.block)
        return Rounds(count=count, warm_up=0, block=self.block, evaluated=1, seconds=seconds)


JOBS = {
    "documents": Job(
        config=constant(MASKED, warmup=20),
        rates={
            "adamw": (1e-4, 3e-4),
            "muon": (3e-4, 6e-4, 1.2e-3),
            "adafactor": (1e-4, 3e-4),
            "adagrad": (1e-3, 3e-3),
            "rmsprop": (3e-5, 1e-4),
            "sgd": (0.03, 0.1),
        },
        block=10,
        speed=10,
        fastest={"grouping": "batch_rebalance", "accumulation": MICRO_BATCHES},
        documents=True,
    ),
    "pydocs": Job(
        config=constant(PYDOCS),
        rates={
            "adamw": (2e-3, 5e-3),
            "muon": (2e-3, 5e-3, 1e-2),
            "adafactor": (2e-3, 5e-3),
            "adagrad": (1e-2, 3e-2),
            "rmsprop": (3e-4, 1e-3),
            "sgd": (0.1, 0.3),
        },
        block=50,
        speed=40,
        fastest={},
        fields={"sparse_prediction": True},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Side:
    """A contender whose learning rate is not chosen yet."""

    config: Config
    run: Callable[[Task], None]
    rates: tuple[float, ...]
    obstacle: str | None = None
    """As `Contender.obstacle`."""

    def at(self, name: str, rate: float) -> Contender:
        """Return the contender with this learning rate."""
        config = replace(self.config, optim=replace(self.config.optim, lr=rate))
        return Contender(name=name, config=config, run=self.run)


def sides_of(job: Job, precision: str) -> dict[str, Side]:
    """Return all sides of a job by name."""
    config, rates = job.config, job.rates
    attention = "eager" if precision == "bf16" else "auto"
    fast_config = replace(config, model=replace(config.model, config={**config.model.config, **job.fields}))
    fast_run = partial(run_trainer, attention=attention, **job.fastest)
    fast = Side(
        config=fast_config,
        run=fast_run,
        rates=rates["adamw"],
        obstacle=find_obstacle(job.fastest.get("grouping", "")),
    )

    def with_optimizer(name: str, arguments: str | None = None) -> Side:
        run = partial(fast_run, optimizer=name, optimizer_arguments=arguments)
        return replace(fast, run=run, rates=rates[name])

    own = Optim(lr=5e-5, betas=(0.9, 0.999), warmup=0, weight_decay=0.0, schedule="constant")
    defaults = replace(config, objective=MaskedLM(rate=0.15), optim=own)
    sides = {
        TRAINER: Side(config=config, run=run_trainer, rates=rates["adamw"]),
        "fastest": fast,
        "adafactor": with_optimizer("adafactor"),
        "adagrad": with_optimizer("adagrad"),
        "rmsprop": with_optimizer("rmsprop"),
        "sgd": with_optimizer("sgd", "momentum=0.9,nesterov=true"),
        "torch-muon": with_optimizer(MUON),
        "defaults": Side(config=defaults, run=partial(run_trainer, grouping="random"), rates=(own.lr,)),
        MINILM: Side(config=config, run=run_minilm, rates=rates["adamw"]),
    }
    muon = replace(config, optim=replace(config.optim, name="muon"))
    sides["muon"] = replace(sides[MINILM], config=muon, rates=rates["muon"])
    if job.documents:
        run = partial(run_trainer, grouping="group_by_length", attention=attention)
        sides["group_by_length"] = replace(sides[TRAINER], run=run)
        epoch = replace(config, batch=replace(config.batch, group="epoch"))
        sides["epoch"] = replace(sides[MINILM], config=epoch)
    return sides


def full_name(name: str, side: Side) -> str:
    """Return the name of a side in the table."""
    if name in (TRAINER, MINILM):
        return name
    return f"{MINILM if side.run is run_minilm else TRAINER}, {name}"


def choose_rate(name: str, side: Side, precision: Any, rounds: Rounds) -> dict[float, float]:
    """Return the loss of a side at each of its learning rates, infinity if it diverged."""
    contenders = [side.at(f"{name} at {rate:g}", rate) for rate in side.rates]
    taken = compare(contenders, precision, rounds) if len(side.rates) > 1 else [[]]
    losses = [losses_of(turns)[-1] if turns else np.inf for turns in taken]
    return {rate: loss if np.isfinite(loss) else np.inf for rate, loss in zip(side.rates, losses, strict=True)}


def seconds_to(loss: float, turns: list[TurnResult]) -> float | None:
    """Return the seconds after which these turns reached this loss, by linear interpolation; None if they did not."""
    passed, before = 0.0, None
    for turn in turns:
        now = float(turn.eval_loss or np.inf)
        if now <= loss:
            share = 1.0 if before is None else (before - loss) / (before - now)
            return passed + share * turn.seconds
        passed, before = passed + turn.seconds, now
    return None


def interpolate(seconds: float, turns: list[TurnResult], values: Sequence[float]) -> float:
    """Return the value after these seconds, from the values after each turn."""
    return float(np.interp(seconds, list(accumulate(turn.seconds for turn in turns)), values))


def losses_of(turns: list[TurnResult]) -> list[float]:
    """Return the held-out losses after each turn."""
    return [float(np.nan if turn.eval_loss is None else turn.eval_loss) for turn in turns]


def rows_of(
    name: str, block: int, seconds: float, taken: dict[str, list[TurnResult]], rates: dict[str, dict[float, float]]
) -> list[dict[str, Any]]:
    """Print the table of a job and return its rows.

    rates: for each side the learning rates that it tried and their losses. The lowest loss was chosen.
    """
    ends = {side: interpolate(seconds, turns, losses_of(turns)) for side, turns in taken.items()}
    best = min(
        (side for side in taken if side.startswith(TRAINER)), key=lambda side: np.nan_to_num(ends[side], nan=1e9)
    )
    print(f"\n{name}: held-out loss after {seconds:g} s of training, and the seconds to the loss of {TRAINER} and of")
    print(f"Trainer's best side, {best}")
    print(f"{'':<28} {'rate (of)':<28}  steps   loss  to {ends[TRAINER]:.3f}       to {ends[best]:.3f}")
    rows = []
    for side, turns in taken.items():
        tried = rates[side]
        chosen = min(tried, key=tried.__getitem__)
        steps = interpolate(seconds, turns, [(turn + 1.0) * block for turn in range(len(turns))])
        row: dict[str, Any] = {"job": name, "name": side, "steps_of_a_turn": block, "best_rival": side == best}
        row |= {"rate": chosen, "rates": {f"{rate:g}": loss for rate, loss in tried.items()}, "loss": ends[side]}
        row |= {"seconds": list(accumulate(turn.seconds for turn in turns)), "eval_loss": losses_of(turns)}
        cells = []
        for key, rival in (("trainer", TRAINER), ("best", best)):
            found = seconds_to(ends[rival], turns)
            reached = found is not None and found <= seconds * (1 + 1e-9)
            row[f"seconds_to_{key}"] = found if reached else None
            cells.append(f"{found:4.0f} s, {found / seconds:.2f}" if found and reached else "not reached")
        choices = f"{chosen:g} ({', '.join(f'{rate:g}' for rate in tried)})"
        print(f"{side:<28} {choices:<28} {steps:6,.0f} {ends[side]:6.3f}  {cells[0]:<13}  {cells[1]}")
        rows.append(row)
    return rows


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the loss over seconds, one plot for each job."""
    jobs = list(dict.fromkeys(row["job"] for row in rows))
    for axes, job in zip(figure.subplots(1, len(jobs), squeeze=False)[0], jobs, strict=True):
        styles = {report.OTHERS: iter(STYLES), report.OURS: iter(STYLES)}
        for row in rows:
            if row["job"] == job:
                colour = report.OTHERS if row["name"].startswith(TRAINER) else report.OURS
                style = next(styles[colour])
                axes.plot(row["seconds"], row["eval_loss"], linestyle=style, color=colour, label=row["name"])
        axes.set_title(job)
        axes.set_xlabel("seconds of training")
        axes.set_ylabel("held-out loss, nats")
        axes.legend()


def measure(name: str, job: Job, sides: dict[str, Side], seconds: float, precision: Any) -> list[dict[str, Any]]:
    """Let the sides of a job choose their learning rates and run. Print the table and return its rows."""
    for side, unable in sides.items():
        if unable.obstacle:
            print(f"{name}: {side} cannot run: {unable.obstacle}")
    sides = {full_name(key, side): side for key, side in sides.items() if not side.obstacle}
    # One side after the other, since the processes of all of them may not fit into the memory.
    trial = job.rounds(TRIAL * seconds)
    rates = {key: choose_rate(key, side, precision, trial) for key, side in sides.items()}
    contenders = [side.at(key, min(rates[key], key=rates[key].__getitem__)) for key, side in sides.items()]
    taken = compare(contenders, precision, job.rounds(seconds))
    return rows_of(name, job.block, seconds, dict(zip(sides, taken, strict=True)), rates)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--job", choices=[*JOBS], help="run only this job")
    parser.add_argument(
        "--contenders",
        default="fastest,muon",
        metavar="NAMES",
        help="sides beside HF Trainer and minilm, with commas, or all (default: fastest,muon)",
    )
    parser.add_argument("--seconds", type=float, default=60, help="training time of each side (default: 60)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, order and masks, for all sides (default: 0)"
    )
    options = parser.parse_args()
    machine, rows = report.describe_machine(), []
    for name in [options.job] if options.job else [*JOBS]:
        job = JOBS[name]
        config = replace(job.config, run=replace(job.config.run, seed=options.seed))
        sides = sides_of(replace(job, config=config), machine.precision)
        asked = [*sides] if options.contenders == "all" else options.contenders.split(",")
        if unknown := set(asked) - {*sides}:
            parser.error(f"--contenders: {name} has no {', '.join(sorted(unknown))}. It has {', '.join(sides)}.")
        chosen = {key: side for key, side in sides.items() if key in (TRAINER, MINILM, *asked)}
        rows += measure(name, job, chosen, options.seconds, machine.precision)
    name = f"quality-{options.job}" if options.job else "quality"
    name += f"-seed-{options.seed}" if options.seed else ""
    content = {"seconds": options.seconds, "rows": rows}
    report.write(name, machine, content, lambda figure: draw(figure, rows), (10, 5))


if __name__ == "__main__":
    main()
