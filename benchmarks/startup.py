"""Measure what a user waits for: the first line and the first step of the main job, and the answers of commands.

    python benchmarks/startup.py

- The time to the first line of a run, and the longest time in which it prints nothing. The caches are warm from the
  second run on.
- The time of three commands, and of scripts with transformers' `pipeline` for the same model and text.
- The time to the end of the first step, by minilm and by HF Trainer. Both sides find their caches warm. minilm finds
  its tokenizer and its tokens. Trainer finds a tokenizer, and, as in transformers' example run_mlm.py, the tokens and
  blocks that `datasets` keeps for a text file.

Each measurement starts a process of its own. The sides take turns.
"""

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parents[1] / "recipes" / "mlm_pydocs.py"
STARTS = 5
SIDES = ("HF Trainer", "minilm")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.accelerate_cli")


def by_minilm(folder: Path) -> None:
    """Run the recipe, and end the process after the first step."""
    from minilm.commands.fast_imports import quick_imports

    # The recipe imports the module in the same way, and then finds it imported.
    with quick_imports():
        from minilm import train as loop

    train_step = loop.train_step

    def first(*args: Any, **kwargs: Any) -> None:
        train_step(*args, **kwargs)
        os._exit(0)

    loop.train_step = first  # type: ignore[assignment]
    sys.argv = [str(RECIPE), "--run.output-dir", str(folder / f"out-{os.getpid()}")]
    runpy.run_path(str(RECIPE), run_name="__main__")


def by_trainer(folder: Path) -> None:
    """Run Trainer as its users would. This function does not import minilm."""
    from datasets import load_dataset
    from transformers import (
        AutoConfig,
        AutoModelForMaskedLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    job = json.loads((folder / "job.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    length = job["length"]

    def tokenize(rows: Any) -> Any:
        return tokenizer(rows["text"], return_special_tokens_mask=True)

    def cut(rows: Any) -> Any:
        joined: dict[str, list[int]] = {key: [*chain.from_iterable(lists)] for key, lists in rows.items()}
        whole = len(joined["input_ids"]) // length * length
        return {key: [flat[at : at + length] for at in range(0, whole, length)] for key, flat in joined.items()}

    class End(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            os._exit(0)

    documents = load_dataset("json", data_files=str(folder / "text.jsonl"), split="train")
    examples = documents.map(tokenize, batched=True, remove_columns=["text"]).map(cut, batched=True)
    config = AutoConfig.for_model(**job["config"])
    settings = job["settings"] | {"output_dir": str(folder / "trainer"), "disable_tqdm": True}
    Trainer(
        model=AutoModelForMaskedLM.from_config(config),
        args=TrainingArguments(**settings),
        train_dataset=examples,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=job["rate"]),
        callbacks=[End()],
    ).train()


def write_job(folder: Path) -> None:
    """Write the input of Trainer: the text, minilm's tokenizer, and the settings as arguments of Trainer."""
    from accelerate import Accelerator
    from hf_trainer import trainer_settings

    from minilm.config import Config, MaskedLM
    from minilm.data.documents import load_documents
    from minilm.distributed.precision import choose_precision
    from minilm.objectives.factory import build_network, prepare_data

    config: Config = runpy.run_path(str(RECIPE))["CONFIG"]
    prepared = prepare_data(config)
    prepared.tokenizer.save_pretrained(folder / "tokenizer")
    documents, _ = load_documents(config.data, seed=config.run.seed)
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents["text"])
    assert isinstance(config.objective, MaskedLM)
    precision = choose_precision(config.run.precision, Accelerator().device).name
    job = {
        "length": config.batch.max_length,
        "config": build_network(config, prepared).config.to_diff_dict(),
        "settings": trainer_settings(config, precision, config.run.max_steps or 1),
        "rate": config.objective.rate,
    }
    (folder / "job.json").write_text(json.dumps(job, default=str))


def time_start(side: str, folder: Path) -> float:
    """Return the seconds of one start."""
    begin = time.perf_counter()
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode != 0:
        raise SystemExit(f"{side} did not start: {done.stderr[-2000:]}")
    return seconds


def time_output(command: list[str]) -> tuple[float, float, float]:
    """Run a command. Return the seconds to its first output, the longest time without output, and all its seconds."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
    assert process.stdout is not None
    moments, output = [begin], b""
    while part := process.stdout.read(2**16):
        moments.append(time.perf_counter())
        output += part
    if process.wait() != 0:
        raise SystemExit(f"{command} failed: {output.decode(errors='replace')[-2000:]}")
    moments.append(time.perf_counter())
    return moments[1] - begin, max(b - a for a, b in pairwise(moments)), moments[-1] - begin


def show_seconds(name: str, seconds: list[float]) -> None:
    """Print the median, and the least and most."""
    print(f"{name:<36} {statistics.median(seconds):5.2f} ({min(seconds):.2f} to {max(seconds):.2f})")


def compare_first_steps(folder: Path) -> None:
    """Print the seconds from the command to the end of the first step, for both sides."""
    write_job(folder)
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(STARTS + 1):
        for side in SIDES if number % 2 else reversed(SIDES):
            seconds = time_start(side, folder)
            if number:  # the first round fills the caches
                taken[side].append(seconds)
    print(f"seconds to the end of the first step, median of {STARTS} (least to most)")
    for side, seconds_of in taken.items():
        show_seconds(side, seconds_of)
    ratios = sorted(b / a for a, b in zip(*taken.values(), strict=True))
    print(f"minilm's is {statistics.median(ratios):.2f} of Trainer's ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def measure_silence(folder: Path) -> None:
    """Print the time to the first line of a run of one step, and the longest time in which the run prints nothing."""
    recipe = [str(RECIPE), "--run.max-steps", "1", "--run.samples", "--run.output-dir"]
    launches = {
        "python recipes/mlm_pydocs.py": [sys.executable],
        "accelerate launch recipes/mlm_pydocs.py": [*ACCELERATE, "launch"],
    }
    for name, launch in launches.items():
        runs = [time_output([*launch, *recipe, str(folder / f"{launch[-1]}-{n}")]) for n in range(STARTS)]
        print(f"{name}, seconds")
        for what, seconds in zip(
            ("to the first line", "longest silence", "to the end"), zip(*runs, strict=True), strict=True
        ):
            show_seconds(f"  {what}", list(seconds))


def measure_commands(folder: Path) -> None:
    """Print the seconds of three commands, from the start of the process to its end, and of pipelines' scripts."""
    mlm, clm = str(folder / "mlm"), str(folder / "clm")
    for recipe, output in ((RECIPE, mlm), (RECIPE.with_name("clm_shakespeare.py"), clm)):
        flags = ["--data.source", "pydocs", "--run.max-steps", "5", "--run.samples", "--run.output-dir", output]
        time_output([sys.executable, str(recipe), *flags])
    text, prompt = "Return a [MASK] of all the keys.", "Return the"
    minilm = [sys.executable, "-c", "from minilm.commands.main import main; main()"]
    pipe = "from transformers import pipeline; print(pipeline({!r}, {!r})({!r}{}))"
    commands = {
        "minilm fill-mask": [*minilm, "fill-mask", mlm, text],
        "transformers' pipeline fill-mask": [sys.executable, "-c", pipe.format("fill-mask", mlm, text, "")],
        "minilm generate, 20 tokens": [*minilm, "generate", clm, prompt, "--max-new-tokens", "20"],
        "transformers' pipeline, 20 tokens": [
            *(sys.executable, "-c", pipe.format("text-generation", clm, prompt, ", max_new_tokens=20"))
        ],
        "minilm evaluate": [*minilm, "evaluate", mlm],
        "minilm --help": [*minilm, "--help"],
        "python recipes/mlm_pydocs.py --help": [sys.executable, str(RECIPE), "--help"],
    }
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(STARTS + 1):
        for name, command in commands.items():
            seconds = time_output(command)[2]
            if number:
                taken[name].append(seconds)
    print(f"seconds from the start of a process to its end, median of {STARTS} (least to most)")
    for name, seconds_of in taken.items():
        show_seconds(name, seconds_of)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        (by_minilm if options.side == "minilm" else by_trainer)(options.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        for measure in (measure_silence, measure_commands, compare_first_steps):
            measure(Path(name))


if __name__ == "__main__":
    main()
