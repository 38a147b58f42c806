"""HF Trainer as one side of a comparison."""

import copy
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from sides import Side, Taken
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler, Subset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from minilm.config import Config, Optim
from minilm.data.batch_plan import Plan, Step
from minilm.data.corpus import Examples, PreparedData
from minilm.data.micro_batch import MicroBatch
from minilm.distributed.hardware import peak_memory
from minilm.objectives.causal_lm import CausalLMObjective
from minilm.objectives.factory import build_network, build_objective, prepare_data
from minilm.objectives.objective import Objective
from minilm.optim.schedule import count_warmup_steps, learning_rate
from minilm.runs.auto_micro_tokens import micro_tokens_of


class Rows(Dataset[dict[str, Any]]):
    """minilm's examples as Trainer's rows."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {"input_ids": self.examples[index].tolist()}
        if self.examples.type_ids is not None:
            row["token_type_ids"] = self.examples.token_type_ids(index).tolist()
        if self.examples.labels is not None:
            row["labels"] = self.examples.labels[index].tolist()
        return row


def padded_labels(batch: MicroBatch, shift: int = 0) -> Tensor:
    """The targets of a padded batch as transformers wants them: int64, R x L, -100 where there is none.

    `shift`: 1 where the label is to be at the token itself, and the target where it is predicted from.
    """
    (group,) = batch.packing.groups
    labels_T = torch.full_like(batch.input_ids_T, -100)
    labels_T[batch.target_index_N + shift] = batch.target_ids_N
    return group.pad(labels_T).masked_fill(~group.token_mask(labels_T.device), -100)


def padding_multiple() -> int:
    """What padded lengths divide by: on GPUs 8, which is the faster there, and what transformers' examples take."""
    return 8 if torch.cuda.is_available() else 1


class ReadySteps(Dataset[dict[str, Tensor]]):
    """Item i: the examples of step i as Trainer wants them: masked, padded to the longest, with labels."""

    def __init__(self, plan: Plan, steps: int, prepared: PreparedData, objective: Objective, seed: int) -> None:
        self.collator = objective.collator(
            prepared.tokenizer, prepared.train, seed=seed, padded=True, multiple=padding_multiple()
        )
        self.shift = int(isinstance(objective, CausalLMObjective))
        self.padding = prepared.tokenizer.pad_token_id
        self.items = [self._item(plan.step(index), prepared.train) for index in range(steps)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.items[index]

    def _item(self, step: Step, examples: Examples) -> dict[str, Tensor]:
        (ids,) = step.micro_batches[0]
        batch = self.collator([examples[int(i)] for i in ids], ids, step.epoch)
        (group,) = batch.packing.groups
        real_RxL = group.token_mask(batch.input_ids_T.device)
        return {
            "input_ids": group.pad(batch.input_ids_T).masked_fill(~real_RxL, self.padding),
            "attention_mask": real_RxL.long(),
            "labels": padded_labels(batch, self.shift),
        }


class Turns(TrainerCallback):
    """Let Trainer take a turn each time that the other end of the connection asks for it."""

    def __init__(self, side: Side, prepared: PreparedData) -> None:
        self.side, self.prepared, self.connection = side, prepared, side.connection
        self._begin()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the first turn."""
        self.connection.send(None)
        self._wait()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's time is all that passed since its turn began, loading its batches included."""
        if self.leading and len(self.losses) == self.side.lead_in:
            float(torch.stack(self.losses).mean())
            self._begin()
        if self.leading or len(self.losses) < self.side.block:
            return
        losses = tuple(torch.stack(self.losses).tolist())  # waits for the device
        seconds = time.perf_counter() - self.mark
        lengths = torch.cat(self.lengths)
        taken = Taken(
            seconds=seconds,
            tokens=int(lengths.sum()),
            padded_tokens=self.padded,
            square_lengths=int((lengths * lengths).sum()),
            losses=losses,
            memory=peak_memory(lengths.device),
            eval_loss=self._evaluate(kwargs["model"]) if self.side.evaluated else None,
        )
        if self.side.lead_in:
            torch.cuda.empty_cache()
        self.connection.send(taken)
        self._wait()

    def saw(self, mask_RxL: Tensor, loss: Tensor) -> None:
        """Note a step's batch and its loss, which stay on their device."""
        self.lengths.append(mask_RxL.sum(-1))
        self.padded += mask_RxL.numel()
        self.losses.append(loss.detach())

    def _evaluate(self, model: PreTrainedModel) -> float:
        """By minilm's evaluation, of a copy: its head changes how a model is run."""
        return float(evaluate(self.side.config, copy.deepcopy(model), self.prepared)["eval_loss"])

    def _begin(self) -> None:
        self.lengths: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.padded, self.mark, self.leading = 0, time.perf_counter(), False

    def _wait(self) -> None:
        if not self.connection.recv():
            sys.exit()
        self._begin()
        self.leading = self.side.lead_in > 0


class OrderedTrainer(Trainer):
    """Trainer that takes the rows in their order, unless `in_order` is false."""

    def __init__(self, in_order: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        self.in_order = in_order

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset) if self.in_order else super()._get_train_sampler(train_dataset)


class TurnTrainer(OrderedTrainer):
    """One that notes what each step saw, and has minilm's learning rates.

    In a warm-up its own are those of the step before, zero in the first: other updates.
    """

    def __init__(self, turns: Turns, in_order: bool, optim: Optim, **settings: Any) -> None:
        super().__init__(in_order, callbacks=[turns], **settings)
        self.turns, self.optim = turns, optim

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """minilm's learning rate of each step."""
        scheduled: Any = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(
            scheduled, lambda step: learning_rate(self.optim, step, num_training_steps) / self.optim.lr
        )
        return self.lr_scheduler

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own loss, noted."""
        loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
        self.turns.saw(inputs["attention_mask"], loss)
        return loss


def evaluate(config: Config, model: PreTrainedModel, prepared: PreparedData) -> dict[str, float]:
    """The figures of minilm's evaluation of a model, which it makes minilm's."""
    objective = build_objective(config.objective)
    head = objective.head(model, prepared)
    evaluator = objective.evaluator(prepared, micro_tokens_of(config), padded=not head.padding_free, multiple=1)
    return evaluator(Accelerator(), head).figures()


def trainer_settings(config: Config, precision: str, steps: int) -> dict[str, Any]:
    """The settings of a run in the words of Trainer, which saves nothing."""
    optim = config.optim
    return {
        "max_steps": steps,
        "per_device_train_batch_size": config.batch.examples,
        "learning_rate": optim.lr,
        "lr_scheduler_type": "constant_with_warmup" if optim.schedule == "constant" else optim.schedule,
        "warmup_steps": count_warmup_steps(optim, steps),
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "adam_epsilon": optim.eps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "seed": config.run.seed,
        "optim": "adamw_torch_fused",
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": not torch.accelerator.is_available(),  # else bf16 is refused there
        "save_strategy": "no",
        "report_to": "none",
    }


def trainer_steps(side: Side, grouping: str = "", *, compiled: bool = False, attention: str = "auto") -> None:
    """Trainer's side. Its sampling strategy is `grouping`, or nothing for minilm's examples in their order.

    `compiled`: with `torch_compile`. `attention`: of transformers, by its name, or what transformers takes by itself.

    Loading is in its time, and padding too, but for a language model's examples in order: their masks must be minilm's,
    so that they are masked and padded beforehand.
    """
    config = replace(side.config, model=replace(side.config.model, attention=attention))
    prepared = prepare_data(config)
    data, collate, size = _rows(config, prepared, side.steps, in_order=not grouping)
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_settings(config, config.run.precision, side.steps)
        arguments = TrainingArguments(
            output_dir=folder,
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            dataloader_num_workers=config.batch.workers,
            train_sampling_strategy=grouping or "random",
            torch_compile=compiled,
            **{**settings, "per_device_train_batch_size": size},
        )
        TurnTrainer(
            Turns(side, prepared),
            not grouping,
            config.optim,
            model=build_network(config, prepared),
            args=arguments,
            train_dataset=data,
            data_collator=collate,
        ).train()


def _rows(config: Config, prepared: PreparedData, steps: int, *, in_order: bool) -> tuple[Dataset[Any], Any, int]:
    """What Trainer loads, its collator, and how many items make a batch; `in_order`: of minilm's steps."""
    objective, examples, size = build_objective(config.objective), prepared.train, config.batch.examples
    plan = Plan(
        examples.lengths,
        examples=size,
        micro_tokens=size * config.batch.max_length,
        seed=config.run.seed,
        padded=True,
    )
    if examples.labels is None and in_order:
        return ReadySteps(plan, steps, prepared, objective, config.run.seed), _only, 1
    if examples.labels is None:
        collate: Any = DataCollatorForLanguageModeling(
            prepared.tokenizer,
            mlm=not isinstance(objective, CausalLMObjective),
            mlm_probability=objective.collator(
                prepared.tokenizer, examples, seed=config.run.seed, padded=False, multiple=1
            ).rate(),
            pad_to_multiple_of=padding_multiple(),
        )
        return Rows(examples), collate, size
    collate = DataCollatorWithPadding(prepared.tokenizer, pad_to_multiple_of=padding_multiple())
    if not in_order:
        return Rows(examples), collate, size
    order = np.concatenate([plan.step(index).examples for index in range(steps)])
    return Subset(Rows(examples), order.tolist()), collate, size


def _only(items: list[Any]) -> Any:
    (item,) = items
    return item
