"""Measure the memory of a run over a large text file, streamed and mapped, and check that both have the same tokens.

    python benchmarks/streaming.py --gigabytes 2

The file holds Python's documentation many times over, with a paragraph on each line, in a new random order each time.
Each side is a process of its own with an empty cache. It encodes the file, plans an epoch, and loads the first 1,000
steps. The peak memory is that of getrusage at the end, with Python and its libraries. All files go to the folder for
temporary files (TMPDIR), which needs four times the size of the text.
"""

import argparse
import hashlib
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class PathResult:
    """The result of reading the file in one way."""

    examples: int
    tokens: int
    digest: str
    seconds: float
    first: float
    """Seconds from the end of the encoding until the first step was loaded."""
    libraries: float
    """MB of memory before the run began."""
    peak: float
    """Peak MB of memory."""


def write_text(path: Path, size: int) -> None:
    """Write at least `size` bytes of whole lines to `path`."""
    from minilm.data.pydocs import load_pydocs

    lines = [" ".join(part.split()) + "\n" for text in load_pydocs()[0] for part in text.split("\n\n") if part.strip()]
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            file.writelines(lines[i] for i in rng.permutation(len(lines)))


def read(folder: str, streaming: bool) -> PathResult:
    """Encode the text in `folder` and load the first steps."""
    cache = os.environ["HF_HOME"] = os.path.join(folder, "streamed" if streaming else "mapped")
    os.environ["HF_DATASETS_CACHE"] = os.path.join(cache, "datasets")

    import torch
    from accelerate import Accelerator

    from minilm.config import Batch, Config, Data, MaskedLM, Tokens
    from minilm.data.batch_plan import Plan
    from minilm.distributed.hardware import peak_memory
    from minilm.objectives.masked_lm import MaskedLMObjective
    from minilm.runs.auto_micro_tokens import micro_tokens_of
    from minilm.train import load_steps

    data = Data(source=f"{folder}/text.txt", eval_source=f"{folder}/held_out.txt", streaming=streaming)
    config = Config(data=data, tokens=Tokens(name=f"{folder}/tokenizer"), batch=Batch(examples=256, max_length=128))
    device = torch.device("cpu")
    libraries, begin = peak_memory(device) / 1e6, time.perf_counter()
    objective = MaskedLMObjective(MaskedLM())
    prepared = objective.prepare(config)
    encoded = time.perf_counter()
    plan = Plan(prepared.train.lengths, examples=256, micro_tokens=micro_tokens_of(config))
    collator = objective.collator(prepared.tokenizer, prepared.train, seed=0, padded=False, multiple=1)
    first = 0.0
    for _ in load_steps(plan, prepared.train, collator, Accelerator(cpu=True), range(STEPS), workers=0):
        first = first or time.perf_counter() - encoded
    peak, seconds = peak_memory(device) / 1e6, time.perf_counter() - begin
    digest = hashlib.sha256()
    arrays: tuple[Any, ...] = (prepared.train.start, prepared.train.stop, prepared.train.ids)
    for array in arrays:
        for at in range(0, len(array), 2**22):
            digest.update(array[at : at + 2**22].tobytes())
    return PathResult(
        examples=len(prepared.train),
        tokens=int(prepared.train.lengths.sum()),
        digest=digest.hexdigest(),
        seconds=seconds,
        first=first,
        libraries=libraries,
        peak=peak,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the text file (default: 2)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = int(options.gigabytes * 1e9)
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            pool.apply(prepare_files, (folder, size))
        found = {}
        for name, streaming in (("streamed", True), ("mapped", False)):
            with context.Pool(1) as pool:
                one = found[name] = pool.apply(read, (folder, streaming))
            print(
                f"{name:<8}  {one.tokens:,} tokens in {one.examples:,} examples; peak {one.peak:,.0f} MB, of which "
                f"{one.libraries:,.0f} MB before the run; {one.seconds:,.0f} s, {one.tokens / one.seconds:,.0f} "
                f"tokens/s; first step {one.first:.1f} s after the encoding",
                flush=True,
            )
        same = found["streamed"].digest == found["mapped"].digest
        print(f"the same tokens in the same examples: {'yes' if same else 'NO'}")


def prepare_files(folder: str, size: int) -> None:
    """Write the text, a text to evaluate on, and a tokenizer into `folder`."""
    from minilm.config import Data
    from minilm.data.documents import load_documents
    from minilm.data.tokenizer_training import train_tokenizer

    write_text(Path(folder, "text.txt"), size)
    write_text(Path(folder, "held_out.txt"), 1)
    documents, _ = load_documents(replace(Data(), source="pydocs"), seed=0)
    train_tokenizer(documents, "bpe", 16384).save_pretrained(f"{folder}/tokenizer")


if __name__ == "__main__":
    main()
