"""Commands about runs, finished or not: evaluate, compare, ledger, export, report and merge.

Each command has its arguments in `add_…` and its work in `run_…`. The work imports the libraries that it needs, so that
a wrong argument ends the command at once.
"""

import argparse
from dataclasses import asdict
from typing import Any

from minilm.commands.command_arguments import (
    add_command,
    add_json,
    add_model,
    parse_not_negative,
    parse_positive,
    print_json,
)
from minilm.commands.fast_imports import quick_imports
from minilm.utils.log import show_log
from minilm.utils.signals import interrupt_on_signals

# The part of a text that a line of a table shows.
_TEXT_CHARACTERS = 80


def add_evaluate(commands: Any) -> None:
    """Add `minilm evaluate` and its arguments."""
    command = add_command(commands, "evaluate", run_evaluate, "loss, perplexity, accuracy, … on data of your own")
    command.description = (
        "Evaluate a model as training does: minilm evaluate DIR --data.source FILE. Without --data.source, repeat the "
        "evaluation of the run whose folder DIR is."
    )
    command.epilog = "--data.column, --data.pair-column, --data.label-column, … mean what they mean for a recipe."
    add_model(command, "model of any of these kinds")


def run_evaluate(options: argparse.Namespace) -> None:
    """Print the figures of a model on documents of the user, or on those of its run."""
    from minilm.config.command_line import parse_data_flags

    data = parse_data_flags(options.rest, "minilm evaluate DIR")
    with quick_imports():
        from minilm.commands.evaluate import evaluate
        from minilm.utils.progress import quiet_transformers
    with quiet_transformers():
        figures = evaluate(options.model, data)
    if options.json:
        print_json(figures)
    else:
        width = max(map(len, figures))
        for name, value in figures.items():
            print(f"{name:<{width}}  {value:.6g}")


def add_compare(commands: Any) -> None:
    """Add `minilm compare` and its arguments."""
    command = add_command(commands, "compare", run_compare, "whether one of two models is better, and by how much")
    command.description = (
        "Print the difference of two models on the same evaluation examples, B minus A, with half of its 95% interval "
        "and its p-value: minilm compare out/a out/b. The figures are those of the ledgers of the runs. With "
        "--data.source, both models are evaluated on other data."
    )
    command.epilog = "--data.column, --data.pair-column, --data.label-column, … mean what they mean for a recipe."
    command.add_argument("first", metavar="A", help="folder of a run or a checkpoint, or a hub id")
    command.add_argument("second", metavar="B", help="the same")
    add_json(command)


def run_compare(options: argparse.Namespace) -> None:
    """Print the differences of two models on the same evaluation examples."""
    from minilm.config.command_line import parse_data_flags

    data = parse_data_flags(options.rest, "minilm compare A B")
    with quick_imports():
        from minilm.commands.compare import compare_models
        from minilm.utils.progress import quiet_transformers
    with quiet_transformers():
        differences = compare_models(options.first, options.second, data)
    for difference in differences:
        if options.json:
            print_json(asdict(difference))
        else:
            print(difference)


def add_ledger(commands: Any) -> None:
    """Add `minilm ledger` and its arguments."""
    command = add_command(commands, "ledger", run_ledger, "the evaluation examples with the highest losses")
    command.description = (
        "List the evaluation examples of a run with the highest losses in its last evaluation: minilm ledger out/a. "
        "The column `high in` has the number of evaluations in which an example is among the highest tenth."
    )
    command.add_argument("run", metavar="RUN", help="output folder of a run, finished or not")
    command.add_argument(
        "--top",
        type=parse_positive,
        default=10,
        metavar="N",
        help="number of examples to list, highest first (default: 10)",
    )
    command.add_argument(
        "--always-high",
        action="store_true",
        help="list only examples that are among the highest tenth in each evaluation, or in each epoch",
    )
    command.add_argument(
        "--train",
        action="store_true",
        help="list training examples by their last loss; needs --run.train-ledger",
    )
    command.add_argument(
        "--duplicates",
        action="store_true",
        help="with --train: list near-duplicates of earlier examples, among the tenth with the lowest losses",
    )
    add_json(command)


def run_ledger(options: argparse.Namespace) -> None:
    """Print the evaluation or training examples of a run with the highest losses, with their texts."""
    if options.train:
        _print_train_examples(options)
        return
    if options.duplicates:
        raise ValueError("--duplicates lists training examples: add --train")
    with quick_imports():
        from minilm.commands.hard_examples import find_hard_examples
        from minilm.models.inference import escape_line_breaks
        from minilm.utils.progress import quiet_transformers
    show_log()
    with quiet_transformers():
        examples = find_hard_examples(options.run, options.top, always_high=options.always_high)
    if not options.json:
        print(f"{'loss':>8}  {'targets':>7}  {'high in':>9}  {'document':>8}  text")
    for each in examples:
        if options.json:
            print_json(asdict(each))
            continue
        high = f"{each.high} of {each.evaluations}"
        text = escape_line_breaks(each.text or "-")[:_TEXT_CHARACTERS]
        print(f"{each.loss:8.3f}  {each.targets:7}  {high:>9}  {each.document:8}  {text}")


def _print_train_examples(options: argparse.Namespace) -> None:
    """Print the training examples with the highest losses, or near-duplicates, and the share that is still learnt."""
    with quick_imports():
        from minilm.commands.train_examples import find_duplicates, find_hardest, measure_learning, read_losses
        from minilm.models.inference import escape_line_breaks
        from minilm.utils.progress import quiet_transformers
    show_log()
    with quiet_transformers():
        losses = read_losses(options.run)
        if options.duplicates:
            examples = find_duplicates(losses, options.top)
        else:
            examples = find_hardest(losses, options.top, always_high=options.always_high)
    learning = measure_learning(losses)
    if options.json:
        for each in examples:
            print_json(asdict(each))
        print_json({"still_learning": learning})
        return
    print(f"{'loss':>8}  {'high in':>9}  {'example':>8}  {'copy of':>8}  text")
    for each in examples:
        high = f"{each.high} of {each.epochs}"
        copied = "-" if each.duplicate_of is None else each.duplicate_of
        text = escape_line_breaks(each.text)[:_TEXT_CHARACTERS]
        print(f"{each.loss:8.3f}  {high:>9}  {each.example:8}  {copied:>8}  {text}")
    if learning is not None:
        print(f"{learning:.0%} of the examples have a loss that fell between the last two epochs by more than noise")


def add_export(commands: Any) -> None:
    """Add `minilm export` and its arguments."""
    command = add_command(commands, "export", run_export, "write the model alone, as safetensors or ONNX")
    command.description = (
        "Write the model of a run or of a checkpoint, with its tokenizer and nothing else, to a new folder: "
        "minilm export DIR --format onnx --output FOLDER"
    )
    command.add_argument("model", metavar="DIR", help="folder of a run or of a checkpoint")
    command.add_argument(
        "--format",
        choices=("onnx", "safetensors"),
        required=True,
        help='safetensors as the run wrote it, or ONNX (pip install "minilm[onnx]")',
    )
    _add_output_folder(command)


def run_export(options: argparse.Namespace) -> None:
    """Write the model of a run or a checkpoint to a new folder."""
    with quick_imports():
        from minilm.commands.export import export_model
        from minilm.utils.progress import quiet_transformers
    with quiet_transformers():
        print(f"written: {export_model(options.model, options.output, options.format)}")


def add_report(commands: Any) -> None:
    """Add `minilm report` and its arguments."""
    command = add_command(commands, "report", run_report, "curves, settings and results of runs as one page")
    command.description = (
        "Write one HTML page about one or several runs, for a browser without network: minilm report out/a out/b"
    )
    command.add_argument(
        "folders", metavar="OUT", nargs="+", help="output folder of a run, finished or not, or a folder of such folders"
    )
    command.add_argument("--output", default="report.html", metavar="FILE", help="file to write (default: report.html)")
    command.add_argument(
        "--png", action="store_true", help="also write the curves as a picture (needs matplotlib; not with --live)"
    )
    command.add_argument(
        "--live",
        action="store_true",
        help="write the page again every 5 seconds, and let it reload, until the runs end",
    )


def run_report(options: argparse.Namespace) -> None:
    """Write the report about one or several runs, with --live until they have ended."""
    from minilm.commands.report import write_live_report, write_report

    if options.live and options.png:
        raise ValueError("--live and --png exclude each other: write the picture when the runs have ended")
    if options.live:
        with interrupt_on_signals():
            for number, (path, runs) in enumerate(write_live_report(options.folders, options.output)):
                running = ", ".join(run.name for run in runs if run.running)
                if number == 0 and running:
                    print(
                        f"written: {path}; writing it again while these runs go on: {running} (ctrl-C ends)", flush=True
                    )
        print(f"written: {path}; no run goes on")
        return
    for path in write_report(options.folders, options.output, png=options.png):
        print(f"written: {path}")


def add_merge(commands: Any) -> None:
    """Add `minilm merge` and its arguments."""
    command = add_command(commands, "merge", run_merge, "average the weights of several models")
    command.description = (
        "Write a model whose weights are the mean of those of several checkpoints or runs of the same model: minilm "
        "merge out/a/checkpoint-1000 out/a/checkpoint-2000 --output out/merged"
    )
    command.add_argument("models", metavar="DIR", nargs="+", help="folder of a run or of a checkpoint")
    _add_output_folder(command)
    command.add_argument(
        "--weights",
        type=parse_not_negative,
        nargs="+",
        metavar="W",
        help="share of each model in the mean, in any unit (default: equal shares)",
    )


def run_merge(options: argparse.Namespace) -> None:
    """Write the mean of several models to a new folder."""
    with quick_imports():
        from minilm.commands.merge import merge_models
    print(f"written: {merge_models(options.models, options.output, options.weights)}")


def _add_output_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", required=True, metavar="FOLDER", help="folder to write to, new or empty")
