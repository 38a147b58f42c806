"""Train the main job by HF Trainer for as long as minilm took, with the same model, weights, examples and evaluation.

    accelerate launch recipes/mlm_pydocs.py --optim.name adamw
    python benchmarks/pydocs_trainer.py out/mlm_pydocs

Trainer gets the run's learning rate, schedule, warm-up, betas, weight decay, clipping, batch size and masking rate, its
own collator (dynamic masks, padding to the longest) and fused AdamW, also if the run had Muon. It makes as many steps
as fit into the seconds that minilm trained for. A first measurement of 40 steps, after 10 steps of warm-up, gives that
number. minilm's exact evaluation measures both.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from hf_trainer import Rows, evaluate, trainer_settings
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from minilm.config import Config
from minilm.config.serialization import read_run_config
from minilm.data.corpus import Examples
from minilm.distributed.hardware import describe
from minilm.distributed.precision import choose_precision
from minilm.models.loading import load_model
from minilm.objectives.factory import build_objective, prepare_data

WARM_UP = 10  # steps that are not timed


class Clock(TrainerCallback):
    """The time from the end of the warm-up to the end of training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when each step ends."""
        if state.global_step == WARM_UP:
            self.begin = time.perf_counter()
        self.end = time.perf_counter()


def train_with_trainer(
    config: Config, tokenizer: PreTrainedTokenizerBase, examples: Examples, precision: str, steps: int
) -> tuple[Any, float]:
    """Return the trained model, and the seconds that Trainer took for the steps after the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_settings(config, precision, steps)
        arguments = TrainingArguments(output_dir=folder, logging_steps=100, **settings)
        collator = build_objective(config.objective).collator(
            tokenizer, examples, seed=config.run.seed, padded=False, multiple=1
        )
        model = load_model(config.model, tokenizer, max_length=config.batch.max_length, seed=config.run.seed)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Rows(examples),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=collator.rate()),
        )
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
        return model, clock.end - clock.begin


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", metavar="DIR", type=Path, help="output folder of the main job")
    folder = parser.parse_args().run
    transformers_logging.set_verbosity_error()
    config = read_run_config(str(folder / "run.json"))
    ours = json.loads((folder / "all_results.json").read_text())
    precision = choose_precision(config.run.precision, Accelerator().device).name
    prepared = prepare_data(config)
    tokenizer = prepared.tokenizer
    _, trial = train_with_trainer(config, tokenizer, prepared.train, precision, WARM_UP + 40)
    steps = round(ours["train_seconds"] / trial * 40)
    model, seconds = train_with_trainer(config, tokenizer, prepared.train, precision, steps)
    theirs = evaluate(config, model, prepared)
    print(f"{describe(torch.device('cpu'))['device']}, {torch.get_num_threads()} threads")
    print("            seconds   steps  loss   bits per byte  / unigram's")
    for name, figures, time_taken, count in (
        ("minilm", ours, ours["train_seconds"], ours["steps"]),
        ("HF Trainer", theirs, seconds, steps),
    ):
        share = figures["bits_per_byte"] / figures["unigram_bits_per_byte"]
        row = f"{figures['eval_loss']:.3f}  {figures['bits_per_byte']:13.3f}  {share:.3f}"
        print(f"{name:<11} {time_taken:7.0f} {count:7d}  {row}")


if __name__ == "__main__":
    main()
