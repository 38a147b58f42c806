"""Measure the time to a held-out loss: how long minilm takes to reach the loss of HF Trainer.

    python benchmarks/quality.py

There are two jobs. Each side runs in its own process and takes turns of some steps. minilm's exact evaluation measures
the loss after each turn. The time of a side is that of its turns, without start-up and evaluations. Both sides have the
same model, initial weights, examples, masks, hyper-parameters and learning rates. The learning rate stays constant
after its warm-up, so that the loss after some steps does not depend on the number of steps that follow.

- documents: the RoBERTa of throughput.py (6 layers, width 384, vocabulary 16,384), with 32 documents of at most 128
  tokens per step. The goal is the loss that Trainer has after 200 steps. minilm also runs with `group=epoch`, whose
  steps are other ones.
- pydocs: the model of recipes/mlm_pydocs.py. The goal is the loss that Trainer has after 300 seconds. Trainer also runs
  with its default hyper-parameters.

The time at which a side reached a loss is interpolated between two evaluations. Results go to benchmarks/results, as
JSON and as a plot (`pip install -e ".[report]"`).
"""

import argparse
import runpy
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import report
from comparison import Contender, Rounds, TurnResult, compare, run_minilm
from hf_trainer import run_trainer
from throughput import MASKED

from minilm.config import Config, MaskedLM, Optim

PYDOCS: Config = runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "mlm_pydocs.py"))["CONFIG"]
TRAINER, TRAINER_DEFAULTS, MINILM, EPOCH = "HF Trainer", "HF Trainer, its defaults", "minilm", "minilm, group=epoch"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A configuration, its contenders and rounds, and the point at which Trainer's loss is the goal."""

    config: Config
    others: tuple[str, ...]
    """Contenders besides Trainer and minilm."""
    rounds: Rounds
    steps: int | None = None
    """The goal is Trainer's loss after this many steps."""
    seconds: float | None = None
    """The goal is Trainer's loss after this many seconds, or after the last turn."""

    def end(self, turns: list[TurnResult]) -> int:
        """Return the number of the turn after which Trainer's loss is the goal."""
        if self.steps is not None:
            return self.steps // self.rounds.block - 1
        seconds = list(accumulate(turn.seconds for turn in turns))
        return next((at for at, passed in enumerate(seconds) if passed >= (self.seconds or 0)), len(turns) - 1)


def constant(config: Config, **changed: Any) -> Config:
    """Return the same configuration with a constant learning rate after the warm-up."""
    return replace(config, optim=replace(config.optim, schedule="constant", **changed))


JOBS = {
    "documents": Job(
        config=constant(MASKED, lr=1e-4, warmup=20),  # at 5e-4 the losses of both sides have spikes
        others=(EPOCH,),
        rounds=Rounds(count=12, warm_up=0, block=20, evaluated=True),
        steps=200,
    ),
    "pydocs": Job(
        config=constant(PYDOCS, lr=2e-3),
        others=(TRAINER_DEFAULTS,),
        rounds=Rounds(count=72, warm_up=0, block=50, evaluated=True),
        seconds=300,
    ),
}


def contender(name: str, config: Config) -> Contender:
    """Return the contender of this name."""
    if name == EPOCH:
        config = replace(config, batch=replace(config.batch, group="epoch"))
    if name == TRAINER_DEFAULTS:
        optim = Optim(lr=5e-5, betas=(0.9, 0.999), warmup=0, weight_decay=0.0, schedule="linear")
        config = replace(config, objective=MaskedLM(rate=0.15), optim=optim)
        return Contender(name=name, config=config, run=partial(run_trainer, grouping="random"))
    return Contender(name=name, config=config, run=run_trainer if name == TRAINER else run_minilm)


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


def rows_of(name: str, job: Job, taken: dict[str, list[TurnResult]]) -> list[dict[str, Any]]:
    """Print the table of a job and return its rows."""
    theirs = [side for side in taken if side in (TRAINER, TRAINER_DEFAULTS)]
    ends = {side: job.end(taken[side]) for side in theirs}
    print(f"\n{name}, turns of {job.rounds.block} steps")
    print(f"{'':<26}   loss  after steps  seconds" + "".join(f"  {side} to it" for side in taken if side not in theirs))
    rows = []
    for side, turns in taken.items():
        passed, losses = list(accumulate(turn.seconds for turn in turns)), [turn.eval_loss for turn in turns]
        row: dict[str, Any] = {"job": name, "name": side, "steps_of_a_turn": job.rounds.block}
        row |= {"seconds": passed, "eval_loss": losses}
        if side in theirs:
            at = ends[side]
            loss, seconds = float(losses[at] or np.nan), passed[at]
            cells = []
            for other in [other for other in taken if other not in theirs]:
                found = seconds_to(loss, taken[other])
                row[f"share of {other}"] = found and found / seconds
                cell = "not reached" if found is None else f"{found:.0f} s, {found / seconds:.2f} of it"
                cells.append(f"  {cell:>{len(other) + 6}}")
            print(f"{side:<26} {loss:6.3f} {(at + 1) * job.rounds.block:12,d} {seconds:8.0f}" + "".join(cells))
        rows.append(row)
    return rows


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the loss over seconds, one plot for each job."""
    jobs = list(dict.fromkeys(row["job"] for row in rows))
    for axes, job in zip(figure.subplots(1, len(jobs), squeeze=False)[0], jobs, strict=True):
        for row in rows:
            if row["job"] == job:
                colour = report.OTHERS if row["name"].startswith(TRAINER) else report.OURS
                style = "-" if row["name"] in (TRAINER, MINILM) else "--"
                axes.plot(row["seconds"], row["eval_loss"], style, color=colour, label=row["name"])
        axes.set_title(job)
        axes.set_xlabel("seconds of training")
        axes.set_ylabel("held-out loss, nats")
        axes.legend()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--job", choices=[*JOBS], help="run only this job")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, order and masks, for all sides (default: 0)"
    )
    options = parser.parse_args()
    machine, rows = report.describe_machine(), []
    for name in [options.job] if options.job else [*JOBS]:
        job = JOBS[name]
        names = (TRAINER, MINILM, *job.others)
        config = replace(job.config, run=replace(job.config.run, seed=options.seed))
        taken = compare([contender(side, config) for side in names], machine.precision, job.rounds)
        rows += rows_of(name, job, dict(zip(names, taken, strict=True)))
    name = f"quality-{options.job}" if options.job else "quality"
    name += f"-seed-{options.seed}" if options.seed else ""
    report.write(name, machine, {"rows": rows}, lambda figure: draw(figure, rows), (10, 4))


if __name__ == "__main__":
    main()
