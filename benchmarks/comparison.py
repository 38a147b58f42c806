"""Compare contenders that take turns, each in its own process. minilm is one of them."""

import logging
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.profiler import record_function
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from minilm.config import Config
from minilm.data.batch_plan import Step
from minilm.data.corpus import PreparedData
from minilm.data.micro_batch import Collator
from minilm.data.phased_batches import RunPlan
from minilm.distributed.flops import Cost, count_flops
from minilm.distributed.hardware import peak_memory
from minilm.distributed.launch import start
from minilm.distributed.sharding import distribute
from minilm.models.compilation import compile_layers
from minilm.models.head import Head, freeze_unused
from minilm.objectives.evaluator import Evaluator
from minilm.objectives.factory import build_network, build_objective, prepare_data
from minilm.optim.optimizer import build_optimizer
from minilm.optim.schedule import learning_rate
from minilm.runs.auto_micro_tokens import resolve_micro_tokens
from minilm.runs.session import Session
from minilm.train import build_plan, first_step, load_steps, seed_dropout, train_step

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class TurnResult:
    """What one contender did in one turn."""

    seconds: float
    tokens: int
    """Real tokens, without padding."""
    padded_tokens: int
    square_lengths: int
    losses: tuple[float, ...]
    """Loss of each step of the turn, nats."""
    memory: int
    """Peak memory so far, bytes: of the GPU, or else the resident memory of the process."""
    eval_loss: float | None = None
    """Loss of an evaluation after the turn, whose time does not count; None if there was none."""
    evaluation: Mapping[str, float] = field(default_factory=dict)
    """All figures of that evaluation."""
    flops: float = 0.0
    """FLOPs of the documents without padding and with a sparse head: the same for each contender."""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The FLOPs of training, as minilm counts them."""

    cost: Cost
    rate: float
    """Fraction of the tokens that are targets."""

    def flops(self, taken: TurnResult) -> float:
        """Return the FLOPs of a turn, as if there were no padding."""
        step = Step(
            epoch=0,
            micro_batches=[],
            tokens=taken.tokens,
            square_lengths=taken.square_lengths,
            padded_tokens=taken.tokens,
        )
        return self.cost.step(step, self.rate)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the process of a contender gets."""

    connection: Connection
    """Carries a `StepCost` or None once the contender is built, then a `TurnResult` for each message that is true."""
    config: Config
    turns: int
    block: int
    """Steps of a turn."""
    lead_in: int = 0
    """Steps at the beginning of a turn that do not count. They allocate their memory again."""
    evaluated: int = 0
    """Number of turns from one evaluation to the next: 1 (or True) for one after each turn. 0: there is none."""

    @property
    def steps(self) -> int:
        """Steps of all turns."""
        return self.turns * (self.lead_in + self.block)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row of a table."""

    name: str
    config: Config
    run: Callable[[Task], None]
    """Builds the contender in its process and takes its turns."""
    biased: bool = False
    """Whether the examples of a step have about the same length. Their gradient is then not an unbiased estimate of the
    gradient of all examples."""
    obstacle: str | None = None
    """Why this contender cannot run here; None if it can."""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How many turns each contender takes."""

    count: int
    warm_up: int = 2
    """Rounds at the beginning that do not count."""
    block: int = 1
    """Steps of a turn."""
    lead_in: int = 0
    """Steps at the beginning of a turn that do not count, for a GPU whose memory the contenders use in turn."""
    evaluated: int = 0
    """Number of turns from one evaluation to the next: 1 (or True) for one after each turn. 0: there is none."""
    seconds: float = math.inf
    """A contender whose turns took this long takes no more turns."""

    @property
    def steps(self) -> int:
        """Steps of all turns of a contender."""
        return (self.warm_up + self.count) * (self.lead_in + self.block)


def compare(contenders: Sequence[Contender], precision: Precision, rounds: Rounds) -> list[list[TurnResult]]:
    """Return the turns of each contender, one for each round that counts. The order changes from round to round.

    With `rounds.seconds`, fast contenders take more turns than slow ones. minilm counts the FLOPs: they are 0 if no
    contender is minilm.
    """
    # The processes are forked from one that has imported the libraries once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minilm.train", "transformers.trainer"])
    sides: list[Connection] = []
    processes, works = [], list[StepCost | None]()
    try:
        for contender in contenders:
            here, there = context.Pipe()
            config = replace(contender.config, run=replace(contender.config.run, precision=precision))
            task = Task(
                connection=there,
                config=config,
                turns=rounds.warm_up + rounds.count,
                block=rounds.block,
                lead_in=rounds.lead_in,
                evaluated=rounds.evaluated,
            )
            process = context.Process(target=serve, args=(task, contender.run))
            process.start()
            # With its copy closed, this process notices when the other one ends.
            there.close()
            sides.append(here)
            processes.append(process)
            # The first contender fills the cache. The others are then built at the same time.
            if not works:
                works.append(here.recv())
        works += [side.recv() for side in sides[1:]]
        taken = _in_turn(sides, [contender.name for contender in contenders], works, rounds)
        for connection, process in zip(sides, processes, strict=True):
            connection.send(False)
            process.join()
    finally:
        for connection in sides:
            # A process that still waits for a message ends.
            connection.close()
    return taken


def _in_turn(
    sides: Sequence[Connection], names: Sequence[str], works: Sequence[StepCost | None], rounds: Rounds
) -> list[list[TurnResult]]:
    """Let the contenders take their turns, and return the results of those that count."""
    total, counted = rounds.warm_up + rounds.count, next((work for work in works if work), None)
    taken: list[list[TurnResult]] = [[] for _ in sides]
    passed = [0.0] * len(sides)
    with tqdm(total=total * len(sides), unit="turn", mininterval=0) as bar:
        for number in range(total):
            for turn in range(len(sides)):
                at = (number + turn) % len(sides)
                if passed[at] >= rounds.seconds:
                    bar.update()
                    continue
                bar.set_description_str(f"{names[at]} ({number + 1} of {total})")
                sides[at].send(True)
                done = sides[at].recv()
                passed[at] += done.seconds
                if number >= rounds.warm_up:
                    work = works[at] or counted
                    taken[at].append(replace(done, flops=work.flops(done)) if work else done)
                bar.set_postfix_str(f"{done.tokens / done.seconds:,.0f} tokens/s", refresh=False)
                bar.update()
    return taken


def serve(task: Task, run: Callable[[Task], None]) -> None:
    """Run a contender in this process, on at most one GPU: Trainer would use all of them."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    # Forked loader workers need not import the libraries again.
    multiprocessing.set_start_method("fork", force=True)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("minilm").setLevel(logging.ERROR)
    run(task)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a run, built as `train()` builds them."""

    config: Config
    accelerator: Accelerator
    prepared: PreparedData
    network: PreTrainedModel
    model: nn.Module
    optimizer: torch.optim.Optimizer
    plan: RunPlan
    collator: Collator
    evaluator: Evaluator
    work: StepCost | None
    """None if the cost of another contender counts."""


def build_parts(config: Config, head_of: Callable[[PreTrainedModel, PreparedData], Head] | None = None) -> Parts:
    """Return the parts of a run. `head_of` replaces the head of the objective."""
    accelerator, precision = start(config.run)
    prepared, objective = prepare_data(config), build_objective(config.objective)
    network = build_network(config, prepared)
    head = (head_of or objective.head)(network.to(accelerator.device), prepared)
    freeze_unused(head)
    cost = count_flops(head, config.batch.max_length)
    run = Session(
        config=config,
        accelerator=accelerator,
        precision=precision,
        folder=Path(),
        checkpoint=None,
        prepared=prepared,
    )
    config = resolve_micro_tokens(config, accelerator, head, None, partial(first_step, run, head))
    if config.run.compile:
        compile_layers(head)
    model, optimizer = distribute(accelerator, head, build_optimizer(head, config.optim, precision.name))
    plan, collator, evaluator = build_plan(replace(run, config=config), head)
    model.train()
    return Parts(
        config=config,
        accelerator=accelerator,
        prepared=prepared,
        network=network,
        model=model,
        optimizer=optimizer,
        plan=plan,
        collator=collator,
        evaluator=evaluator,
        work=StepCost(cost=cost, rate=collator.rate()),
    )


def get_precision(parts: Parts) -> str:
    """Return the precision of the parts, as `run.precision` calls it."""
    mode: str = parts.accelerator.mixed_precision
    return "fp32" if mode == "no" else mode


def is_evaluated(turn: int, every: int) -> bool:
    """Return whether an evaluation follows the turn of this number, from 0. `every`: as `Rounds.evaluated`."""
    return every > 0 and (turn + 1) % every == 0


def take_turns(
    parts: Parts, turns: int, block: int = 1, *, lead_in: int = 0, evaluated: int = 0
) -> Iterator[TurnResult]:
    """Yield turns of `block` steps by minilm. Planning, masking and packing are part of the time."""
    config, total = parts.config, turns * (lead_in + block)
    loader = load_steps(
        parts.plan, parts.prepared.train, parts.collator, parts.accelerator, range(total), config.batch.workers
    )
    items, max_grad_norm = iter(loader), config.optim.max_grad_norm

    def take(first: int, count: int) -> tuple[list[Step], tuple[float, ...]]:
        steps, losses = [], []
        for index in range(first, first + count):
            with record_function("data"):
                step, micro_batches = next(items)
            seed_dropout(config.run.seed, index, parts.accelerator.process_index)
            lr = learning_rate(config.optim, index, total)
            result = train_step(
                parts.accelerator, parts.model, parts.optimizer, micro_batches, lr=lr, max_grad_norm=max_grad_norm
            )
            steps.append(step)
            losses.append(result.loss)
        # Reading the losses waits for the device.
        return steps, tuple(torch.stack(losses).tolist())

    for first in range(0, total, lead_in + block):
        if lead_in:
            take(first, lead_in)
        mark = time.perf_counter()
        steps, losses = take(first + lead_in, block)
        seconds = time.perf_counter() - mark
        ends = is_evaluated(first // (lead_in + block), evaluated)
        evaluation = parts.evaluator(parts.accelerator, parts.model).figures() if ends else {}
        if lead_in:
            torch.cuda.empty_cache()
        yield TurnResult(
            seconds=seconds,
            tokens=sum(step.tokens for step in steps),
            padded_tokens=sum(step.padded_tokens for step in steps),
            square_lengths=sum(step.square_lengths for step in steps),
            losses=losses,
            memory=peak_memory(parts.accelerator.device),
            eval_loss=evaluation.get("eval_loss"),
            evaluation=evaluation,
        )


def serve_turns(task: Task, parts: Parts) -> None:
    """Take a turn of minilm with these parts for each message that asks for one."""
    task.connection.send(parts.work)
    turns = take_turns(parts, task.turns, task.block, lead_in=task.lead_in, evaluated=task.evaluated)
    while task.connection.recv():
        task.connection.send(next(turns))


def run_minilm(task: Task) -> None:
    """Run minilm with the configuration of the task."""
    serve_turns(task, build_parts(task.config))
