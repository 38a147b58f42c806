"""minilm's train_step beside HF Trainer: same model, weights, batches and masks, alternating step by step in one run.

    python benchmarks/throughput.py

Masked LM on documents of at most 128 tokens, 32 of them a step (RoBERTa, 6 layers, 384 wide, vocabulary 16,384, fp32,
dropout 0). Trainer runs with its defaults and is handed batches that are already masked and padded to the longest
document; minilm plans, masks and pads inside the time that is taken. A step's ratio compares the same 32 documents.
Both share one process and the C library's own memory settings, as a user of Trainer has them; minilm's are not used.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from minilm.config import Batch, Config, Data, MaskedLM, Model, Optim, Tokens
from minilm.hardware import describe
from minilm.model import SparseHead, load_model
from minilm.objectives import MaskedCollator, masked_collator
from minilm.optim import build_optimizer, learning_rate
from minilm.plan import Plan
from minilm.tokens import Examples
from minilm.train import load_steps, prepare_examples, train_step

CONFIG = Config(
    data=Data(source="pydocs"),
    tokens=Tokens(vocab_size=16384, overflow="truncate"),
    model=Model(
        type="roberta",
        config={
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "intermediate_size": 1536,
            "max_position_embeddings": 130,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    ),
    objective=MaskedLM(rate=0.15),
    batch=Batch(examples=32, max_length=128),
    optim=Optim(lr=1e-4, warmup=0, schedule="linear", weight_decay=0.01, max_grad_norm=1.0),
)
WARM_UP = 2  # steps that are not counted


@dataclass
class Timing:
    """What both sides did in each step."""

    trainer_seconds: list[float] = field(default_factory=list)
    minilm_seconds: list[float] = field(default_factory=list)
    trainer_losses: list[Tensor] = field(default_factory=list)
    minilm_losses: list[Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class WholeSteps(Dataset[dict[str, Tensor]]):
    """Item i: the documents of step i as Trainer wants them, padded to the longest, with labels of -100 elsewhere."""

    def __init__(self, plan: Plan, examples: Examples, collator: MaskedCollator, steps: int) -> None:
        self.items = [self._item(plan, examples, collator, index) for index in range(steps)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.items[index]

    def _item(self, plan: Plan, examples: Examples, collator: MaskedCollator, index: int) -> dict[str, Tensor]:
        step = plan.step(index)
        (ids,) = step.micro_batches[0]
        batch = collator([examples[int(i)] for i in ids], ids, step.epoch)
        (group,) = batch.packing.groups
        labels_T = torch.full_like(batch.input_ids_T, -100)
        labels_T[batch.target_index_N] = batch.target_ids_N
        real_RxL = group.real(labels_T.device)
        return {
            "input_ids": group.pad(batch.input_ids_T).masked_fill(~real_RxL, collator.pad_id),
            "attention_mask": real_RxL.long(),
            "labels": group.pad(labels_T).masked_fill(~real_RxL, -100),
        }


class RecordingTrainer(Trainer):
    """Trainer on ready batches in their order, keeping each step's loss."""

    def __init__(self, timing: Timing, **settings: Any) -> None:
        super().__init__(**settings)
        self.timing = timing

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own loss, noted."""
        loss: Any = super().compute_loss(*args, **kwargs)
        self.timing.trainer_losses.append(loss.detach())
        return loss


class Alternate(TrainerCallback):
    """After each of Trainer's steps, take minilm's step on the same documents, and time both."""

    def __init__(self, timing: Timing, minilm_step: Any) -> None:
        self.timing, self.minilm_step = timing, minilm_step
        self.mark = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's time is all that passed since minilm's last step ended, loading its batch included."""
        now = time.perf_counter()
        self.timing.trainer_seconds.append(now - self.mark)
        loss, tokens = self.minilm_step()
        self.mark = time.perf_counter()
        self.timing.minilm_seconds.append(self.mark - now)
        self.timing.minilm_losses.append(loss)
        self.timing.tokens.append(tokens)


def minilm_steps(
    config: Config,
    accelerator: Accelerator,
    network: PreTrainedModel,
    plan: Plan,
    examples: Examples,
    total: int,
    collator: MaskedCollator,
) -> Any:
    """A function that takes minilm's next step and returns its loss and its real tokens."""
    head = SparseHead(network)
    model, optimizer = accelerator.prepare(head, build_optimizer(head, config.optim))
    model.train()
    steps = enumerate(load_steps(plan, examples, collator, accelerator, range(total), workers=0))

    def step() -> tuple[Tensor, int]:
        index, (step, micro_batches) = next(steps)
        lr = learning_rate(config.optim, index, total)
        result = train_step(
            accelerator, model, optimizer, micro_batches, lr=lr, max_grad_norm=config.optim.max_grad_norm
        )
        return result.loss, step.tokens

    return step


def compare(config: Config, steps: int) -> Timing:
    """Run `steps` steps of both, alternating, from the same weights on the same documents."""
    transformers_logging.set_verbosity_error()
    accelerator = Accelerator(cpu=True)
    tokenizer, examples, _ = prepare_examples(config)
    networks = [load_model(config.model, tokenizer, max_length=config.batch.max_length, seed=0) for _ in range(2)]
    collators = [masked_collator(config.objective, tokenizer, seed=0, padded=padded) for padded in (True, False)]
    lengths, count = examples.lengths, config.batch.examples
    plan = Plan(lengths, examples=count, micro_tokens=config.batch.micro_tokens)
    whole = Plan(lengths, examples=count, micro_tokens=count * config.batch.max_length, padded=True)
    timing = Timing()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=1,  # an item is a whole batch
            learning_rate=config.optim.lr,
            weight_decay=config.optim.weight_decay,
            max_grad_norm=config.optim.max_grad_norm,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = RecordingTrainer(
            timing,
            model=networks[0],
            args=arguments,
            train_dataset=WholeSteps(whole, examples, collators[0], steps),
            data_collator=_only,
        )
        step = minilm_steps(config, accelerator, networks[1], plan, examples, steps, collators[1])
        trainer.add_callback(Alternate(timing, step))
        trainer.train()
    return timing


def _only(items: list[Any]) -> Any:
    (item,) = items
    return item


def report(timing: Timing, device: torch.device) -> str:
    """The table that the script prints."""
    counted = slice(WARM_UP, None)
    ours, theirs, tokens = timing.minilm_seconds[counted], timing.trainer_seconds[counted], timing.tokens[counted]
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    quarter = len(ratios) // 4
    apart = max(abs(float(a) - float(b)) for a, b in zip(timing.trainer_losses, timing.minilm_losses, strict=True))
    first, last = float(timing.minilm_losses[0]), float(timing.minilm_losses[-1])
    hardware = describe(device)
    return f"""{hardware["device"]}, {hardware["threads_per_process"]} threads, {len(ratios)} steps of each, fp32
HF Trainer  {sum(tokens) / sum(theirs):8,.0f} real tokens/s
minilm      {sum(tokens) / sum(ours):8,.0f} real tokens/s
ratio of a step: median {statistics.median(ratios):.2f}, middle half {ratios[quarter]:.2f} to {ratios[-1 - quarter]:.2f}
losses of a step differ by at most {apart:.1e} (they fall from {first:.3f} to {last:.3f})"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="steps of each side, two of them warm-up (default: 40)")
    timing = compare(CONFIG, parser.parse_args().steps)
    print(report(timing, torch.device("cpu")))


if __name__ == "__main__":
    main()
