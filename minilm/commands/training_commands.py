"""Commands that prepare, start or repeat training: doctor, tokenize, train, suite, branch, replay and verify.

Each command has its arguments in `add_…` and its work in `run_…`. The work imports the libraries that it needs, so that
a wrong argument ends the command at once.
"""

import argparse
import ast
import json
import shlex
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from minilm.commands.command_arguments import (
    add_command,
    add_json,
    parse_positive,
    parse_positive_number,
    parse_probability,
    parse_whole,
)
from minilm.commands.fast_imports import quick_imports
from minilm.data.glue import TASKS
from minilm.utils.log import show_log
from minilm.utils.output_streams import survive_closed_output
from minilm.utils.signals import interrupt_on_signals


def add_doctor(commands: Any) -> None:
    """Add `minilm doctor` and its arguments."""
    command = add_command(commands, "doctor", run_doctor, "check this machine, and say what to fix")
    command.description = (
        "Check hardware, precision, memory, threads, versions, caches, and whether two processes can connect. Print a "
        "line about each."
    )
    command.epilog = "The exit status is 1 if there is something to fix."
    add_json(command)


def run_doctor(options: argparse.Namespace) -> None:
    """Print one line for each check of this machine. Exit with status 1 if there is something to fix."""
    with quick_imports():
        from minilm.commands.doctor import check_machine
    needs_fixing = False
    for finding in check_machine():
        needs_fixing |= bool(finding.fix)
        if options.json:
            print(json.dumps(asdict(finding), ensure_ascii=False), flush=True)
        else:
            fix = f" -> {finding.fix}" if finding.fix else ""
            print(f"{'FIX' if fix else 'ok':<5} {finding.what:<10} {finding.found}{fix}", flush=True)
    if needs_fixing:
        sys.exit(1)


def add_tokenize(commands: Any) -> None:
    """Add `minilm tokenize` and its arguments."""
    command = add_command(commands, "tokenize", run_tokenize, "write the tokens of text, to train on them later")
    command.description = (
        "Write the tokens of text to a folder: minilm tokenize TEXT.parquet --tokenizer gpt2 --output DIR. The recipe "
        "then takes --data.source DIR. The same command again continues where it stopped."
    )
    command.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="file, folder, glob, saved dataset or hub dataset id"
    )
    command.add_argument("--config", metavar="NAME", help="configuration of a hub dataset")
    command.add_argument("--tokenizer", required=True, metavar="MODEL", help="hub id or folder of a tokenizer")
    command.add_argument("--output", type=Path, required=True, metavar="OUT", help="folder for the tokens")
    command.add_argument("--column", default="text", metavar="NAME", help="column of the text (default: text)")
    command.add_argument(
        "--document", choices=("line", "paragraph"), default="line", help="what a document of a .txt file is"
    )
    command.add_argument(
        "--eval-fraction",
        type=parse_probability,
        default=0.05,
        metavar="P",
        help="largest data.eval_fraction of later runs, whose texts are stored too (default: 0.05)",
    )
    command.add_argument("--words", action="store_true", help="store where words begin, to mask words or spans")
    command.add_argument(
        "--processes",
        type=parse_positive,
        default=1,
        metavar="N",
        help="number of processes, at most one for each file",
    )
    _add_filters(command)


def _add_filters(command: Any) -> None:
    """Add the flags of the filters of documents, which are the fields of `minilm.data.document_filters.Filters`."""
    filters = command.add_argument_group("filters", "Documents to leave out. The output has their numbers.")
    filters.add_argument(
        "--min-characters", type=parse_whole, default=0, metavar="N", help="leave out documents with fewer characters"
    )
    filters.add_argument(
        "--max-characters", type=parse_positive, metavar="N", help="leave out documents with more characters"
    )
    filters.add_argument(
        "--deduplicate",
        choices=("exact", "near"),
        help="leave out copies of documents before them, in all sources. exact: documents with the same text. near: "
        "also documents with nearly the same words, by MinHash (needs datasketch)",
    )
    filters.add_argument(
        "--threshold",
        type=parse_probability,
        metavar="S",
        help="with near, the Jaccard similarity of n-grams from which on documents are near-copies (default: 0.75, as "
        "FineWeb)",
    )
    filters.add_argument(
        "--ngram-size", type=parse_positive, metavar="N", help="with near, the words of an n-gram (default: 5)"
    )
    filters.add_argument(
        "--num-perm",
        type=parse_positive,
        metavar="N",
        help="with near, the MinHash values of a document. More separate the pairs better and take more time (default: "
        "112)",
    )


def run_tokenize(options: argparse.Namespace) -> None:
    """Write the tokens of texts to a folder."""
    with quick_imports():
        from minilm.config import Data
        from minilm.data.document_filters import Filters
        from minilm.data.tokenize_source import tokenize
    show_log()
    data = Data(
        source=tuple(options.sources),
        config=options.config,
        column=options.column,
        document=options.document,
        eval_fraction=options.eval_fraction,
    )
    given = {field.name: getattr(options, field.name) for field in fields(Filters)}
    given = {name: value for name, value in given.items() if value is not None}
    near = [name for name in ("threshold", "ngram_size", "num_perm") if name in given]
    if near and options.deduplicate != "near":
        raise ValueError(f"--{near[0].replace('_', '-')} needs --deduplicate near: add it, or leave the flag out")
    filters = Filters(**given)
    tokens = tokenize(
        data, options.tokenizer, options.output, words=options.words, processes=options.processes, filters=filters
    )
    print(f"written: {options.output}, {tokens:,} tokens")


def add_train(commands: Any) -> None:
    """Add `minilm train` and its arguments."""
    train = add_command(commands, "train", list_recipes, "list the recipes, and show how to start one")
    train.description = "List the recipes. A recipe starts the training: accelerate launch recipes/NAME.py"


def list_recipes(options: argparse.Namespace) -> None:
    """Print the recipes of this checkout with their first lines, and how to start one."""
    folder = Path(__file__).parents[2] / "recipes"
    recipes = sorted(folder.glob("*.py"))
    if not recipes:
        raise ValueError(
            "a recipe, a file of about 25 lines, starts the training: clone the repository, which has recipes in "
            "recipes/, or write one that ends in minilm.commands.recipe.run_recipe(CONFIG)"
        )
    print(f"A recipe starts the training. Those in {folder}:\n")
    for recipe in recipes:
        summary = (ast.get_docstring(ast.parse(recipe.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        print(f"  {recipe.name:<20} {summary}")
    print(f"\nStart one:    accelerate launch {shlex.quote(str(folder / 'mlm_pydocs.py'))}")
    print("See its flags: python RECIPE --help    Try it without output: python RECIPE --dry-run")
    if options.rest:
        raise ValueError(f"minilm train takes no arguments: pass {shlex.join(options.rest)} to a recipe")


def add_suite(commands: Any) -> None:
    """Add `minilm suite` and its arguments."""
    command = add_command(commands, "suite", run_suite, "fine-tune a model on GLUE or SuperGLUE, and print the table")
    command.description = (
        "Fine-tune a model on each task with each learning rate and seed, side by side, and print a table: minilm "
        "suite bert-base-uncased --data glue_data. The table has the figures of each benchmark, at the rate whose "
        "median over the seeds is the highest on the validation set: their median over the seeds, with the lowest and "
        "the highest value, and the average without WNLI. The output folder also gets it as table.md, table.tex and "
        "suite.json. The same command continues a suite that was stopped or killed, and does nothing if all is done."
    )
    command.epilog = (
        "Other flags are those of recipes/classify.py, for all runs: --run.epochs 10 --batch.max-length 256. The "
        f"tasks are {', '.join(TASKS)}."
    )
    command.add_argument("model", metavar="DIR", help="folder or hub id of a checkpoint to fine-tune")
    command.add_argument(
        "--tasks",
        nargs="+",
        default=["glue"],
        metavar="TASK",
        help="tasks, or glue or superglue for all tasks of a benchmark (default: glue)",
    )
    command.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="folders with the original downloads, such as CoLA/train.tsv and BoolQ/train.jsonl (default: the hub's "
        "nyu-mll/glue and aps/super_glue)",
    )
    command.add_argument(
        "--rates",
        type=parse_positive_number,
        nargs="+",
        default=[2e-5, 3e-5, 5e-5],
        metavar="LR",
        help="learning rates to try on each task (default: 2e-5 3e-5 5e-5)",
    )
    command.add_argument(
        "--seeds",
        type=parse_whole,
        nargs="+",
        default=[0, 1, 2],
        metavar="S",
        help="seeds of each rate (default: 0 1 2)",
    )
    command.add_argument(
        "--output", metavar="FOLDER", help="folder to write to or to continue (default: out/suite-DIR)"
    )
    command.add_argument(
        "--jobs",
        type=parse_positive,
        metavar="N",
        help="runs side by side, which share the processors (default: as many as the processors and the memory allow, "
        "or one for each GPU)",
    )
    command.add_argument(
        "--keep-models",
        action="store_true",
        help="keep the model of each run (default: keep its figures, log and ledger; its run.json repeats it)",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="list the runs with their steps and estimated times, and write nothing"
    )


def run_suite(options: argparse.Namespace) -> None:
    """Fine-tune a model on tasks of GLUE and SuperGLUE, and print the table; or describe the runs."""
    from minilm.commands import suite

    show_log()
    planned = suite.plan_suite(
        options.model,
        tasks=options.tasks,
        folders=options.data,
        rates=options.rates,
        seeds=options.seeds,
        output=options.output,
        jobs=options.jobs,
        keep_models=options.keep_models,
        flags=options.rest,
    )
    with interrupt_on_signals(), survive_closed_output():
        if options.dry_run:
            print(suite.describe_suite(planned))
        else:
            suite.train_suite(planned)


def add_branch(commands: Any) -> None:
    """Add `minilm branch` and its arguments."""
    command = add_command(commands, "branch", run_branch, "continue a checkpoint of a run as another run")
    command.description = (
        "Start a new run from a checkpoint of another one, with its settings and the flags that follow: minilm branch "
        "out/a --at 8000 --run.max-steps 10000 --optim.decay 2000 --run.output-dir out/b. The other run stays as it "
        "is. minilm refuses settings that would have changed a step before the checkpoint. --run.resume latest resumes "
        "a branch that was stopped."
    )
    command.epilog = (
        "docs/flags.md lists the flags of runs. On several processes: accelerate launch --multi_gpu --num_processes 8 "
        "-m minilm.commands.main branch …"
    )
    command.add_argument("folder", metavar="RUN", help="output folder of a run, finished or not")
    command.add_argument(
        "--at", type=parse_positive, required=True, metavar="STEP", help="step of the checkpoint to start from"
    )


def run_branch(options: argparse.Namespace) -> None:
    """Start a new run from a checkpoint of another run, with the settings of that run and the flags that follow."""
    from minilm.config.command_line import parse_flags
    from minilm.config.serialization import read_checkpoint_config

    origin = Path(options.folder)
    checkpoint = origin / f"checkpoint-{options.at}"
    if not checkpoint.is_dir():
        steps = [path.name.removeprefix("checkpoint-") for path in origin.glob("checkpoint-*")]
        there = ", ".join(sorted(filter(str.isdecimal, steps), key=int)) or "none"
        raise ValueError(f"{origin} has no checkpoint of step {options.at}; it has: {there}")
    config = parse_flags(read_checkpoint_config(checkpoint), arguments=options.rest)
    if config.run.resume not in (None, "latest"):
        raise ValueError(
            "minilm branch starts from the checkpoint of --at: leave run.resume out, or pass latest to resume a branch "
            "that was stopped"
        )
    named = origin if origin.name not in ("", "..") else origin.resolve()
    folder = config.run.output_dir or f"{named}-from-{options.at}"
    if Path(folder).expanduser().resolve() == origin.resolve():
        raise ValueError(f"run.output_dir {folder} is the folder of the run itself: give a new folder for the branch")
    config = replace(config, run=replace(config.run, resume=config.run.resume or str(checkpoint), output_dir=folder))
    show_log()
    with quick_imports():
        from minilm.train import train
    with interrupt_on_signals(), survive_closed_output():
        train(config)


def add_replay(commands: Any) -> None:
    """Add `minilm replay` and its arguments."""
    command = add_command(commands, "replay", run_replay, "what some training documents contributed to a run")
    command.description = (
        "Run again without the loss of some training documents, and compare the evaluation with the run's: minilm "
        "replay out/a --without 3,17,40-45. All else stays as it was. The replay begins at the last checkpoint before "
        "the documents were first read, and is written to RUN-without, or to --run.output-dir."
    )
    command.epilog = (
        "--run.resume latest resumes a replay that was stopped. On several processes: accelerate launch --multi_gpu "
        "--num_processes 8 -m minilm.commands.main replay …"
    )
    command.add_argument("folder", metavar="RUN", help="output folder of a finished run")
    command.add_argument(
        "--without",
        required=True,
        metavar="DOCUMENTS",
        help="numbers of training documents, from 0, such as 3,17,40-45; or a file of numbers or texts, one a line",
    )


def run_replay(options: argparse.Namespace) -> None:
    """Print what some training documents contributed to the figures of a run."""
    show_log()
    with quick_imports():
        from minilm.commands.replay import replay_run
    with interrupt_on_signals(), survive_closed_output():
        differences, still_seen = replay_run(Path(options.folder), options.without, options.rest)
    for each in differences:
        print(f"{each.figure}: {each.first:.6g} with the documents, {each.second:.6g} without: {each}")
    if differences:
        print(still_seen)


def add_verify(commands: Any) -> None:
    """Add `minilm verify` and its arguments."""
    command = add_command(commands, "verify", run_verify, "make steps of a run again, and compare every bit")
    command.description = (
        "Make the steps of a run between two of its checkpoints again, in a temporary folder, and compare the weights, "
        "the optimizer state and the losses with the run's: minilm verify out/a --windows 3. If all are equal, the "
        "model card says so."
    )
    command.epilog = "The exit status is 1 if something differs."
    command.add_argument("folder", metavar="RUN", help="output folder of a run, finished or not")
    command.add_argument(
        "--windows",
        type=parse_positive,
        default=3,
        metavar="N",
        help="number of stretches between two checkpoints, chosen at random (default: 3)",
    )


def run_verify(options: argparse.Namespace) -> None:
    """Print one line for each stretch of a run that was repeated. Exit with status 1 if one is not equal."""
    with quick_imports():
        from minilm.commands.verify import verify_run
    show_log()
    with interrupt_on_signals(), survive_closed_output():
        results = verify_run(Path(options.folder), options.windows)
    for result in results:
        print(result)
    if any(result.differences for result in results):
        sys.exit(1)
