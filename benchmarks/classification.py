"""Compare minilm with HF Trainer on a whole classification: accuracy, F1 and training time, for several seeds.

    python benchmarks/classification.py MODEL --data.source mrpc_train.tsv --data.eval-source mrpc_validation.tsv \
        --data.column sentence1 --data.pair-column sentence2 --data.label-column label

The settings are those of recipes/classify.py, and its flags change them. Trainer gets the same batches, learning rate,
schedule, warm-up, betas, weight decay, clipping, seed and initial weights. It uses its own collator (padding to the
longest row) and fused AdamW. Two differences remain: the dropout masks, and Trainer's warm-up, which is one step late.

The two runs of a seed are separate processes. They run at the same time, each on half of the processors, so that other
programs slow both alike. minilm evaluates both models on the same examples. The time is that of the training steps
alone. Results go to benchmarks/results as JSON.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from hf_trainer import OrderedTrainer, Rows, evaluate, trainer_settings
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from minilm.config import Batch, Classification, Config, Model, Optim, Run
from minilm.config.command_line import parse_flags
from minilm.data.batch_plan import Plan
from minilm.data.corpus import Examples
from minilm.distributed.hardware import describe, usable_processors
from minilm.distributed.precision import choose_precision
from minilm.objectives.factory import build_network, prepare_data
from minilm.train import train

CONFIG = Config(
    objective=Classification(),
    batch=Batch(examples=32, max_length=128),
    optim=Optim(lr=2e-5, warmup=0.06),
    run=Run(epochs=3.0, save_every=0),
)
RESULTS = Path(__file__).parent / "results"
FIGURES = ("accuracy", "f1", "eval_loss", "train_seconds")


class Clock(TrainerCallback):
    """A callback that measures the seconds of training."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Record the beginning."""
        self.begin = time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Record the duration."""
        self.seconds = time.perf_counter() - self.begin


class Batches(Dataset[list[dict[str, Any]]]):
    """A dataset whose item i has the examples of minilm's step i as rows for Trainer."""

    def __init__(self, config: Config, examples: Examples) -> None:
        size = config.batch.examples
        self.rows = Rows(examples)
        self.plan = Plan(
            examples.lengths,
            examples=size,
            micro_tokens=size * config.batch.max_length,
            seed=config.run.seed,
            group=config.batch.group,
        )
        self.steps = config.run.count_steps(self.plan.steps_per_epoch)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self.rows[int(i)] for i in self.plan.step(index).examples]


def by_minilm(config: Config) -> dict[str, float]:
    """Return the figures of a run of minilm."""
    with tempfile.TemporaryDirectory() as folder:
        return train(replace(config, run=replace(config.run, output_dir=folder))).figures


def by_trainer(config: Config) -> dict[str, float]:
    """Return the figures of a run of Trainer."""
    transformers_logging.set_verbosity_error()
    precision = choose_precision(config.run.precision, Accelerator().device).name
    prepared = prepare_data(config)
    batches, pad = Batches(config, prepared.train), DataCollatorWithPadding(prepared.tokenizer)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_settings(config, precision, len(batches)) | {"per_device_train_batch_size": 1}
        arguments = TrainingArguments(output_dir=folder, logging_strategy="no", disable_tqdm=True, **settings)
        model = build_network(config, prepared)
        OrderedTrainer(
            model=model,
            args=arguments,
            train_dataset=batches,
            data_collator=lambda items: pad(items[0]),
            callbacks=[clock],
        ).train()
    return {**evaluate(config, model, prepared), "train_seconds": clock.seconds}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], epilog="The flags of recipes/classify.py work too."
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of the model to fine-tune")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each side (default: 3)")
    options, rest = parser.parse_known_args()
    config = parse_flags(replace(CONFIG, model=Model(name=options.model)), arguments=rest)
    for part, name in (("optim", "layer_decay"), ("objective", "label_smoothing"), ("batch", "micro_tokens")):
        if getattr(getattr(config, part), name) != getattr(getattr(CONFIG, part), name):
            parser.error(f"{part}.{name} has no counterpart in Trainer: leave it out")
    results: dict[str, list[dict[str, float]]] = {"HF Trainer": [], "minilm": []}
    os.environ["OMP_NUM_THREADS"] = str(max(1, usable_processors() // 2))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    context = multiprocessing.get_context("spawn")
    for seed in range(options.seeds):
        seeded = replace(config, run=replace(config.run, seed=seed))
        with context.Pool(2) as pool:
            sides = [pool.apply_async(side, (seeded,)) for side in (by_trainer, by_minilm)]
            for name, side in zip(results, sides, strict=True):
                figures = side.get()
                results[name].append({key: figures[key] for key in FIGURES})
                print(f"seed {seed}, {name}: {results[name][-1]}", file=sys.stderr, flush=True)
            # Let both processes end by themselves. Terminated ones would warn of resources that they did not free.
            pool.close()
            pool.join()
    hardware = describe(torch.device("cpu"))
    each = f"{hardware['device']}, {hardware['threads_per_process']} thread(s) each"
    print(f"{each}; mean of {options.seeds} seeds (their spread)")
    print("             accuracy               F1                     seconds of training")
    for name, runs in results.items():
        columns = [[run[key] for run in runs] for key in ("accuracy", "f1", "train_seconds")]
        cells = [f"{statistics.mean(c):.4g} ({min(c):.4g} to {max(c):.4g})" for c in columns]
        print(f"{name:<11}  " + "  ".join(f"{cell:<21}" for cell in cells))
    ratios = [a["train_seconds"] / b["train_seconds"] for a, b in zip(*results.values(), strict=True)]
    print(f"minilm is {statistics.median(ratios):.2f} times faster ({min(ratios):.2f} to {max(ratios):.2f})")
    slug = re.sub(r"[^a-z0-9]+", "-", str(hardware["device"]).lower()).strip("-")
    path = RESULTS / f"classification-{slug}.json"
    path.write_text(json.dumps({"hardware": hardware, "results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
