"""HF Trainer as a contender of a comparison."""

import copy
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from comparison import Task, TurnResult, is_evaluated
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler, Subset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    trainer_pt_utils,
)

from minilm.config import Config, Optim
from minilm.data.batch_plan import Plan, Step
from minilm.data.corpus import Examples, PreparedData
from minilm.data.micro_batch import MicroBatch
from minilm.distributed.hardware import peak_memory
from minilm.objectives.causal_lm import CausalLMObjective
from minilm.objectives.factory import build_network, build_objective, prepare_data
from minilm.objectives.objective import Objective
from minilm.objectives.token_classification import TokenClassificationObjective
from minilm.optim.schedule import count_warmup_steps, learning_rate
from minilm.runs.auto_micro_tokens import micro_tokens_of

MUON = "muon"


class Rows(Dataset[dict[str, Any]]):
    """A dataset with minilm's examples as rows for Trainer."""

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
        if self.examples.token_targets is not None:
            row["labels"] = self.examples.targets_of_tokens(index).tolist()
        return row


def pad_labels(batch: MicroBatch, shift: int = 0) -> Tensor:
    """Return the labels of a padded batch for transformers: int64[R, L]. A position without a target has -100.

    shift: 1 moves each label from the position that predicts it to the position of the token itself.
    """
    (group,) = batch.packing.groups
    labels_T = torch.full_like(batch.input_ids_T, -100)
    labels_T[batch.target_index_N + shift] = batch.target_ids_N
    return group.pad(labels_T).masked_fill(~group.token_mask(labels_T.device), -100)


def padding_multiple() -> int:
    """Return the number that padded lengths are multiples of: on GPUs 8, as in the examples of transformers."""
    return 8 if torch.cuda.is_available() else 1


class PreparedSteps(Dataset[dict[str, Tensor]]):
    """A dataset whose item i is the batch of step i for Trainer: masked, padded to the longest row, with labels."""

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
            "labels": pad_labels(batch, self.shift),
        }


class Turns(TrainerCallback):
    """Let Trainer take a turn for each message that asks for one."""

    def __init__(self, task: Task, prepared: PreparedData) -> None:
        self.task, self.prepared, self.connection = task, prepared, task.connection
        self.count = 0
        self.figures: dict[str, float] = {}
        """Figures to add to those of the evaluation."""
        self._begin()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the first turn."""
        self.connection.send(None)
        self._wait()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """End the turn after its last step. The time of a turn includes the loading of its batches."""
        self.losses.append(torch.stack(self.parts).sum())
        self.parts.clear()
        if self.leading and len(self.losses) == self.task.lead_in:
            float(torch.stack(self.losses).mean())
            self._begin()
        if self.leading or len(self.losses) < self.task.block:
            return
        losses = tuple(torch.stack(self.losses).tolist())  # waits for the device
        seconds = time.perf_counter() - self.mark
        lengths = torch.cat(self.lengths)
        ends = is_evaluated(self.count, self.task.evaluated)
        evaluation = self._evaluate(kwargs["model"]) if ends else {}
        self.count += 1
        evaluation |= self.figures
        taken = TurnResult(
            seconds=seconds,
            tokens=int(lengths.sum()),
            padded_tokens=self.padded,
            square_lengths=int((lengths * lengths).sum()),
            losses=losses,
            memory=peak_memory(lengths.device),
            eval_loss=evaluation.get("eval_loss"),
            evaluation=evaluation,
        )
        if self.task.lead_in:
            torch.cuda.empty_cache()
        self.connection.send(taken)
        self._wait()

    def record(self, lengths_R: Tensor, places: int, loss: Tensor) -> None:
        """Record the tokens of each row of a micro-batch, its tokens with padding, and its part of the step's loss.

        The tensors stay on their device.
        """
        self.lengths.append(lengths_R)
        self.padded += places
        self.parts.append(loss.detach())

    def _evaluate(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the figures of minilm's evaluation of a copy of the model, since its head changes the model.

        The copy computes in fp32 outside autocast. Trainer's own forward rounds to bf16, so that minilm's trials of
        shortcuts could not tell a wrong result from a rounded one.
        """
        plain = extract_model_from_parallel(copy.deepcopy(model), keep_fp32_wrapper=False)
        return evaluate(self.task.config, plain, self.prepared)

    def _begin(self) -> None:
        self.lengths: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.parts: list[Tensor] = []
        self.padded, self.mark, self.leading = 0, time.perf_counter(), False

    def _wait(self) -> None:
        if not self.connection.recv():
            sys.exit()
        self._begin()
        self.leading = self.task.lead_in > 0


class OrderedTrainer(Trainer):
    """A Trainer that keeps the order of the rows, unless `in_order` is false."""

    def __init__(self, in_order: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        self.in_order = in_order

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset) if self.in_order else super()._get_train_sampler(train_dataset)


class MinilmRates:
    """A base class that gives a Trainer the learning rates of minilm. Set `optim` before the training.

    Trainer's own warm-up is one step behind and starts at zero, which would give other updates.
    """

    optim: Optim
    optimizer: Any
    lr_scheduler: Any

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return a scheduler with minilm's learning rates."""
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer,
            lambda step: learning_rate(self.optim, step, num_training_steps) / self.optim.lr,
        )
        return self.lr_scheduler


class TurnTrainer(MinilmRates, OrderedTrainer):
    """A Trainer that records each step."""

    def __init__(self, turns: Turns, in_order: bool, optim: Optim, **settings: Any) -> None:
        super().__init__(in_order, callbacks=[turns], **settings)
        self.turns, self.optim = turns, optim

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Make Trainer's own pass over a micro-batch, and record the loss that Trainer reports for it."""
        loss: Any = super().training_step(model, inputs, *args, **kwargs)
        mask_RxL = inputs["attention_mask"]
        self.turns.record(mask_RxL.sum(-1), mask_RxL.numel(), loss)
        return loss


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for the matrices inside the layers, and fused AdamW for the rest, as one optimizer."""

    def __init__(self, model: PreTrainedModel, optim: Optim) -> None:
        matrices = [part.weight for part in model.base_model.modules() if isinstance(part, torch.nn.Linear)]
        inside = {id(matrix) for matrix in matrices}
        others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
        # With `match_rms_adamw` (Moonlight, Liu et al. 2025), learning rates of AdamW suit Muon.
        shared: dict[str, Any] = {"lr": optim.lr, "weight_decay": optim.weight_decay}
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **shared),
            torch.optim.AdamW(others, betas=optim.betas, eps=optim.eps, fused=True, **shared),
        ]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others}]
        super().__init__(groups, shared)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters, with the learning rate of this optimizer's groups."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()


def evaluate(config: Config, model: PreTrainedModel, prepared: PreparedData) -> dict[str, float]:
    """Return the figures of minilm's evaluation of a model, in Trainer's precision. It changes the model's modules."""
    objective, accelerator = build_objective(config.objective), Accelerator()
    head = objective.head(model, prepared)
    evaluator = objective.evaluator(prepared, micro_tokens_of(config), padded=not head.padding_free, multiple=1)
    return evaluator(accelerator, accelerator.prepare_model(head, evaluation_mode=True)).figures()


def trainer_settings(config: Config, precision: str, steps: int) -> dict[str, Any]:
    """Return the arguments of Trainer for the settings of a run. Trainer then saves nothing."""
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
        "use_cpu": not torch.accelerator.is_available(),  # without this, Trainer refuses bf16 on a CPU
        "save_strategy": "no",
        "report_to": "none",
    }


def find_obstacle(grouping: str) -> str | None:
    """Return why the installed transformers cannot run this sampling strategy, or None if it can.

    Trainer takes an unknown strategy for `random`.
    """
    if grouping == "batch_rebalance" and not hasattr(trainer_pt_utils, "BatchRebalanceSampler"):
        return f"transformers {transformers.__version__} does not have {grouping}"
    return None


def run_trainer(
    task: Task,
    grouping: str = "",
    *,
    accumulation: int = 1,
    compiled: bool = False,
    attention: str = "auto",
    optimizer: str = "adamw_torch_fused",
    optimizer_arguments: str | None = None,
    kind: type[TurnTrainer] = TurnTrainer,
) -> None:
    """Run Trainer.

    grouping: Trainer's sampling strategy; by default it takes minilm's examples in their order. accumulation: the
        number of micro-batches of a step; more than one need a sampling strategy. compiled: use `torch_compile`.
        attention: the name of an attention of transformers, or `auto` for the default of transformers. optimizer,
        optimizer_arguments: Trainer's `optim` and `optim_args`; "muon" is MuonWithAdamW. kind: the Trainer.

    The time includes loading and padding. The one exception is a language model that takes minilm's examples in their
    order: their masks must be minilm's, so they are masked and padded in advance.
    """
    config = replace(task.config, model=replace(task.config.model, attention=attention))
    prepared = prepare_data(config)
    data, collate, size = find_rows(config, prepared, task.steps, in_order=not grouping)
    network = build_network(config, prepared)
    if optimizer == MUON:
        optimizers: Any = (MuonWithAdamW(network, config.optim), None)
    else:
        optimizers = (None, None)
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_settings(config, config.run.precision, task.steps)
        settings |= {"per_device_train_batch_size": size // accumulation}
        if optimizer != MUON:
            settings |= {"optim": optimizer, "optim_args": optimizer_arguments}
        arguments = TrainingArguments(
            output_dir=folder,
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            dataloader_num_workers=config.batch.workers,
            train_sampling_strategy=grouping or "random",
            gradient_accumulation_steps=accumulation,
            torch_compile=compiled,
            **settings,
        )
        kind(
            Turns(task, prepared),
            not grouping,
            config.optim,
            model=network,
            optimizers=optimizers,
            args=arguments,
            train_dataset=data,
            data_collator=collate,
        ).train()


def find_rows(config: Config, prepared: PreparedData, steps: int, *, in_order: bool) -> tuple[Dataset[Any], Any, int]:
    """Return Trainer's dataset, its collator and the items per batch. in_order: take the steps of minilm."""
    objective, examples, size = build_objective(config.objective), prepared.train, config.batch.examples
    plan = Plan(
        examples.lengths,
        examples=size,
        micro_tokens=size * config.batch.max_length,
        seed=config.run.seed,
        padded=True,
    )
    of_words = isinstance(objective, TokenClassificationObjective)
    if examples.labels is None and not of_words and in_order:
        return PreparedSteps(plan, steps, prepared, objective, config.run.seed), _only, 1
    if examples.labels is None and not of_words:
        collate: Any = DataCollatorForLanguageModeling(
            prepared.tokenizer,
            mlm=not isinstance(objective, CausalLMObjective),
            mlm_probability=objective.collator(
                prepared.tokenizer, examples, seed=config.run.seed, padded=False, multiple=1
            ).rate(),
            pad_to_multiple_of=padding_multiple(),
        )
        return Rows(examples), collate, size
    kind = DataCollatorForTokenClassification if of_words else DataCollatorWithPadding
    collate = kind(prepared.tokenizer, pad_to_multiple_of=padding_multiple())
    if not in_order:
        return Rows(examples), collate, size
    order = np.concatenate([plan.step(index).examples for index in range(steps)])
    return Subset(Rows(examples), order.tolist()), collate, size


def _only(items: list[Any]) -> Any:
    (item,) = items
    return item
