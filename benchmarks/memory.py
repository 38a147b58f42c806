"""Compare the peak memory of minilm and HF Trainer on models of 124 and 150 million parameters.

    python benchmarks/memory.py --precision bf16

The jobs are masked LM with a ModernBERT of 150 million parameters and causal LM with a GPT-2 of 124 million, on full
blocks of 512 and of 1,024 tokens. A step has 8,192 tokens. The models have their published shapes, random weights and
no dropout. synthetic.py makes up the documents, so that nothing is downloaded.

Each side trains alone in a process of its own for `--steps` steps:

- HF Trainer: the whole step in one micro-batch, which is its default.
- HF Trainer, accumulated: one block per micro-batch, which is its least memory.
- minilm: `batch.micro_tokens auto`, which chooses the size of its micro-batches by measuring them.

The memory is the most that the process had in RAM, with Python and the libraries in it; on a GPU, the most that the
tensors took. The last column says how much less the others need than Trainer's default. Results go to
benchmarks/results, as JSON and as a plot (`pip install -e ".[report]"`).
"""

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import report
from comparison import Contender, Rounds, compare, run_minilm
from hf_trainer import run_trainer
from synthetic import write_corpus

from minilm.config import Batch, CausalLM, Config, MaskedLM, Model, Optim

STEP_TOKENS = 8192
DOCUMENT_WORDS = 300  # median
MODERNBERT = Model(type="modernbert", config={"vocab_size": 50368})
GPT2 = Model(type="gpt2", config={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "vocab_size": 50257})


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model with its objective, on blocks of one length."""

    model: Model
    objective: MaskedLM | CausalLM
    vocabulary: int
    length: int
    """Tokens of a block."""

    def configure(self, folder: Path, steps: int) -> Config:
        """Return the configuration for these steps, with its documents in `folder`."""
        documents = round(1.2 * (steps + 1) * STEP_TOKENS / DOCUMENT_WORDS) + 20
        causal = isinstance(self.objective, CausalLM)
        data, tokens = write_corpus(
            folder, documents, vocabulary=self.vocabulary, median=DOCUMENT_WORDS, sigma=0.5, causal=causal
        )
        batch = Batch(examples=STEP_TOKENS // self.length, max_length=self.length, layout="blocks")
        return Config(
            data=data,
            tokens=tokens,
            model=self.model,
            objective=self.objective,
            batch=batch,
            optim=Optim(lr=1e-4, warmup=0),
        )


JOBS = {
    f"{name}, {length:,} tokens": Job(model=model, objective=objective, vocabulary=vocabulary, length=length)
    for name, model, objective, vocabulary in (
        ("ModernBERT", MODERNBERT, MaskedLM(rate=0.3), 50368),
        ("GPT-2", GPT2, CausalLM(), 50257),
    )
    for length in (512, 1024)
}


def list_contenders(config: Config) -> list[Contender]:
    """Return both settings of Trainer, and minilm."""
    accumulated = partial(run_trainer, grouping="batch_rebalance", accumulation=config.batch.examples)
    return [
        Contender(name="HF Trainer", config=config, run=run_trainer),
        Contender(name="HF Trainer, accumulated", config=config, run=accumulated),
        Contender(name="minilm", config=config, run=run_minilm),
    ]


def measure(name: str, job: Job, machine: report.Machine, steps: int) -> list[dict[str, Any]]:
    """Print the table of a job, and return its rows."""
    print(f"\n{name}, {steps} steps of {STEP_TOKENS:,} tokens\n{'':<26} memory   tokens/s   of HF Trainer's memory")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for side in list_contenders(job.configure(Path(folder), steps)):
            # One side at a time, so that the memory of the machine is its own.
            turns = compare([side], machine.precision, Rounds(count=steps, warm_up=0))[0]
            memory = turns[-1].memory
            share = memory / rows[0]["peak_memory"] if rows else 1.0
            speed = sum(turn.tokens for turn in turns[1:]) / sum(turn.seconds for turn in turns[1:])
            rows.append(
                {"job": name, "name": side.name, "peak_memory": memory, "tokens_per_second": speed, "share": share}
            )
            print(f"{side.name:<26} {memory / 1e9:3.1f} GB {speed:10,.0f}   {share:.2f}")
    return rows


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Draw a bar for each row."""
    axes = figure.subplots()
    colours = [report.OURS if row["name"] == "minilm" else report.OTHERS for row in rows]
    labels = [f"{row['name']} ({row['job']})" for row in rows]
    drawn = axes.barh(labels, [row["peak_memory"] / 1e9 for row in rows], color=colours)
    axes.bar_label(drawn, [f"{row['share']:.2f}x" for row in rows], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlabel("peak memory, GB")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=3, help="steps of each side (default: 3, at least 2)")
    parser.add_argument("--job", choices=[*JOBS], help="run only this job")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="auto", help="default: the faster one")
    options = parser.parse_args()
    machine, rows = report.describe_machine(options.precision), list[dict[str, Any]]()
    for name in [options.job] if options.job else [*JOBS]:
        rows += measure(name, JOBS[name], machine, max(2, options.steps))
    report.write("memory", machine, {"rows": rows}, partial(draw, rows=rows), (8, 0.4 * len(rows) + 1.2))


if __name__ == "__main__":
    main()
