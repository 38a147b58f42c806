"""minilm beside HF Trainer: real tokens per second, in one run, step by step in turn, with equal losses shown.

    python benchmarks/throughput.py --quick

Each side runs in a process of its own with the settings that it has for a user, and only one works at a time. Masked LM
in fp32 (bf16 for both where this CPU is faster at it), RoBERTa with 6 layers, 384 wide, vocabulary 16,384, dropout 0:

- documents: 32 of at most 128 tokens a step. Trainer runs with its defaults (random batches, padded to the longest; it
  is handed them masked and padded already), and with its best setting for such text, `group_by_length`, and its own
  collator. minilm runs with its default, on the same documents and masks as Trainer, and with `group=epoch`.
- blocks: 32 full blocks of 128 tokens a step, where there is no padding to save.

A ratio is that of the tokens per second of the same round. Results go to benchmarks/results, as JSON and as a plot
(`pip install matplotlib`).
"""

import argparse
import json
import multiprocessing
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from minilm.config import Batch, Config, Data, MaskedLM, Model, Optim, Tokens
from minilm.hardware import choose_precision, count_flops, describe, device_peak, keep_freed_memory
from minilm.model import SparseHead, freeze_unused, load_model
from minilm.objectives import MaskedCollator, masked_collator
from minilm.optim import build_optimizer, learning_rate
from minilm.plan import Plan, Step
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
WARM_UP = 2  # rounds that are not counted
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row of the table."""

    name: str
    layout: Literal["documents", "blocks"]
    minilm: bool
    grouping: str = ""
    """minilm: `step` or `epoch`. Trainer: its sampling strategy, or nothing for ready batches in their order."""


CONTENDERS = (
    Contender(name="HF Trainer", layout="documents", minilm=False),
    Contender(name="HF Trainer, group_by_length", layout="documents", minilm=False, grouping="group_by_length"),
    Contender(name="minilm", layout="documents", minilm=True, grouping="step"),
    Contender(name="minilm, group=epoch", layout="documents", minilm=True, grouping="epoch"),
    Contender(name="HF Trainer", layout="blocks", minilm=False),
    Contender(name="minilm", layout="blocks", minilm=True, grouping="step"),
)


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

    def __init__(self, plan: Plan, examples: Examples, collator: MaskedCollator, steps: int) -> None:
        self.items = [self._item(plan.step(index), examples, collator) for index in range(steps)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.items[index]

    def _item(self, step: Step, examples: Examples, collator: MaskedCollator) -> dict[str, Tensor]:
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
    tokenizer, examples, _ = prepare_examples(config)
    networks = [load_model(config.model, tokenizer, max_length=config.batch.max_length, seed=0) for _ in range(2)]
    cost = count_flops(SparseHead(networks[1]), config.batch.max_length)
    rate = config.objective.rate
    if contender.minilm:
        connection.send(None)
        for taken in minilm_steps(
            config, contender, networks[0], tokenizer, examples, cost, precision, steps, connection
        ):
            connection.send(taken)
        return
    size = config.batch.examples
    ready = not contender.grouping
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=1 if ready else size,  # a ready item is a whole batch
            learning_rate=config.optim.lr,
            weight_decay=config.optim.weight_decay,
            max_grad_norm=config.optim.max_grad_norm,
            bf16=precision == "bf16",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            train_sampling_strategy=contender.grouping or "random",
            optim="adamw_torch_fused",  # its default
        )
        whole = Plan(examples.lengths, examples=size, micro_tokens=size * config.batch.max_length, padded=True)
        collator = masked_collator(config.objective, tokenizer, seed=0, padded=True)
        trainer = TurnTrainer(
            Turns(connection, cost, rate),
            ready,
            model=networks[0],
            args=arguments,
            train_dataset=ReadySteps(whole, examples, collator, steps) if ready else Rows(examples),
            data_collator=_only if ready else DataCollatorForLanguageModeling(tokenizer, mlm_probability=rate),
        )
        trainer.train()


def _only(items: list[Any]) -> Any:
    (item,) = items
    return item


def minilm_steps(
    config: Config,
    contender: Contender,
    network: Any,
    tokenizer: Any,
    examples: Examples,
    cost: Any,
    precision: str,
    steps: int,
    connection: Connection,
) -> Iterator[Taken]:
    """minilm's steps, one at a turn; planning, masking and packing are in the time that is taken."""
    accelerator = Accelerator(cpu=True, mixed_precision="no" if precision == "fp32" else precision)
    keep_freed_memory(accelerator.device)  # as train() does
    head = SparseHead(network)
    freeze_unused(head)
    model, optimizer = accelerator.prepare(head, build_optimizer(head, config.optim))
    model.train()
    plan = Plan(
        examples.lengths,
        examples=config.batch.examples,
        micro_tokens=config.batch.micro_tokens,
        group=contender.grouping,
        padded=not head.padding_free,
    )
    collator = masked_collator(config.objective, tokenizer, seed=0, padded=not head.padding_free)
    loader = enumerate(load_steps(plan, examples, collator, accelerator, range(steps), workers=0))
    while connection.recv():
        mark = time.perf_counter()
        index, (step, micro_batches) = next(loader)
        lr = learning_rate(config.optim, index, steps)
        result = train_step(
            accelerator, model, optimizer, micro_batches, lr=lr, max_grad_norm=config.optim.max_grad_norm
        )
        seconds = time.perf_counter() - mark
        yield Taken(
            seconds=seconds,
            tokens=step.tokens,
            padded_tokens=step.padded_tokens,
            flops=cost.step(step, collator.rate),
            loss=float(result.loss),
            memory=peak_memory(),
        )


def compare(config: Config, contenders: list[Contender], precision: str, rounds: int) -> dict[Contender, list[Taken]]:
    """Every contender's steps, one of each a round, in an order that is turned from round to round."""
    context = multiprocessing.get_context("spawn")
    total = rounds + WARM_UP
    sides: dict[Contender, Connection] = {}
    taken: dict[Contender, list[Taken]] = {contender: [] for contender in contenders}
    processes = []
    for contender in contenders:
        here, there = context.Pipe()
        settings = replace(config, batch=replace(config.batch, layout=contender.layout))
        process = context.Process(target=serve, args=(there, contender, settings, precision, total), daemon=True)
        process.start()
        here.recv()  # one builds at a time
        sides[contender] = here
        processes.append(process)
    for number in range(total):
        turn = number % len(contenders)
        for contender in (*contenders[turn:], *contenders[:turn]):
            sides[contender].send(True)
            step = sides[contender].recv()
            if number >= WARM_UP:
                taken[contender].append(step)
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for process in processes:
        process.terminate()
    return taken


def summary(steps: list[Taken], baseline: list[Taken], peak: float) -> dict[str, float]:
    """The figures of one row."""
    speeds = [step.tokens / step.seconds for step in steps]
    ratios = sorted(speed / (base.tokens / base.seconds) for speed, base in zip(speeds, baseline, strict=True))
    quarter = len(ratios) // 4
    seconds, tokens = sum(step.seconds for step in steps), sum(step.tokens for step in steps)
    return {
        "tokens_per_second": tokens / seconds,
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[quarter],
        "ratio_high": ratios[-1 - quarter],
        "padding": 1 - tokens / sum(step.padded_tokens for step in steps),
        "peak_memory": steps[-1].memory,
        "mfu": sum(step.flops for step in steps) / seconds / peak,
    }


def plot(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Bars of tokens per second, grouped by layout."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    labels = [f"{row['name']} ({row['layout']})" for row in rows]
    colours = ["#c44e52" if row["name"].startswith("minilm") else "#8c8c8c" for row in rows]
    bars = axes.barh(labels, [row["tokens_per_second"] for row in rows], color=colours)
    axes.bar_label(bars, [f"{row['ratio']:.2f}x" for row in rows], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("real tokens per second")
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: about three minutes on two cores")
    parser.add_argument("--layout", choices=("documents", "blocks"), help="only this one")
    options = parser.parse_args()
    device = torch.device("cpu")
    precision = choose_precision("auto", device).name
    peak = device_peak(device, precision)
    hardware = describe(device)
    title = f"{hardware['device']}, {hardware['threads_per_process']} threads, {precision}"
    print(f"{title}; MFU against {peak.flops / 1e9:,.0f} GFLOP/s, {peak.source}")
    rows = []
    for layout in ("documents", "blocks"):
        if options.layout not in (None, layout):
            continue
        contenders = [contender for contender in CONTENDERS if contender.layout == layout]
        rounds = {"documents": 8, "blocks": 5}[layout] * (1 if options.quick else 3)
        taken = compare(CONFIG, contenders, precision, rounds)
        trainer, same = taken[contenders[0]], next(c for c in contenders if c.minilm)
        apart = max(abs(a.loss - b.loss) for a, b in zip(trainer, taken[same], strict=True))
        print(f"\n{layout}: {rounds} steps of each; losses of Trainer and minilm differ by at most {apart:.1e}")
        print(f"{'':<28} real tokens/s   of Trainer's (middle half)   padding    MFU   memory")
        for contender in contenders:
            row: dict[str, Any] = {**asdict(contender), **summary(taken[contender], trainer, peak.flops)}
            rows.append({**row, "loss_difference": apart, "rounds": rounds})
            spread = f"{row['ratio']:.2f}x ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
            print(
                f"{contender.name:<28} {row['tokens_per_second']:13,.0f}   {spread:<26} {row['padding']:8.1%}  "
                f"{row['mfu']:5.0%}  {row['peak_memory'] / 1e9:4.1f} GB"
            )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"throughput-{re.sub(r'[^a-z0-9]+', '-', title.lower())}.json"
    path.write_text(json.dumps({"hardware": hardware, "precision": precision, "rows": rows}, indent=2) + "\n")
    print(f"\nwritten to {path}", end="")
    try:
        plot(path.with_suffix(".png"), rows, title)
        print(f" and {path.with_suffix('.png').name}")
    except ImportError:
        print("; for a plot, pip install matplotlib")


if __name__ == "__main__":
    main()
