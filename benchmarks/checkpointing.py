"""Measure what saving costs: blocks of steps with a checkpoint alternate with blocks without one.

    python benchmarks/checkpointing.py

The job is a masked LM on full blocks of Python's documentation, in one process. The model is a RoBERTa whose checkpoint
(weights and two moments) has about 500 MB. The steps are those of `train_step`, and `CheckpointSaver` writes the
checkpoints, as in a run: it writes and hashes during the next steps. A block with a checkpoint ends when that is on
disk. The overhead compares each such block with a block without a checkpoint beside it. The checkpoints go to the
folder for temporary files (TMPDIR), so the figures depend on its disk.

A few saves come first and do not count. If a virtual machine has never used its memory, the first saves spend most of
their time on getting that memory from the host (1.7 s of processor time for such a save, 0.65 s for a later one).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from comparison import Parts, TurnResult, build_parts, get_precision, take_turns

from minilm.config import Batch, Config, Data, Model, Optim, Run, Tokens
from minilm.distributed.hardware import describe
from minilm.runs.checkpoint import Progress
from minilm.runs.checkpoint_saver import CheckpointSaver

EVERY = 20  # steps between checkpoints
WARM_UP = 3  # steps that do not count
WARM_UP_SAVES = 6  # saves that do not count
CONFIG = Config(
    data=Data(source="pydocs"),
    tokens=Tokens(vocab_size=16384),
    model=Model(
        type="roberta",
        config={
            "hidden_size": 640,
            "num_hidden_layers": 6,
            "num_attention_heads": 10,
            "intermediate_size": 2560,
            "max_position_embeddings": 130,
        },
    ),
    batch=Batch(examples=16, max_length=128, layout="blocks"),
    optim=Optim(lr=1e-4),
    run=Run(save_every=EVERY, keep_last=1),
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """`EVERY` steps, with a checkpoint after the first of them or without one."""

    seconds: float
    copying: float = 0.0
    """Seconds until `save` returned. The run waits while the state is copied."""
    waiting: float = 0.0
    """Seconds from the end of the steps until the checkpoint was on disk."""


def build_saver(parts: Parts) -> CheckpointSaver:
    """Return the saver of a run's checkpoints, and print their size."""
    config, network = parts.config, parts.network
    size = 3 * sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    hardware = describe(parts.accelerator.device)
    print(f"{hardware['device']}, {hardware['threads_per_process']} threads, {get_precision(parts)}; ", end="")
    print(f"{size / 1e6:,.0f} MB a checkpoint, one every {EVERY} steps")
    folder, tokenizer = Path(str(config.run.output_dir)), parts.prepared.tokenizer
    return CheckpointSaver(folder, network, parts.optimizer, tokenizer, config, {}, main=True)


def run_block(steps: Iterator[tuple[int, TurnResult]], saver: CheckpointSaver | None) -> Block:
    """Take the steps of a block, and save a checkpoint if there is a saver."""
    begin = time.perf_counter()
    (number, _), copying = next(steps), 0.0
    if saver is not None:
        mark = time.perf_counter()
        saver.save(Progress(step=number))
        copying = time.perf_counter() - mark
    for _ in range(EVERY - 1):
        next(steps)
    mark = time.perf_counter()
    if saver is not None:
        saver.wait()
    end = time.perf_counter()
    return Block(seconds=end - begin, copying=copying, waiting=end - mark)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="take 40 steps in place of 200, half of them with saving")
    options = parser.parse_args()
    pairs = 1 if options.quick else 5
    with tempfile.TemporaryDirectory() as folder:
        config = replace(CONFIG, run=replace(CONFIG.run, output_dir=folder))
        parts = build_parts(config)
        saver, steps = build_saver(parts), enumerate(take_turns(parts, WARM_UP + 2 * pairs * EVERY), start=1)
        for _ in range(WARM_UP):
            next(steps)
        for number in range(WARM_UP_SAVES):
            saver.save(Progress(step=number))
        saver.wait()
        saving: list[Block] = []
        plain: list[Block] = []
        for pair in range(pairs):
            for with_saving in (True, False) if pair % 2 else (False, True):
                (saving if with_saving else plain).append(run_block(steps, saver if with_saving else None))
    overheads = [100 * (a.seconds / b.seconds - 1) for a, b in zip(saving, plain, strict=True)]
    step = statistics.median(b.seconds for b in plain) / EVERY
    copying = statistics.median(b.copying for b in saving)
    waiting = statistics.median(b.waiting for b in saving)
    seconds = statistics.median(b.seconds for b in saving)
    print(f"{pairs * EVERY} steps with saving, {pairs * EVERY} without ({step:.2f} s each)")
    print(f"overhead: {statistics.median(overheads):+.1f}% (from {min(overheads):+.1f}% to {max(overheads):+.1f}%)")
    print(
        f"a save: {copying:.2f} s for the copy, which the run waits for ({copying / seconds:.1%} of the block); "
        f"{waiting:.2f} s until it was on disk after the block's last step"
    )


if __name__ == "__main__":
    main()
