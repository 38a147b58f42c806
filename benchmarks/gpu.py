"""Compare minilm with HF Trainer on a GPU: BERT-base at 128 and at 512 tokens, and GPT-2 (124 M) at 1,024 tokens.

    python benchmarks/gpu.py

The models have their published shapes and random weights, no dropout, and train in bf16 by autocast. Nothing is
downloaded. synthetic.py makes up the documents. Their lengths are log-normal and cut off at the model's length; BERT's
have a median of 45 words at 128 tokens and of 140 words at 512 tokens. GPT-2 gets full blocks. On a GPU with less than
120 GB, a step has half of the examples, so that Trainer has room.

Each side runs in its own process on the first GPU, and the sides take turns. A turn has two steps that do not count, in
which the side allocates its memory again, and then ten steps that count. It ends with the GPU's last kernel. The first
turn of each side does not count. Trainer runs as in throughput.py: with its defaults, on minilm's batches, which are
masked in advance, and with `group_by_length`. minilm runs with its defaults and with `run.compile`. The last job
compares that with Trainer's `torch_compile`, for BERT-base at 128 tokens. All sides have four loader workers. The
memory is the most that the tensors of a side took.

MFU counts the FLOPs that the documents need without padding and with a head at the targets alone, relative to the
datasheet. For BERT-base at 128 tokens, the goal on an H200 is 725,000 tokens per second. Results go to
benchmarks/results, as JSON and as a plot (`pip install -e ".[report]"`).
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch
from comparison import Contender, Rounds, run_minilm
from hf_trainer import run_trainer
from synthetic import write_corpus
from throughput import measure, with_examples

from minilm.config import Batch, CausalLM, Config, MaskedLM, Model, Optim

LARGE = 120e9  # bytes; a GPU with this much memory has room for all examples of Trainer's step
TARGET = 725_000  # real tokens per second: the goal for BERT-base at 128 tokens on an H200
OPTIM = Optim(lr=1e-4, warmup=0)
BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "vocab_size": 30522}
GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "vocab_size": 50257}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model and its documents. A step has `batch.examples` documents, in one forward pass."""

    config: Config
    vocabulary: int
    median: float
    """Median number of words of a document."""
    sigma: float = 0.9
    compiled: bool = False
    """Whether to compare only compiled models, without Trainer's other settings and minilm's defaults."""

    @property
    def causal(self) -> bool:
        return isinstance(self.config.objective, CausalLM)


def masked(length: int, examples: int) -> Config:
    """Return the configuration of BERT-base at this length."""
    batch = Batch(examples=examples, max_length=length, micro_tokens=examples * length, workers=4)
    return Config(model=Model(type="bert", config={**BERT}), objective=MaskedLM(), batch=batch, optim=OPTIM)


SHORT = Job(config=masked(128, 896), vocabulary=30522, median=45)
JOBS = {
    "BERT-base, 128 tokens": SHORT,
    "GPT-2, 1,024 tokens": Job(
        config=Config(
            model=Model(type="gpt2", config={**GPT2}),
            objective=CausalLM(),
            batch=Batch(examples=32, max_length=1024, micro_tokens=32 * 1024, layout="blocks", workers=4),
            optim=OPTIM,
        ),
        vocabulary=50257,
        median=300,
    ),
    "BERT-base, 512 tokens": Job(config=masked(512, 192), vocabulary=30522, median=140),
    "BERT-base, 128 tokens, torch_compile": replace(SHORT, compiled=True),
}


def contenders_of(job: Job, folder: Path, steps: int) -> list[Contender]:
    """Return Trainer with default and best settings and minilm, plain and compiled, with documents for these steps."""
    batch = job.config.batch
    blocks = batch.layout == "blocks"
    # The words of an example. The mean length of a document is above the median.
    words = batch.max_length if blocks else job.median
    documents = round(1.1 * steps * batch.examples * words / job.median)
    data, tokens = write_corpus(
        folder, documents, vocabulary=job.vocabulary, median=job.median, sigma=job.sigma, causal=job.causal
    )
    config = replace(job.config, data=data, tokens=tokens)
    ours = Contender(name="minilm", config=config, run=run_minilm)
    fused = replace(ours, name="minilm, run.compile", config=replace(config, run=replace(config.run, compile=True)))
    if job.compiled:
        compiled = partial(run_trainer, compiled=True)
        return [Contender(name="HF Trainer, torch_compile", config=config, run=compiled), fused]
    theirs = Contender(name="HF Trainer", config=config, run=run_trainer)
    grouping = "group_by_length"
    run = partial(run_trainer, grouping=grouping)
    grouped = replace(theirs, name=f"HF Trainer, {grouping}", run=run, biased=True)
    return [theirs, ours, fused] if blocks else [theirs, grouped, ours, fused]


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Draw bars, and a line at the target of the first job."""
    axes = figure.subplots()
    report.bars(axes, rows)
    here = sum(row["workload"] == next(iter(JOBS)) for row in rows)
    axes.plot([TARGET, TARGET], [-0.5, here - 0.5], color=report.IDEAL, linestyle="--")
    axes.annotate(f"{TARGET:,}", (TARGET, -0.5), color=report.IDEAL, ha="center", va="bottom", fontsize=8)


def main() -> None:
    """Measure as the command line asks. Without a GPU, the program ends with status 2."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA GPU, and torch finds none", file=sys.stderr)
        sys.exit(2)
    machine = replace(report.describe_machine(), precision="bf16")
    small = torch.cuda.get_device_properties(0).total_memory < LARGE
    rounds, rows = Rounds(count=4, warm_up=1, block=10, lead_in=2), list[dict[str, Any]]()
    for name, job in JOBS.items():
        if small:
            job = replace(job, config=with_examples(job.config, job.config.batch.examples // 2))
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(name, contenders_of(job, Path(folder), rounds.steps), rounds, machine)
        report.write("gpu", machine, {"rows": rows}, partial(draw, rows=rows), (9, 0.5 * len(rows) + 1.2))
    ours = max(row["tokens_per_second"] for row in rows if row["ours"] and row["workload"] == next(iter(JOBS)))
    print(f"\nminilm at 128 tokens: {ours:,.0f} tokens/s, {ours / TARGET:.0%} of the goal on an H200, {TARGET:,}")


if __name__ == "__main__":
    main()
