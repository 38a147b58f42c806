"""minilm beside HF Trainer on a GPU: BERT-base at 128 and at 512 tokens, and GPT-2 (124 M) at 1,024, in ten minutes.

    python benchmarks/gpu.py

Models from scratch by their published shapes, without dropout, in bf16 by autocast; no download. The documents are made
up (synthetic.py), with log-normal lengths cut off at the model's: for BERT a median of 45 and of 140 words; GPT-2 gets
full blocks. Each side runs in a process of its own on the first GPU and takes ten steps at its turn, which end with the
GPU's last kernel. Trainer runs as in throughput.py: with its defaults (on minilm's batches, masked beforehand), and
with `group_by_length`. Both have four loader workers. Memory is the most that the tensors of a side took.

MFU counts what the documents need without padding and with a head at the targets alone, against the datasheet. For
BERT-base at 128 tokens, 40% on an H200 are about 725,000 tokens per second. Results go to benchmarks/results, as JSON
and as a plot (`pip install -e ".[report]"`).
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
from sides import Contender, Rounds, minilm_steps
from synthetic import write_corpus
from throughput import measure
from trainer_side import trainer_steps

from minilm.config import Batch, CausalLM, Config, MaskedLM, Model, Optim

TARGET = 725_000  # real tokens per second of BERT-base at 128 tokens: 40% of an H200
OPTIM = Optim(lr=1e-4, warmup=0)
BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "vocab_size": 30522}
GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "vocab_size": 50257}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model and its documents. A step is `batch.examples` of them, in one forward."""

    config: Config
    vocabulary: int
    median: float
    """Words of a document."""
    sigma: float = 0.9

    @property
    def causal(self) -> bool:
        return isinstance(self.config.objective, CausalLM)


def masked(length: int, examples: int) -> Config:
    """BERT-base at this length."""
    batch = Batch(examples=examples, max_length=length, micro_tokens=examples * length, workers=4)
    return Config(model=Model(type="bert", config={**BERT}), objective=MaskedLM(), batch=batch, optim=OPTIM)


JOBS = {
    "BERT-base, 128 tokens": Job(config=masked(128, 512), vocabulary=30522, median=45),
    "BERT-base, 512 tokens": Job(config=masked(512, 128), vocabulary=30522, median=140),
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
}


def contenders_of(job: Job, folder: Path, steps: int) -> list[Contender]:
    """Trainer with its defaults, with its best setting for lengths, and minilm, on documents enough for these steps."""
    batch = job.config.batch
    blocks = batch.layout == "blocks"
    words = batch.max_length if blocks else job.median  # of an example; the mean of a document is above its median
    documents = round(1.1 * steps * batch.examples * words / job.median)
    data, tokens = write_corpus(
        folder, documents, vocabulary=job.vocabulary, median=job.median, sigma=job.sigma, causal=job.causal
    )
    config = replace(job.config, data=data, tokens=tokens)
    grouped = partial(trainer_steps, grouping="group_by_length")
    return [
        Contender(name="HF Trainer", config=config, steps=trainer_steps),
        *([] if blocks else [Contender(name="HF Trainer, group_by_length", config=config, steps=grouped)]),
        Contender(name="minilm", config=config, steps=minilm_steps),
    ]


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Bars, with a line at the target of the first job."""
    axes = figure.subplots()
    report.bars(axes, rows)
    here = sum(row["workload"] == next(iter(JOBS)) for row in rows)
    axes.plot([TARGET, TARGET], [-0.5, here - 0.5], color=report.IDEAL, linestyle="--")
    axes.annotate("40% of an H200", (TARGET, -0.5), color=report.IDEAL, ha="center", va="bottom", fontsize=8)


def main() -> None:
    """The command line. Exits with 2 where there is no GPU."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA GPU, and torch finds none here", file=sys.stderr)
        sys.exit(2)
    machine = replace(report.this_machine(), precision="bf16")
    rounds, rows = Rounds(count=7, warm_up=1, block=10), []
    for name, job in JOBS.items():
        with tempfile.TemporaryDirectory() as folder:
            steps = (rounds.count + rounds.warm_up) * rounds.block
            rows += measure(name, contenders_of(job, Path(folder), steps), rounds, machine)
    ours = next(row for row in rows if row["ours"])["tokens_per_second"]
    print(
        f"\nminilm at 128 tokens: {ours:,.0f} tokens/s, {ours / TARGET:.0%} of the {TARGET:,} that are 40% of an H200"
    )
    report.write("gpu", machine, {"rows": rows}, lambda figure: draw(figure, rows), (9, 5))


if __name__ == "__main__":
    main()
