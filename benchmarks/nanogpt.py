"""Compare recipes/clm_shakespeare.py with nanoGPT's example for CPUs: the held-out loss and the seconds of a whole run.

    git clone https://github.com/karpathy/nanoGPT
    curl -O https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    python benchmarks/nanogpt.py nanoGPT input.txt

Both train a GPT with 4 layers, 4 heads, a width of 128 and no dropout on the characters of tiny Shakespeare: 2,000
steps of 12 blocks of 64. Each side runs by its own command, one after the other. nanoGPT has the settings of its
README, and also a higher learning rate. It computes in fp32. minilm chooses its precision.

"seconds" are those of the whole command. "training" leaves out start-up and evaluation: for nanoGPT, it is the median
time of an iteration that nanoGPT prints, times the number of steps. "loss" is the mean over all held-out characters but
the first of each block of 64, for both sides in fp32 on the same blocks. "own figure" is what the side itself prints;
nanoGPT takes 20 random batches for it. Results go to benchmarks/results, as JSON and as a plot
(`pip install -e ".[report]"`).
"""

import argparse
import json
import math
import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minilm.config import Config
from minilm.objectives.factory import prepare_data
from minilm.utils.progress import quiet_transformers

RECIPE = Path(__file__).parents[1] / "recipes" / "clm_shakespeare.py"
STEPS = 2000
README_FLAGS = [
    "config/train_shakespeare_char.py",
    *("--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64", "--batch_size=12"),
    *("--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0"),
]
NANOGPT_RATES, MINILM_RATES = (1e-3, 3e-3), {"adamw": (3e-3,), "muon": (1e-2,)}
NAMES = {"adamw": "AdamW", "muon": "Muon"}
OFFSET = "offset points"
AT_A_TIME = 128  # blocks of an evaluation's forward pass


def prepare_nanogpt(checkout: Path, text: Path, folder: Path) -> None:
    """Copy nanoGPT's code to a folder, and let it encode the text."""
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns(".git"))
    data = folder / "data" / "shakespeare_char"
    shutil.copy(text, data / "input.txt")
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, stdout=subprocess.DEVNULL)


def held_out_blocks(text: Path) -> list[list[str]]:
    """Return the characters of each of minilm's held-out blocks."""
    config: Config = runpy.run_path(str(RECIPE))["CONFIG"]
    prepared = prepare_data(replace(config, data=replace(config.data, source=str(text))))
    assert prepared.eval is not None
    end = prepared.tokenizer.eos_token_id
    rows = [[int(token) for token in prepared.eval[row] if token != end] for row in range(len(prepared.eval))]
    return [list(prepared.tokenizer.convert_ids_to_tokens(row)) for row in rows]


@torch.no_grad()
def held_out_loss(logits_of: Callable[[Tensor], Tensor], ids: dict[str, int], blocks: list[list[str]]) -> float:
    """Return the mean loss over all characters of the blocks but their first ones, in nats.

    logits_of: gives the logits of a batch of ids. ids: the id of each character.
    """
    nats, count = 0.0, 0
    for length in {len(block) for block in blocks}:
        rows = torch.tensor([[ids[character] for character in block] for block in blocks if len(block) == length])
        for part_RxL in torch.split(rows, AT_A_TIME):
            logits_RxLxV = logits_of(part_RxL)[:, :-1].double()
            targets_RxL = part_RxL[:, 1:]
            nats += float(-logits_RxLxV.log_softmax(-1).gather(-1, targets_RxL[..., None]).sum())
            count += targets_RxL.numel()
    return nats / count


def run_nanogpt(folder: Path, text: Path, rate: float, steps: int, blocks: list[list[str]]) -> dict[str, float]:
    """Run nanoGPT's train.py, and return the figures of its row."""
    out = folder / f"out-{rate:g}"
    flags = [f"--max_iters={steps}", f"--lr_decay_iters={steps}", f"--eval_interval={steps}", f"--out_dir={out}"]
    flags += [f"--learning_rate={rate}", f"--min_lr={rate / 10}"]
    begin = time.perf_counter()
    output = run([sys.executable, "train.py", *README_FLAGS, *flags], folder)
    seconds = time.perf_counter() - begin
    milliseconds = statistics.median(float(found) for found in re.findall(r"time ([\d.]+)ms", output))
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    code = runpy.run_path(str(folder / "model.py"))
    model = code["GPT"](code["GPTConfig"](**checkpoint["model_args"])).eval()
    model.load_state_dict(checkpoint["model"])
    # The example of nanoGPT gives each character its place among the sorted characters as its id.
    ids = {character: number for number, character in enumerate(sorted(set(text.read_text(encoding="utf-8"))))}
    # Without targets, nanoGPT's model returns the logits of the last position alone.
    loss = held_out_loss(lambda ids_RxL: model(ids_RxL, ids_RxL)[0], ids, blocks)
    own = float(re.findall(r"val loss ([\d.]+)", output)[-1])
    return {"seconds": seconds, "training_seconds": milliseconds / 1e3 * steps, "loss": loss, "own_loss": own}


def run_minilm(
    folder: Path, text: Path, optimizer: str, rate: float, steps: int, blocks: list[list[str]]
) -> dict[str, float]:
    """Run the recipe, and return the figures of its row."""
    out = folder / f"{optimizer}-{rate:g}"
    flags = {"data.source": text, "run.output-dir": out, "run.max-steps": steps, "run.eval-every": steps}
    flags |= {"optim.name": optimizer, "optim.lr": rate}
    begin = time.perf_counter()
    run([sys.executable, str(RECIPE), *(word for name, value in flags.items() for word in (f"--{name}", str(value)))])
    seconds = time.perf_counter() - begin
    figures = json.loads((out / "all_results.json").read_text())
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    loss = held_out_loss(lambda ids_RxL: model(ids_RxL).logits, ids, blocks)
    found = {"seconds": seconds, "training_seconds": figures["train_seconds"], "loss": loss}
    return found | {"own_loss": figures["eval_loss"]}


def run(command: list[str], folder: Path | None = None) -> str:
    """Return the output of a command. End this program with its errors if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def measure(checkout: Path, text: Path, steps: int) -> list[dict[str, Any]]:
    """Print the table and return its rows."""
    blocks, rows = held_out_blocks(text), []
    print(f"{'':<16} rate   seconds  training    loss  bits per character  own figure")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "nanoGPT"
        prepare_nanogpt(checkout, text, folder)
        sides: list[tuple[str, float, Callable[[], dict[str, float]]]] = [
            ("nanoGPT, AdamW", rate, partial(run_nanogpt, folder, text, rate, steps, blocks)) for rate in NANOGPT_RATES
        ]
        for optimizer, rates in MINILM_RATES.items():
            for rate in rates:
                side = partial(run_minilm, Path(name), text, optimizer, rate, steps, blocks)
                sides.append((f"minilm, {NAMES[optimizer]}", rate, side))
        for label, rate, run_side in sides:
            row: dict[str, Any] = {"name": label, "rate": rate, "steps": steps, **run_side()}
            figures = f"{row['seconds']:9.1f} {row['training_seconds']:9.1f} {row['loss']:7.3f}"
            print(f"{label:<16} {rate:<5g} {figures} {row['loss'] / math.log(2):19.3f} {row['own_loss']:11.3f}")
            rows.append(row)
    return rows


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the loss of each run over the seconds of its command."""
    axes = figure.subplots()
    for row in rows:
        colour = report.OURS if row["name"].startswith("minilm") else report.OTHERS
        axes.plot(row["seconds"], row["loss"], "o", color=colour)
        axes.annotate(f"{row['name']} at {row['rate']:g}", (row["seconds"], row["loss"]), (6, 4), textcoords=OFFSET)
    axes.margins(x=0.25, y=0.15)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of the command")
    axes.set_ylabel("held-out loss, nats per character")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkout", metavar="NANOGPT", type=Path, help="folder of github.com/karpathy/nanoGPT")
    parser.add_argument("text", metavar="FILE", type=Path, help="the text of tiny Shakespeare")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of each run (default: {STEPS})")
    options = parser.parse_args()
    for path in (options.checkout / "train.py", options.text):
        if not path.is_file():
            parser.error(f"{path} does not exist, or is not a file")
    machine = report.describe_machine()
    rows = measure(options.checkout, options.text.resolve(), options.steps)
    quick = options.steps < STEPS
    report.write("nanogpt", machine, {"rows": rows}, lambda figure: draw(figure, rows), (8, 4), quick=quick)


if __name__ == "__main__":
    main()
