"""Measure a run that trains while it reads: the time to its first step, its speed, its memory and disk, and a resume.

    python benchmarks/streaming.py --gigabytes 0.2 2 10
    python benchmarks/streaming.py --gigabytes 0.2 --resume-at 0.1 0.5 0.9
    python benchmarks/streaming.py --window-tokens 1_000_000 --seconds 300 --processes 1 2

The text is Python's documentation many times over, in files of at most 500 MB. Each line is a paragraph, in a new
random order each time. A run trains the model of recipes/mlm_pydocs.py on it for `--seconds` after its first step, in a
process of its own and with an empty cache. It then continues from its checkpoint in another process.

- memory: the first 20 MB of the text without `data.streaming`, for the speed of training from memory.
- text, parquet: the text with `data.streaming`. tokens: the shards that `minilm tokenize` makes of it beforehand.

"first step" is the time from the launch of the process to the end of its first step, and "resumed" the same after the
checkpoint. The speed is the mean over the steps after the first. Another process encodes the next window during the
first of these steps, which slows them. So give `--seconds` that last a whole window or more: "windows" is the number of
windows that a run trained on, and `--window-tokens` makes them smaller.
"RAM" is the largest memory of the run's processes together, where a page that several of them share (libraries, files)
counts once. "disk" is the largest size of its cache. Both are looked at once a second.
All files go to the folder for temporary files (TMPDIR), which needs three times the size of the text.

`--resume-at` also measures resumes after these shares of the text, each on a machine with an empty cache. For that it
encodes all windows first, and then sets the step of the run's checkpoint.
"""

import argparse
import contextlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

KINDS = ("memory", "text", "parquet", "tokens")
FILE_BYTES = 500_000_000
MEMORY_BYTES = 20_000_000
STEPS = 1_000_000  # more than a run makes


def write_text(folder: Path, size: int) -> None:
    """Write at least `size` bytes of whole lines, as text and as Parquet, and a text to evaluate on."""
    import pyarrow
    from pyarrow import parquet

    from minilm.data.pydocs import load_pydocs

    lines = [" ".join(part.split()) for text in load_pydocs()[0] for part in text.split("\n\n") if part.strip()]
    rng, left, number = np.random.default_rng(0), size, 0
    for name in ("memory", "text", "parquet"):
        (folder / name).mkdir()
    while left > 0:
        path = folder / "text" / f"{number:03}.txt"
        schema = pyarrow.schema([("text", pyarrow.string())])
        with (
            path.open("w", encoding="utf-8") as file,
            parquet.ParquetWriter(folder / "parquet" / f"{number:03}.parquet", schema) as table,
        ):
            while file.tell() < min(left, FILE_BYTES):
                part = [lines[i] for i in rng.permutation(len(lines))]
                file.writelines(f"{line}\n" for line in part)
                table.write_table(pyarrow.table({"text": part}, schema))
        left, number = left - path.stat().st_size, number + 1
    with (folder / "text" / "000.txt").open(encoding="utf-8") as file:
        part = file.readlines(MEMORY_BYTES)
    (folder / "memory" / "text.txt").write_text("".join(part), encoding="utf-8")
    (folder / "held_out.txt").write_text("\n".join(lines[:500]), encoding="utf-8")


def train_tokenizer(folder: Path) -> None:
    """Write the tokenizer of the recipe."""
    from minilm.config import Data
    from minilm.data.documents import load_documents
    from minilm.data.tokenizer_training import train_tokenizer

    documents, _ = load_documents(replace(Data(), source="pydocs"), seed=0)
    train_tokenizer(documents, "bpe", 2048).save_pretrained(folder / "tokenizer")


def configure(folder: Path, kind: str, window_tokens: int) -> Any:
    """Return the configuration of a run, which resumes if there is one."""
    from minilm.config import Data, Run, Tokens

    config = runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "mlm_pydocs.py"))["CONFIG"]
    output = folder / f"out-{kind}"
    data = Data(
        source=str(folder / kind),
        eval_source=str(folder / "held_out.txt"),
        streaming=kind in ("text", "parquet"),
        window_tokens=window_tokens,
    )
    resume = "latest" if output.exists() else None
    run = Run(output_dir=str(output), max_steps=STEPS, eval_every=STEPS, save_every=STEPS, resume=resume, ledger=False)
    return replace(config, data=data, tokens=Tokens(name=str(folder / "tokenizer")), run=run)


def train(folder: Path, kind: str, window_tokens: int, seconds: float, launched: float) -> dict[str, float]:
    """Train for some seconds after the first step, or from the run's checkpoint on, and return the figures."""
    from minilm.train import train

    config = configure(folder, kind, window_tokens)
    times: list[float] = []

    def after_step(step: int, figures: dict[str, Any], model: Any) -> bool:
        float(figures["loss"])
        times.append(time.time())
        return times[-1] - times[0] >= seconds

    train(config, after_step=after_step)
    step_tokens = config.batch.examples * config.batch.max_length
    gaps = np.diff(times)
    speed = step_tokens * len(gaps) / sum(gaps) if len(gaps) else 0.0
    return {"first": times[0] - launched, "speed": speed, "windows": len(times) * step_tokens / window_tokens}


def index(folder: Path, kind: str, window_tokens: int) -> dict[str, Any]:
    """Encode the windows of a pass over the text. Return the number of its steps, and the index of its windows."""
    from minilm.objectives.factory import prepare_run

    stream, number = prepare_run(configure(folder, kind, window_tokens)).stream, 0
    if stream is None:
        sys.exit("--resume-at needs more text than a window: raise --gigabytes")
    while stream.start_of(number).pools[0].passes == 0:
        number += 1
    return {"steps": stream.start_of(number).step, "windows": stream.export_index()}


def set_step(checkpoint: Path, step: int, windows: dict[str, Any]) -> None:
    """Set the step and the index of a checkpoint, and its name."""
    from minilm.runs.checkpoint import MANIFEST, STATE
    from minilm.utils.atomic_files import hash_file

    state, manifest = (json.loads((checkpoint / name).read_text()) for name in (STATE, MANIFEST))
    state["progress"]["step"], state["windows"] = step, windows
    (checkpoint / STATE).write_text(json.dumps(state))
    manifest[STATE] = hash_file(checkpoint / STATE)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    checkpoint.rename(checkpoint.with_name(f"checkpoint-{step}"))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The figures of a process and its largest use of memory and disk, in bytes."""

    figures: dict[str, Any]
    memory: int
    disk: int


def launch(folder: Path, kind: str, seconds: float, *words: str, window_tokens: int, processes: int = 1) -> Outcome:
    """Run `train`, or `index` with the word --index, in processes with a cache of their own, and watch them."""
    cache = folder / f"cache-{kind}"
    arguments = ["--worker", kind, "--folder", str(folder), "--seconds", str(seconds), "--launched", str(time.time())]
    arguments += ["--window-tokens", str(window_tokens)]
    environment, launcher = {**os.environ, "HF_HOME": str(cache)}, list[str]()
    if processes > 1:
        environment["ACCELERATE_USE_CPU"] = "true"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    memory = disk = 0
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *launcher, __file__, *arguments, *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        while process.poll() is None:
            memory, disk = max(memory, measure_memory(process.pid)), max(disk, measure_folder(cache))
            time.sleep(1)
    assert process.stdout is not None
    if process.returncode:
        sys.exit((folder / "log.txt").read_text())
    return Outcome(figures=json.loads(process.stdout.read().splitlines()[-1]), memory=memory, disk=disk)


def measure_memory(pid: int) -> int:
    """Return the memory that a process and those that it started take, in bytes. Pages that they share count once."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        main = psutil.Process(pid)
        for process in [main, *main.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
                total += process.memory_full_info().pss
    return total


def measure_folder(folder: Path) -> int:
    """Return the bytes of all files in a folder. Files may go in the meantime."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def measure_resumes(folder: Path, kind: str, shares: list[float], window_tokens: int) -> None:
    """Print how long it takes to resume after these shares of the text, each with an empty cache."""
    from minilm.runs.checkpoint import find_complete_checkpoints

    found = launch(folder, kind, 0.0, "--index", window_tokens=window_tokens).figures
    for share in shares:
        *others, checkpoint = find_complete_checkpoints(folder / f"out-{kind}")
        for other in others:
            shutil.rmtree(other)
        set_step(checkpoint, int(share * found["steps"]), found["windows"])
        shutil.rmtree(folder / f"cache-{kind}")
        seconds = launch(folder, kind, 0.0, window_tokens=window_tokens).figures["first"]
        print(f"{kind:<8} resumed after {share:.0%} of {found['steps']:,} steps in {seconds:.1f} s", flush=True)


def measure(folder: Path, options: argparse.Namespace, processes: int) -> None:
    """Print the table of the runs with this number of processes."""
    print(
        f"\n{processes} process{'es' if processes > 1 else ''}\n"
        f"{'':<8}  first step   resumed      tokens/s    of memory's  windows      RAM      disk",
        flush=True,
    )
    base = 0.0
    for kind in ["memory", *options.kinds]:
        for made in (folder / f"out-{kind}", folder / f"cache-{kind}"):
            shutil.rmtree(made, ignore_errors=True)
        first, again = (
            launch(folder, kind, length, window_tokens=options.window_tokens, processes=processes)
            for length in (options.seconds, 0.0)
        )
        speed = first.figures["speed"]
        base = base or speed
        print(
            f"{kind:<8} {first.figures['first']:9.1f} s {again.figures['first']:7.1f} s {speed:13,.0f} "
            f"{speed / base:14.2f} {first.figures['windows']:8.2f} "
            f"{first.memory / 1e9:5.2f} GB {first.disk / 1e9:6.2f} GB",
            flush=True,
        )


def measure_size(size: float, options: argparse.Namespace) -> None:
    """Make a text of `size` GB and print its tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder, int(size * 1e9))
        train_tokenizer(folder)
        if "tokens" in options.kinds:
            words = ["tokenize", str(folder / "text"), "--output", str(folder / "tokens")]
            words += ["--tokenizer", str(folder / "tokenizer"), "--processes", str(os.cpu_count())]
            subprocess.run([sys.executable, "-m", "minilm.commands.main", *words], check=True, capture_output=True)
        print(f"\n{size:g} GB", flush=True)
        for processes in options.processes:
            measure(folder, options, processes)
        for kind in options.kinds if options.resume_at else ():
            measure_resumes(folder, kind, options.resume_at, options.window_tokens)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.2], help="sizes of the text (default: 0.2)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS[1:], default=[*KINDS[1:]], help="default: all")
    parser.add_argument("--seconds", type=float, default=60, help="of each run after its first step (default: 60)")
    parser.add_argument(
        "--resume-at", type=float, nargs="+", default=[], metavar="SHARE", help="measure resumes after these shares too"
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="processes of each run (default: 1)")
    parser.add_argument(
        "--window-tokens", type=int, default=16_000_000, help="data.window_tokens of each run (default: 16,000,000)"
    )
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--index", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--launched", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        if options.index:
            print(json.dumps(index(options.folder, options.worker, options.window_tokens)))
            return
        figures = train(options.folder, options.worker, options.window_tokens, options.seconds, options.launched)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(figures))
        return
    for size in options.gigabytes:
        measure_size(size, options)


if __name__ == "__main__":
    main()
