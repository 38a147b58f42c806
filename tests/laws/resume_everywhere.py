"""Stop a run after each of its steps and resume it: how many end as the run that was never stopped, to the bit?

    python -m tests.laws.resume_everywhere FOLDER --processes 2

Dropout is on, each step is several micro-batches, and evaluations fall between the checkpoints.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

from minilm import Batch, Config, Data, MaskedLM, Model, Optim, Run, Tokens
from tests.laws.jobs import run

STEPS = 20
WORDS = "the a quick brown fox returns list of names for each file in this folder and raises an error if there is none"
CONFIG = Config(
    tokens=Tokens(vocab_size=300),
    model=Model(
        type="bert",
        config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 32,
            "hidden_dropout_prob": 0.1,
        },
    ),
    objective=MaskedLM(rate=0.3),
    batch=Batch(examples=8, max_length=24, micro_tokens=40),
    optim=Optim(lr=3e-3, schedule="cosine"),
    run=Run(max_steps=STEPS, eval_every=7, save_every=1, keep_last=STEPS, precision="fp32"),
)


def write_text(path: Path) -> str:
    """Documents of different lengths, enough for an epoch of 13 steps."""
    words = WORDS.split()
    lines = [" ".join(words[i * j % len(words)] for j in range(1, 3 + i * 7 % 15)) for i in range(110)]
    path.write_text("\n".join(lines))
    return str(path)


def stopped_after(step: int, reference: Path, folder: Path) -> Path:
    """What the reference run's folder was when it had just written the checkpoint of `step`."""
    shutil.copytree(reference, folder, ignore=shutil.ignore_patterns("checkpoint-*", "all_results.json"))
    shutil.copytree(reference / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


def end_of(folder: Path) -> dict[str, object]:
    """What must be the same to the bit: weights, moments, and the log but for its times."""
    timed = ("tokens_per_second", "mfu", "seconds")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    return {
        "model": (folder / "model.safetensors").read_bytes(),
        "weights": (last / "model.safetensors").read_bytes(),
        "moments": (last / "optimizer.safetensors").read_bytes(),
        "log": [{key: value for key, value in line.items() if key not in timed} for line in lines],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="an empty folder to work in")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="try every so many steps only")
    options = parser.parse_args()
    config = replace(CONFIG, data=Data(source=write_text(options.folder / "text.txt"), eval_fraction=0.1))
    reference = options.folder / "reference"
    run(replace(config, run=replace(config.run, output_dir=str(reference))), options.processes)
    same = 0
    tried = range(1, STEPS + 1, options.every)
    for step in tried:
        stopped = stopped_after(step, reference, options.folder / f"stopped-{step}")
        run(replace(config, run=replace(config.run, output_dir=str(stopped), resume="latest")), options.processes)
        same += end_of(stopped) == end_of(reference)
    print(f"{same}/{len(tried)} resumed runs bitwise equal, {options.processes} process(es)")


if __name__ == "__main__":
    main()
