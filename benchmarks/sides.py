"""A comparison: contenders that take their steps in turn, each in a process of its own; and minilm as one of them."""

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.profiler import record_function
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from minilm.config import Config
from minilm.data.batch_plan import Plan, Step
from minilm.data.corpus import PreparedData
from minilm.data.micro_batch import Collator
from minilm.distributed.flops import Cost, count_flops
from minilm.distributed.hardware import peak_memory
from minilm.distributed.launch import start
from minilm.distributed.sharding import distribute
from minilm.models.compilation import compile_layers
from minilm.models.head import Head, freeze_unused
from minilm.objectives.factory import build_network, build_objective, prepare_data
from minilm.objectives.objective import Evaluator
from minilm.optim.optimizer import build_optimizer
from minilm.optim.schedule import learning_rate
from minilm.runs.auto_micro_tokens import resolve_micro_tokens
from minilm.train import build_plan, first_step, load_steps, seed_dropout, train_step

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What one side did in one turn."""

    seconds: float
    tokens: int
    """Real ones, as always: padding is never counted."""
    padded_tokens: int
    square_lengths: int
    losses: tuple[float, ...]
    """Of the turn's steps."""
    memory: int
    """Most memory so far, bytes: of the GPU, or else resident memory of the process."""
    eval_loss: float | None = None
    """After the turn, where that is asked for; its time is not counted."""
    flops: float = 0.0
    """What the documents cost without padding and with a sparse head: the same for the same documents."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The FLOPs of training, by minilm's own count."""

    cost: Cost
    rate: float
    """Share of the tokens that are targets."""

    def flops(self, taken: Taken) -> float:
        """Of what was done in a turn, had there been no padding."""
        step = Step(
            epoch=0,
            micro_batches=[],
            tokens=taken.tokens,
            square_lengths=taken.square_lengths,
            padded_tokens=taken.tokens,
        )
        return self.cost.step(step, self.rate)


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one side is given in its process."""

    connection: Connection
    """Takes a `Work` or None when the side is built, then for each message that is true a turn, as a `Taken`."""
    config: Config
    turns: int
    block: int
    """Steps of a turn."""
    lead_in: int = 0
    """Steps at the beginning of a turn that do not count: memory that the turn before let go is asked for again."""
    evaluated: bool = False
    """Whether each turn ends with an evaluation."""

    @property
    def steps(self) -> int:
        """Of all turns."""
        return self.turns * (self.lead_in + self.block)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row of a table."""

    name: str
    config: Config
    steps: Callable[[Side], None]
    """Builds the side and takes its turns."""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How often every contender takes a turn."""

    count: int
    warm_up: int = 2
    """Rounds before them that are not counted."""
    block: int = 1
    """Steps of a turn."""
    lead_in: int = 0
    """Steps before them that do not count, on a GPU whose memory the contenders take in turn."""
    evaluated: bool = False
    """Whether each turn ends with an evaluation."""

    @property
    def steps(self) -> int:
        """Of all turns of a contender."""
        return (self.warm_up + self.count) * (self.lead_in + self.block)


def compare(contenders: Sequence[Contender], precision: Precision, rounds: Rounds) -> list[list[Taken]]:
    """By contender its turns, one in each round, in an order that changes from round to round.

    One of the contenders at least must be minilm.
    """
    # Its children are forked from a process that has imported all this once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minilm.train", "transformers.trainer"])
    sides: list[Connection] = []
    processes, works = [], list[Work | None]()
    try:
        for contender in contenders:
            here, there = context.Pipe()
            config = replace(contender.config, run=replace(contender.config.run, precision=precision))
            side = Side(
                connection=there,
                config=config,
                turns=rounds.warm_up + rounds.count,
                block=rounds.block,
                lead_in=rounds.lead_in,
                evaluated=rounds.evaluated,
            )
            process = context.Process(target=serve, args=(side, contender.steps))
            process.start()
            there.close()  # so that the end of the process is seen here
            sides.append(here)
            processes.append(process)
            if not works:  # the first fills the cache for the others, which are built at the same time
                works.append(here.recv())
        works += [side.recv() for side in sides[1:]]
        taken = _in_turn(sides, [contender.name for contender in contenders], works, rounds)
        for connection, process in zip(sides, processes, strict=True):
            connection.send(False)
            process.join()
    finally:
        for connection in sides:
            connection.close()  # which ends what has not ended
    return taken


def _in_turn(
    sides: Sequence[Connection], names: Sequence[str], works: Sequence[Work | None], rounds: Rounds
) -> list[list[Taken]]:
    """Have the sides take their turns, and return what each did in those that count."""
    total, counted = rounds.warm_up + rounds.count, next(work for work in works if work)
    taken: list[list[Taken]] = [[] for _ in sides]
    with tqdm(total=total * len(sides), unit="turn", mininterval=0) as bar:
        for number in range(total):
            for turn in range(len(sides)):
                at = (number + turn) % len(sides)
                bar.set_description_str(f"{names[at]} ({number + 1} of {total})")
                sides[at].send(True)
                done = sides[at].recv()
                if number >= rounds.warm_up:
                    taken[at].append(replace(done, flops=(works[at] or counted).flops(done)))
                bar.set_postfix_str(f"{done.tokens / done.seconds:,.0f} tokens/s", refresh=False)
                bar.update()
    return taken


def serve(side: Side, steps: Callable[[Side], None]) -> None:
    """One side, in its own process, on one GPU at most: Trainer would take them all."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    multiprocessing.set_start_method("fork", force=True)  # of its loader's workers: a server would import all anew
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("minilm").setLevel(logging.ERROR)
    steps(side)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """minilm's parts, put together as train() does."""

    config: Config
    accelerator: Accelerator
    prepared: PreparedData
    network: PreTrainedModel
    model: nn.Module
    optimizer: torch.optim.Optimizer
    plan: Plan
    collator: Collator
    evaluator: Evaluator
    work: Work | None
    """None: that of another contender counts."""


def assemble(config: Config, head_of: Callable[[PreTrainedModel, PreparedData], Head] | None = None) -> Parts:
    """The parts of a run of minilm; `head_of` in place of the objective's own head."""
    accelerator, _ = start(config.run)
    prepared, objective = prepare_data(config), build_objective(config.objective)
    network = build_network(config, prepared)
    head = (head_of or objective.head)(network.to(accelerator.device), prepared)
    freeze_unused(head)
    cost = count_flops(head, config.batch.max_length)
    first = partial(first_step, accelerator=accelerator, head=head, prepared=prepared)
    config = resolve_micro_tokens(config, accelerator, head, None, first)
    if config.run.compile:
        compile_layers(head)
    model, optimizer = distribute(accelerator, head, build_optimizer(head, config.optim))
    plan, collator, evaluator = build_plan(config, accelerator, head, prepared)
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
        work=Work(cost=cost, rate=collator.rate()),
    )


def precision_of(parts: Parts) -> str:
    """The arithmetic of the parts, as `run.precision` calls it."""
    mode: str = parts.accelerator.mixed_precision
    return "fp32" if mode == "no" else mode


def turns_of(parts: Parts, turns: int, block: int = 1, *, lead_in: int = 0, evaluated: bool = False) -> Iterator[Taken]:
    """Turns of `block` steps by minilm, each taken when it is asked for, with the planning, masking and packing."""
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
        return steps, tuple(torch.stack(losses).tolist())  # waits for the device

    for first in range(0, total, lead_in + block):
        if lead_in:
            take(first, lead_in)
        mark = time.perf_counter()
        steps, losses = take(first + lead_in, block)
        seconds = time.perf_counter() - mark
        evaluation = parts.evaluator(parts.accelerator, parts.model).figures() if evaluated else {}
        if lead_in:
            torch.cuda.empty_cache()
        yield Taken(
            seconds=seconds,
            tokens=sum(step.tokens for step in steps),
            padded_tokens=sum(step.padded_tokens for step in steps),
            square_lengths=sum(step.square_lengths for step in steps),
            losses=losses,
            memory=peak_memory(parts.accelerator.device),
            eval_loss=evaluation.get("eval_loss"),
        )


def answer(side: Side, parts: Parts) -> None:
    """Take minilm's turns with these parts as they are asked for."""
    side.connection.send(parts.work)
    turns = turns_of(parts, side.turns, side.block, lead_in=side.lead_in, evaluated=side.evaluated)
    while side.connection.recv():
        side.connection.send(next(turns))


def minilm_steps(side: Side) -> None:
    """minilm's side, as its configuration says."""
    answer(side, assemble(side.config))
