"""The `minilm` command: trained models, used and measured."""

import argparse
import ast
import io
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minilm.cli import guarded, quick_imports
from minilm.completion import SHELLS, PrintCompletion


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="minilm", description="Use models trained with minilm, or any like them.")
    parser.add_argument(
        "--completion", action=PrintCompletion, choices=SHELLS, help="print a script by which the shell completes words"
    )
    parser.add_argument("--version", action="version", version=f"minilm {version('minilm')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fill = _add(commands, "fill-mask", _fill_mask, "the likeliest words for a mask", "masked LM")
    fill.description = 'Show the likeliest tokens for each mask of each text: minilm fill-mask DIR "A [MASK] barks."'
    fill.add_argument("--top-k", type=_positive, default=5, metavar="K", help="candidates for a mask (default: 5)")
    more = _add(commands, "generate", _generate, "go on with a text", "causal LM")
    more.description = 'Go on with each text, as a causal LM: minilm generate DIR "Once upon a time" --top-p 0.95'
    more.add_argument(
        "--max-new-tokens", type=_positive, metavar="N", help="at most so many (default: 100, if there is room)"
    )
    more.add_argument(
        "--temperature", type=_not_negative, default=1.0, metavar="T", help="below 1: likelier; 0: the likeliest alone"
    )
    more.add_argument(
        "--top-k", type=_whole, default=50, metavar="K", help="draw from the K likeliest (default: 50; 0: from all)"
    )
    more.add_argument(
        "--top-p", type=_share, default=1.0, metavar="P", help="draw from the likeliest that make up P (default: 1)"
    )
    more.add_argument("--seed", type=_whole, default=0, metavar="S", help="another seed, another text (default: 0)")
    sort = _add(commands, "classify", _classify, "the class of a text or a pair", "sequence classifier")
    sort.description = 'Say what each text is: minilm classify DIR "Great fun!"; --pair TEXT is the second of a pair.'
    sort.add_argument("--pair", metavar="TEXT", help="second text of a pair")
    sort.add_argument("--pair-column", metavar="NAME", help="column of --file that holds the second text")
    sort.add_argument("--top-k", type=_positive, default=1, metavar="K", help="labels shown, best first (default: 1)")
    measure = _command(commands, "evaluate", _evaluate, "loss, perplexity, accuracy, … on data of your own")
    measure.description = (
        "Evaluate a model as training does: minilm evaluate DIR --data.source FILE. A run's folder knows how its own "
        "evaluation was done, and repeats that without --data.source."
    )
    measure.epilog = "--data.column, --data.pair-column, --data.label-column, … are those of the recipes."
    _add_model(measure, "model of any of these kinds")
    _add_export(commands)
    _add_report(commands)
    _add_doctor(commands)
    start = _command(commands, "train", _train, "which recipes there are, and how to start one")
    start.description = "List the recipes. Training is started by one of them: accelerate launch recipes/NAME.py"
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("evaluate", "train"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    guarded(lambda: options.work(options), debug=options.debug)


def _command(commands: Any, name: str, work: Callable[[argparse.Namespace], None], what: str) -> Any:
    """A command that does this work."""
    command = commands.add_parser(name, help=what)
    command.add_argument("--debug", action="store_true", help="show tracebacks")
    command.set_defaults(work=work)
    return command


def _add_export(commands: Any) -> None:
    command = _command(commands, "export", _export, "the model by itself, as safetensors or ONNX")
    command.description = (
        "Write the model of a run or of a checkpoint, with its tokenizer and nothing else, to a new folder: "
        "minilm export DIR --format onnx --output FOLDER"
    )
    command.add_argument("model", metavar="DIR", help="folder of a run or of a checkpoint")
    command.add_argument(
        "--format",
        choices=("onnx", "safetensors"),
        required=True,
        help='as it is, or as ONNX (pip install "minilm[onnx]")',
    )
    command.add_argument("--output", required=True, metavar="FOLDER", help="where to: a folder that is new or empty")


def _add_report(commands: Any) -> None:
    command = _command(commands, "report", _report, "curves, settings and results of runs as one page")
    command.description = (
        "Write one HTML page, which needs no network, about one or several runs: minilm report out/a out/b"
    )
    command.add_argument("folders", metavar="OUT", nargs="+", help="output folder of a run, finished or not")
    command.add_argument("--output", default="report.html", metavar="FILE", help="the page (default: report.html)")
    command.add_argument("--png", action="store_true", help="the curves as a picture beside it too (takes matplotlib)")


def _add_doctor(commands: Any) -> None:
    command = _command(commands, "doctor", _doctor, "what this machine offers to a run, and what to mend")
    command.description = (
        "Hardware, precision, memory, threads, versions, caches, and whether two processes meet, a line each."
    )
    command.epilog = "The exit status is 1 where there is something to mend."
    command.add_argument("--json", action="store_true", help="a JSON object a line, for programs")


def _add(commands: Any, name: str, work: Callable[[argparse.Namespace], None], what: str, kind: str) -> Any:
    """A command that takes texts."""
    command = _command(commands, name, work, what)
    _add_model(command, kind)
    command.add_argument(
        "texts",
        metavar="TEXT",
        nargs="*",
        help="none or - reads lines from standard input: each line, blank ones too, with its number from 0",
    )
    command.add_argument(
        "--file",
        metavar="FILE",
        help="take the texts from a file: each row, blank ones too, with its number from 0 (.txt: lines)",
    )
    command.add_argument("--column", metavar="NAME", help="column of --file (default: text)")
    command.add_argument("--delimiter", metavar="CHARACTER", help="between the fields of --file, where it is a .csv")
    return command


def _add_model(command: argparse.ArgumentParser, kind: str) -> None:
    command.add_argument("model", metavar="DIR", help=f"folder or hub id of a {kind}")
    command.add_argument("--json", action="store_true", help="a JSON object a line, for programs")


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _not_negative(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or a positive number")
    return number


def _share(text: str) -> float:
    number = _not_negative(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} does not lie in (0, 1]")
    return number


def _texts(options: argparse.Namespace) -> list[str]:
    """The texts of the command line, with the lines of standard input for `-`, or those of --file; blank ones too."""
    if options.file is not None:
        return list(_documents(options)["text"])
    for flag in ("column", "delimiter"):
        if getattr(options, flag) is not None:
            raise ValueError(f"--{flag} is about the rows of --file: give --file too, or leave --{flag} out")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A carriage return alone does not end a line.
        sys.stdin.reconfigure(newline="\n")
    texts = [line for text in options.texts or ["-"] for line in (_lines() if text == "-" else [text])]
    if not any(texts):
        raise ValueError("there is no text: give one, or --file, or lines on standard input")
    return texts


def _lines() -> list[str]:
    """The lines of standard input as other programs count them: `splitlines` also cuts at U+2028 and its like."""
    lines = sys.stdin.read().split("\n")
    # What follows the last end of a line is a line only if there is something.
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def _has_rows(options: argparse.Namespace) -> bool:
    """Whether texts come from a file or from standard input, so that the output is joined to them by numbers."""
    return options.file is not None or not options.texts or "-" in options.texts


def _row_number(options: argparse.Namespace, row: int, rows: int) -> str:
    """The number of a row, from 0, before a line of output; nothing where all texts are on the command line."""
    return f"{row:>{len(str(rows - 1))}}  " if _has_rows(options) else ""


def _row_field(options: argparse.Namespace, row: int) -> dict[str, Any]:
    """The number of a row, from 0, as a field of JSON; no field where all texts are on the command line."""
    return {"row": row} if _has_rows(options) else {}


def _documents(options: argparse.Namespace) -> Any:
    """The rows of --file, with the columns `text`, and `pair` where that is asked for."""
    if options.texts:
        raise ValueError("give texts or --file, not both")
    from minilm.config import Data
    from minilm.data import read_documents

    names = ("column", "delimiter", "pair_column")
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    try:
        rows = read_documents(Data(source=options.file, **given))
    except ValueError as error:
        # The flags have other names here.
        raise ValueError(str(error).replace("--data.", "--")) from None
    if not any(text.strip() for text in rows["text"]):
        raise ValueError(f"{options.file}: there is no text in it")
    return rows


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _print_json(line: dict[str, Any]) -> None:
    print(json.dumps(line, ensure_ascii=False))


def _generate(options: argparse.Namespace) -> None:
    with quick_imports():
        from minilm.infer import check_beginnings, generate, load_causal_lm
    _quiet_transformers()
    texts = _texts(options)
    model, tokenizer = load_causal_lm(options.model)
    check_beginnings(model, tokenizer, texts, max_new_tokens=options.max_new_tokens or 1)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    settings = {name: getattr(options, name) for name in names}
    for number, text in enumerate(texts):
        if number and not options.json:
            print()
        if not options.json:
            print(_row_number(options, number, len(texts)), end="", flush=True)
        (result,) = generate(model, tokenizer, [text], **settings, stream=not options.json)
        if options.json:
            _print_json({**_row_field(options, number), "input": text, "text": result})


def _fill_mask(options: argparse.Namespace) -> None:
    with quick_imports():
        from minilm.infer import check_masks, fill_mask, load_masked_lm, on_one_line
    _quiet_transformers()
    texts = _texts(options)
    model, tokenizer = load_masked_lm(options.model)
    check_masks(model, tokenizer, [text for text in texts if text.strip()])
    for number, text in enumerate(texts):
        if number and not options.json:
            print()
        field, prefix = _row_field(options, number), _row_number(options, number, len(texts))
        if not text.strip():
            # A blank row has nothing to fill, and keeps its place.
            if options.json:
                _print_json({**field, "input": text, "mask": None, "fills": []})
            else:
                print(prefix.rstrip())
            continue
        for mask, fills in enumerate(fill_mask(model, tokenizer, [text], top_k=options.top_k)[0]):
            if options.json:
                _print_json({**field, "input": text, "mask": mask, "fills": [asdict(fill) for fill in fills]})
            else:
                for fill in fills:
                    print(f"{prefix}{fill.probability:6.1%}  {fill.token:<16}  {on_one_line(fill.text)}")


def _classify(options: argparse.Namespace) -> None:
    with quick_imports():
        from minilm.infer import classify, load_classifier, on_one_line
    _quiet_transformers()
    pairs: list[str] | None = None
    if options.pair_column is not None:
        if options.file is None or options.pair is not None:
            raise ValueError("--pair-column is a column of --file: give that and no --pair, or --pair TEXT alone")
        rows = _documents(options)
        texts, pairs = list(rows["text"]), list(rows["pair"])
    else:
        texts = _texts(options)
        pairs = None if options.pair is None else [options.pair] * len(texts)
    model, tokenizer = load_classifier(options.model)
    number = model.config.problem_type == "regression"
    for index, found in enumerate(classify(model, tokenizer, texts, pairs)):
        if options.json:
            pair = {} if pairs is None else {"pair": pairs[index]}
            labels = [asdict(label) for label in found[: options.top_k]]
            _print_json({**_row_field(options, index), "input": texts[index], **pair, "labels": labels})
            continue
        text = on_one_line(texts[index] if pairs is None else f"{texts[index]} | {pairs[index]}")
        prefix = _row_number(options, index, len(texts))
        for label in found[: options.top_k]:
            score = f"{label.score:8.4f}" if number else f"{label.score:6.1%}  {label.label:<16}"
            print(f"{prefix}{score}  {text}")
        if not found:
            # A text without a token has no label, and keeps its place.
            print(f"{prefix}{'-':>8}  {text}" if number else f"{prefix}{'-':>6}  {'-':<16}  {text}")


def _evaluate(options: argparse.Namespace) -> None:
    from minilm.settings import parse_data

    data = parse_data(options.rest)
    with quick_imports():
        from minilm.score import evaluate
    _quiet_transformers()
    figures = evaluate(options.model, data)
    if options.json:
        _print_json(figures)
    else:
        width = max(map(len, figures))
        for name, value in figures.items():
            print(f"{name:<{width}}  {value:.6g}")


def _export(options: argparse.Namespace) -> None:
    with quick_imports():
        from minilm.export import export_model
    _quiet_transformers()
    print(f"written: {export_model(options.model, options.output, options.format)}")


def _report(options: argparse.Namespace) -> None:
    from minilm.report import write_report

    for path in write_report(options.folders, options.output, png=options.png):
        print(f"written: {path}")


def _doctor(options: argparse.Namespace) -> None:
    with quick_imports():
        from minilm.doctor import findings
    to_mend = False
    for finding in findings():
        to_mend |= bool(finding.fix)
        if options.json:
            print(json.dumps(asdict(finding), ensure_ascii=False), flush=True)
        else:
            fix = f" -> {finding.fix}" if finding.fix else ""
            print(f"{'MEND' if fix else 'ok':<5} {finding.what:<10} {finding.found}{fix}", flush=True)
    if to_mend:
        sys.exit(1)


def _train(options: argparse.Namespace) -> None:
    """List the recipes of this checkout with their first lines, and how to start one."""
    folder = Path(__file__).parents[1] / "recipes"
    recipes = sorted(folder.glob("*.py"))
    if not recipes:
        raise ValueError(
            "a recipe starts the training, a file of some 25 lines: clone the repository, which has them in recipes/, "
            "or write one that ends in minilm.cli.run_recipe(CONFIG)"
        )
    print(f"A recipe starts the training. Those in {folder}:\n")
    for recipe in recipes:
        summary = (ast.get_docstring(ast.parse(recipe.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        print(f"  {recipe.name:<20} {summary}")
    print(f"\nStart one:    accelerate launch {shlex.quote(str(folder / 'mlm_pydocs.py'))}")
    print("See its flags: python RECIPE --help    See what it would do: python RECIPE --dry-run")
    if options.rest:
        raise ValueError(f"minilm train takes no arguments: pass {shlex.join(options.rest)} to a recipe")


if __name__ == "__main__":
    main()
