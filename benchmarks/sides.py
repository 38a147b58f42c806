"""The two sides of a comparison, each of which steps when it is its turn: HF Trainer, and minilm's train_step."""

import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from minilm.causal import Causal
from minilm.config import Config
from minilm.hardware import count_flops, keep_freed_memory
from minilm.head import freeze_unused
from minilm.objectives import Objective, build, objective_of, prepare
from minilm.optim import build_optimizer, learning_rate, warmup_steps
from minilm.plan import Plan, Step
from minilm.tokens import Examples, Prepared
from minilm.train import load_steps, train_step


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row of the table."""

    name: str
    minilm: bool
    grouping: str = ""
    """minilm: `step` or `epoch`. Trainer: its sampling strategy, or nothing for ready batches in their order."""


@dataclass(frozen=True)
class Side:
    """All that one side needs in its process to take its steps."""

    connection: Connection
    contender: Contender
    config: Config
    precision: str
    steps: int
    network: Any
    prepared: Prepared
    cost: Any


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What one side did in one step."""

    seconds: float
    tokens: int
    padded_tokens: int
    flops: float
    """What the step's tokens cost without padding and with a sparse head: the same for the same documents."""
    loss: float
    memory: int
    """Most resident memory of the process so far, bytes."""


class Rows(Dataset[dict[str, list[int]]]):
    """minilm's examples as Trainer's rows."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.examples[index].tolist()}


class ReadySteps(Dataset[dict[str, Tensor]]):
    """Item i: the examples of step i as Trainer wants them: masked, padded to the longest, with labels."""

    def __init__(self, plan: Plan, side: Side, objective: Objective) -> None:
        self.collator = objective.collator(side.prepared.tokenizer, side.prepared.train, seed=0, padded=True)
        self.shift = int(
            isinstance(objective, Causal)
        )  # Trainer wants the label where the token is, not where it is predicted
        self.padding = side.prepared.tokenizer.pad_token_id
        self.items = [self._item(plan.step(index), side.prepared.train) for index in range(side.steps)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.items[index]

    def _item(self, step: Step, examples: Examples) -> dict[str, Tensor]:
        (ids,) = step.micro_batches[0]
        batch = self.collator([examples[int(i)] for i in ids], ids, step.epoch)
        (group,) = batch.packing.groups
        labels_T = torch.full_like(batch.input_ids_T, -100)
        labels_T[batch.target_index_N + self.shift] = batch.target_ids_N
        real_RxL = group.real(labels_T.device)
        return {
            "input_ids": group.pad(batch.input_ids_T).masked_fill(~real_RxL, self.padding),
            "attention_mask": real_RxL.long(),
            "labels": group.pad(labels_T).masked_fill(~real_RxL, -100),
        }


class Turns(TrainerCallback):
    """Let Trainer take one step each time that the other end of the connection asks for it."""

    def __init__(self, connection: Connection, cost: Any, rate: float) -> None:
        self.connection, self.cost, self.rate = connection, cost, rate
        self.lengths: list[int] = []
        self.padded, self.loss = 0, 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the first turn."""
        self.connection.send(None)
        self._wait()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's time is all that passed since its turn began, loading its batch included."""
        seconds = time.perf_counter() - self.mark
        tokens, squares = sum(self.lengths), sum(length**2 for length in self.lengths)
        flops = model_flops(self.cost, tokens, squares, self.rate)
        self.connection.send(
            Taken(
                seconds=seconds,
                tokens=tokens,
                padded_tokens=self.padded,
                flops=flops,
                loss=float(self.loss),
                memory=peak_memory(),
            )
        )
        self._wait()

    def _wait(self) -> None:
        if not self.connection.recv():
            sys.exit()
        self.mark = time.perf_counter()


class TurnTrainer(Trainer):
    """Trainer that notes what each step saw; with ready batches, it takes them in their order."""

    def __init__(self, turns: Turns, ready: bool, **settings: Any) -> None:
        super().__init__(callbacks=[turns], **settings)
        self.turns, self.ready = turns, ready

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset) if self.ready else super()._get_train_sampler(train_dataset)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own loss, noted."""
        mask_RxL = inputs["attention_mask"]
        self.turns.lengths, self.turns.padded = mask_RxL.sum(-1).tolist(), mask_RxL.numel()
        loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
        self.turns.loss = loss.detach()
        return loss


def trainer_settings(config: Config, precision: str, steps: int) -> dict[str, Any]:
    """The settings of a run in the words of Trainer, which saves nothing."""
    optim = config.optim
    return {
        "max_steps": steps,
        "per_device_train_batch_size": config.batch.examples,
        "learning_rate": optim.lr,
        "lr_scheduler_type": optim.schedule,
        "warmup_steps": warmup_steps(optim, steps),
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "adam_epsilon": optim.eps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "seed": config.run.seed,
        "optim": "adamw_torch_fused",
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "save_strategy": "no",
        "report_to": "none",
    }


def peak_memory() -> int:
    """The most resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def model_flops(cost: Any, tokens: int, squares: int, rate: float) -> float:
    """FLOPs of a step over examples of so many tokens, without padding."""
    flops: float = cost.step(
        Step(epoch=0, micro_batches=[], tokens=tokens, square_lengths=squares, padded_tokens=tokens), rate
    )
    return flops


def serve(connection: Connection, contender: Contender, config: Config, precision: str, steps: int) -> None:
    """One side, in its own process: build everything, then take a step at each message that is true."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    prepared, objective = prepare(config), objective_of(config.objective)
    networks = [build(config, prepared) for _ in range(2)]
    cost = count_flops(objective.head(networks[1], prepared), config.batch.max_length)
    take_steps = minilm_steps if contender.minilm else trainer_steps
    take_steps(Side(connection, contender, config, precision, steps, networks[0], prepared, cost))


def trainer_steps(side: Side) -> None:
    """Trainer's steps, one at a turn; loading, and with its own sampler masking and padding, are in the time."""
    config, examples = side.config, side.prepared.train
    size, ready, objective = config.batch.examples, not side.contender.grouping, objective_of(config.objective)
    rate = objective.collator(side.prepared.tokenizer, examples, seed=0).rate()
    own = DataCollatorForLanguageModeling(
        side.prepared.tokenizer, mlm=not isinstance(objective, Causal), mlm_probability=rate
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_settings(config, side.precision, side.steps)
        settings["per_device_train_batch_size"] = 1 if ready else size  # a ready item is a whole batch
        arguments = TrainingArguments(
            output_dir=folder,
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            train_sampling_strategy=side.contender.grouping or "random",
            **settings,
        )
        whole = Plan(examples.lengths, examples=size, micro_tokens=size * config.batch.max_length, padded=True)
        TurnTrainer(
            Turns(side.connection, side.cost, rate),
            ready,
            model=side.network,
            args=arguments,
            train_dataset=ReadySteps(whole, side, objective) if ready else Rows(examples),
            data_collator=_only if ready else own,
        ).train()


def _only(items: list[Any]) -> Any:
    (item,) = items
    return item


def minilm_steps(side: Side) -> None:
    """minilm's steps, one at a turn; planning, masking and packing are in the time that is taken."""
    config, examples = side.config, side.prepared.train
    accelerator = Accelerator(cpu=True, mixed_precision="no" if side.precision == "fp32" else side.precision)
    keep_freed_memory(accelerator.device)  # as train() does
    objective = objective_of(config.objective)
    head = objective.head(side.network, side.prepared)
    freeze_unused(head)
    model, optimizer = accelerator.prepare(head, build_optimizer(head, config.optim))
    model.train()
    plan = Plan(
        examples.lengths,
        examples=config.batch.examples,
        micro_tokens=config.batch.micro_tokens,
        group=side.contender.grouping,
        padded=not head.padding_free,
    )
    collator = objective.collator(side.prepared.tokenizer, examples, seed=0, padded=not head.padding_free)
    loader = enumerate(load_steps(plan, examples, collator, accelerator, range(side.steps), workers=0))
    side.connection.send(None)
    while side.connection.recv():
        mark = time.perf_counter()
        index, (step, micro_batches) = next(loader)
        lr = learning_rate(config.optim, index, side.steps)
        result = train_step(
            accelerator, model, optimizer, micro_batches, lr=lr, max_grad_norm=config.optim.max_grad_norm
        )
        seconds = time.perf_counter() - mark
        side.connection.send(
            Taken(
                seconds=seconds,
                tokens=step.tokens,
                padded_tokens=step.padded_tokens,
                flops=side.cost.step(step, collator.rate()),
                loss=float(result.loss),
                memory=peak_memory(),
            )
        )
