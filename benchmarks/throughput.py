"""minilm beside HF Trainer: real tokens per second, in one run, step by step in turn, with equal losses shown.

    python benchmarks/throughput.py --quick

Each side runs in a process of its own with the settings that it has for a user, and only one works at a time, in fp32
(bf16 for both where this CPU is faster at it), 32 examples of at most 128 tokens a step, without dropout:

- masked-documents: masked LM, RoBERTa with 6 layers, 384 wide, vocabulary 16,384. Trainer runs with its defaults
  (random batches, padded to the longest; it is handed them masked and padded already), and with its best setting for
  such text, `group_by_length`, and its own collator. minilm runs with its default, on the same documents and masks as
  Trainer, and with `group=epoch`.
- masked-blocks: the same on full blocks, where there is no padding to save.
- causal-documents, causal-blocks: causal LM, GPT-2 with 6 layers, 384 wide, vocabulary 50,257.

A ratio is that of the tokens per second of the same round. Results go to benchmarks/results, as JSON and as a plot
(`pip install -e ".[report]"`).
"""

import argparse
import json
import multiprocessing
import re
import statistics
import sys
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from sides import Contender, Taken, serve

from minilm.config import Batch, CausalLM, Config, Data, MaskedLM, Model, Optim, Tokens
from minilm.hardware import choose_precision, describe, device_peak


def in_blocks(config: Config) -> Config:
    """The same on full blocks."""
    return replace(config, batch=replace(config.batch, layout="blocks"))


MASKED = Config(
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
CAUSAL = replace(
    MASKED,
    model=Model(
        type="gpt2",
        config={
            "n_embd": 384,
            "n_layer": 6,
            "n_head": 6,
            "n_positions": 128,
            "vocab_size": 50257,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    objective=CausalLM(),
)
WARM_UP = 2  # rounds that are not counted
RESULTS = Path(__file__).parent / "results"

TRAINER = Contender(name="HF Trainer", minilm=False)
GROUPED = Contender(name="HF Trainer, group_by_length", minilm=False, grouping="group_by_length")
MINILM = Contender(name="minilm", minilm=True, grouping="step")
EPOCH = Contender(name="minilm, group=epoch", minilm=True, grouping="epoch")
# By workload: its configuration, who takes part, Trainer first, and the rounds of a quick run.
WORKLOADS: dict[str, tuple[Config, list[Contender], int]] = {
    "masked-documents": (MASKED, [TRAINER, GROUPED, MINILM, EPOCH], 8),
    "masked-blocks": (in_blocks(MASKED), [TRAINER, MINILM], 5),
    "causal-documents": (CAUSAL, [TRAINER, GROUPED, MINILM], 3),
    "causal-blocks": (in_blocks(CAUSAL), [TRAINER, MINILM], 3),
}


def compare(config: Config, contenders: list[Contender], precision: str, rounds: int) -> dict[Contender, list[Taken]]:
    """Every contender's steps, one of each a round, in an order that is turned from round to round."""
    context = multiprocessing.get_context("spawn")
    total = rounds + WARM_UP
    sides: dict[Contender, Connection] = {}
    taken: dict[Contender, list[Taken]] = {contender: [] for contender in contenders}
    processes = []
    for contender in contenders:
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, contender, config, precision, total), daemon=True)
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
    """Bars of tokens per second, grouped by workload."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    labels = [f"{row['name']} ({row['workload']})" for row in rows]
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
    parser.add_argument("--quick", action="store_true", help="a third of the rounds")
    parser.add_argument("--workload", choices=[*WORKLOADS], help="only this one")
    options = parser.parse_args()
    device = torch.device("cpu")
    precision = choose_precision("auto", device).name
    peak = device_peak(device, precision)
    hardware = describe(device)
    title = f"{hardware['device']}, {hardware['threads_per_process']} threads, {precision}"
    print(f"{title}; MFU against {peak.flops / 1e9:,.0f} GFLOP/s, {peak.source}")
    rows = []
    for workload, (config, contenders, rounds) in WORKLOADS.items():
        if options.workload not in (None, workload):
            continue
        rounds *= 1 if options.quick else 3
        taken = compare(config, contenders, precision, rounds)
        trainer, same = taken[contenders[0]], next(c for c in contenders if c.minilm)
        apart = max(abs(a.loss - b.loss) for a, b in zip(trainer, taken[same], strict=True))
        print(f"\n{workload}: {rounds} steps of each; losses of Trainer and minilm differ by at most {apart:.1e}")
        print(f"{'':<28} real tokens/s   of Trainer's (middle half)   padding    MFU   memory")
        for contender in contenders:
            row: dict[str, Any] = {
                "workload": workload,
                **asdict(contender),
                **summary(taken[contender], trainer, peak.flops),
            }
            rows.append({**row, "loss_difference": apart, "rounds": rounds})
            spread = f"{row['ratio']:.2f}x ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
            print(
                f"{contender.name:<28} {row['tokens_per_second']:13,.0f}   {spread:<26} {row['padding']:8.1%}  "
                f"{row['mfu']:5.0%}  {row['peak_memory'] / 1e9:4.1f} GB"
            )
    RESULTS.mkdir(exist_ok=True)
    name = f"{title} {options.workload or ''}".strip().lower()
    path = RESULTS / f"throughput-{re.sub(r'[^a-z0-9]+', '-', name)}.json"
    path.write_text(json.dumps({"hardware": hardware, "precision": precision, "rows": rows}, indent=2) + "\n")
    print(f"\nwritten to {path}", end="")
    try:
        plot(path.with_suffix(".png"), rows, title)
        print(f" and {path.with_suffix('.png').name}")
    except ImportError:
        print('; for a plot, pip install -e ".[report]"')


if __name__ == "__main__":
    main()
