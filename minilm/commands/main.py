"""The `minilm` command: use, evaluate, export and compare trained models."""

import argparse
import ast
import io
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minilm.commands.completion import SHELLS, PrintCompletion
from minilm.commands.recipe import guarded, quick_imports


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="minilm", description="Use models trained with minilm, or other models of the same kinds."
    )
    parser.add_argument(
        "--completion", action=PrintCompletion, choices=SHELLS, help="print a script that lets the shell complete words"
    )
    parser.add_argument("--version", action="version", version=f"minilm {version('minilm')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fill = _add(commands, "fill-mask", _fill_mask, "the likeliest words for a mask", "masked LM")
    fill.description = 'Show the likeliest tokens for each mask of each text: minilm fill-mask DIR "A [MASK] barks."'
    fill.add_argument(
        "--top-k", type=_positive, default=5, metavar="K", help="number of candidates for each mask (default: 5)"
    )
    more = _add(commands, "generate", _generate, "continue a text", "causal LM")
    more.description = 'Continue each text with a causal LM: minilm generate DIR "Once upon a time" --top-p 0.95'
    more.add_argument(
        "--max-new-tokens",
        type=_positive,
        metavar="N",
        help="maximum number of new tokens (default: 100, or as many as the model has room for)",
    )
    more.add_argument(
        "--temperature",
        type=_not_negative,
        default=1.0,
        metavar="T",
        help="below 1 likely tokens become likelier; 0 always takes the likeliest (default: 1)",
    )
    more.add_argument(
        "--top-k",
        type=_whole,
        default=50,
        metavar="K",
        help="draw from the K likeliest tokens (default: 50; 0: from all)",
    )
    more.add_argument(
        "--top-p",
        type=_share,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens that together have probability P (default: 1)",
    )
    more.add_argument(
        "--seed",
        type=_whole,
        default=0,
        metavar="S",
        help="seed of the draws; another seed gives another text (default: 0)",
    )
    sort = _add(commands, "classify", _classify, "the class of a text or a pair", "sequence classifier")
    sort.description = 'Print the class of each text: minilm classify DIR "Great fun!"; --pair TEXT adds a second text.'
    sort.add_argument("--pair", metavar="TEXT", help="second text of a pair")
    sort.add_argument("--pair-column", metavar="NAME", help="column of --file that holds the second text")
    sort.add_argument(
        "--top-k", type=_positive, default=1, metavar="K", help="number of labels to print, best first (default: 1)"
    )
    measure = _command(commands, "evaluate", _evaluate, "loss, perplexity, accuracy, … on data of your own")
    measure.description = (
        "Evaluate a model as training does: minilm evaluate DIR --data.source FILE. Without --data.source, repeat the "
        "evaluation of the run whose folder DIR is."
    )
    measure.epilog = "--data.column, --data.pair-column, --data.label-column, … mean what they mean for a recipe."
    _add_model(measure, "model of any of these kinds")
    _add_export(commands)
    _add_report(commands)
    _add_doctor(commands)
    start = _command(commands, "train", _train, "list the recipes, and show how to start one")
    start.description = "List the recipes. A recipe starts the training: accelerate launch recipes/NAME.py"
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("evaluate", "train"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    guarded(lambda: options.work(options), debug=options.debug)


def _command(commands: Any, name: str, work: Callable[[argparse.Namespace], None], what: str) -> Any:
    """Add a command that does this work."""
    command = commands.add_parser(name, help=what)
    command.add_argument("--debug", action="store_true", help="show tracebacks")
    command.set_defaults(work=work)
    return command


def _add_export(commands: Any) -> None:
    command = _command(commands, "export", _export, "write the model alone, as safetensors or ONNX")
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
    command.add_argument("--output", required=True, metavar="FOLDER", help="folder to write to, new or empty")


def _add_report(commands: Any) -> None:
    command = _command(commands, "report", _report, "curves, settings and results of runs as one page")
    command.description = (
        "Write one HTML page about one or several runs, for a browser without network: minilm report out/a out/b"
    )
    command.add_argument("folders", metavar="OUT", nargs="+", help="output folder of a run, finished or not")
    command.add_argument("--output", default="report.html", metavar="FILE", help="file to write (default: report.html)")
    command.add_argument("--png", action="store_true", help="also write the curves as a picture (needs matplotlib)")


def _add_doctor(commands: Any) -> None:
    command = _command(commands, "doctor", _doctor, "check this machine, and say what to mend")
    command.description = (
        "Check hardware, precision, memory, threads, versions, caches, and whether two processes can meet, and print a "
        "line about each."
    )
    command.epilog = "The exit status is 1 if there is something to mend."
    _add_json(command)


def _add(commands: Any, name: str, work: Callable[[argparse.Namespace], None], what: str, kind: str) -> Any:
    """Add a command that reads texts."""
    command = _command(commands, name, work, what)
    _add_model(command, kind)
    command.add_argument(
        "texts",
        metavar="TEXT",
        nargs="*",
        help="a text; none or - reads standard input, where each line is a text, even a blank one, numbered from 0",
    )
    command.add_argument(
        "--file",
        metavar="FILE",
        help="read the texts from a file, where each row (.txt: line) is a text, even a blank one, numbered from 0",
    )
    command.add_argument("--column", metavar="NAME", help="column of --file (default: text)")
    command.add_argument("--delimiter", metavar="CHARACTER", help="character between the fields of a .csv file")
    return command


def _add_model(command: argparse.ArgumentParser, kind: str) -> None:
    command.add_argument("model", metavar="DIR", help=f"folder or hub id of a {kind}")
    _add_json(command)


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON objects, one per line, for programs")


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
    """Return the texts of the command line (`-`: the lines of standard input) or of --file, even blank ones."""
    if options.file is not None:
        return list(_documents(options)["text"])
    for flag in ("column", "delimiter"):
        if getattr(options, flag) is not None:
            raise ValueError(f"--{flag} is about the rows of --file: give --file too, or leave --{flag} out")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # By default Python would also end a line at a carriage return alone.
        sys.stdin.reconfigure(newline="\n")
    texts = [line for text in options.texts or ["-"] for line in (_lines() if text == "-" else [text])]
    if not any(texts):
        raise ValueError("there is no text: give one, or --file, or lines on standard input")
    return texts


def _lines() -> list[str]:
    """Return the lines of standard input as other programs count them; `splitlines` would also cut at U+2028."""
    lines = sys.stdin.read().split("\n")
    # Text after the last line end is a line; nothing after it is not.
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def _has_rows(options: argparse.Namespace) -> bool:
    """Return whether texts come from a file or standard input. The output then has the number of each row."""
    return options.file is not None or not options.texts or "-" in options.texts


def _row_number(options: argparse.Namespace, row: int, rows: int) -> str:
    """Return the number of a row, from 0, for the start of a line; empty if all texts are on the command line."""
    return f"{row:>{len(str(rows - 1))}}  " if _has_rows(options) else ""


def _row_field(options: argparse.Namespace, row: int) -> dict[str, Any]:
    """Return the number of a row, from 0, as a field of JSON; empty if all texts are on the command line."""
    return {"row": row} if _has_rows(options) else {}


def _documents(options: argparse.Namespace) -> Any:
    """Return the rows of --file with the column `text`, and with --pair-column the column `pair`."""
    if options.texts:
        raise ValueError("give texts or --file, not both")
    from minilm.config import Data
    from minilm.data.documents import load_all_documents

    names = ("column", "delimiter", "pair_column")
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    try:
        rows = load_all_documents(Data(source=options.file, **given))
    except ValueError as error:
        # A command's --column is --data.column of a recipe.
        raise ValueError(str(error).replace("--data.", "--")) from None
    if not any(text.strip() for text in rows["text"]):
        raise ValueError(f"{options.file}: it holds no text")
    return rows


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Import transformers, and switch off its progress bars and warnings in the block."""
    with ExitStack() as stack:
        with quick_imports():
            from minilm.utils.progress import quiet_transformers

            stack.enter_context(quiet_transformers())
        yield


def _print_json(line: dict[str, Any]) -> None:
    print(json.dumps(line, ensure_ascii=False))


@_quiet_transformers()
def _generate(options: argparse.Namespace) -> None:
    with quick_imports():
        from minilm.models.inference import check_prompts, generate, load_causal_lm
    texts = _texts(options)
    model, tokenizer = load_causal_lm(options.model)
    check_prompts(model, tokenizer, texts, max_new_tokens=options.max_new_tokens or 1)
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


@_quiet_transformers()
def _fill_mask(options: argparse.Namespace) -> None:
    with quick_imports():
        from minilm.models.inference import check_masks, escape_line_breaks, fill_mask, load_masked_lm
    texts = _texts(options)
    model, tokenizer = load_masked_lm(options.model)
    check_masks(model, tokenizer, [text for text in texts if text.strip()])
    for number, text in enumerate(texts):
        if number and not options.json:
            print()
        field, prefix = _row_field(options, number), _row_number(options, number, len(texts))
        if not text.strip():
            # A blank row has no mask. It still has its line in the output.
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
                    print(f"{prefix}{fill.probability:6.1%}  {fill.token:<16}  {escape_line_breaks(fill.text)}")


@_quiet_transformers()
def _classify(options: argparse.Namespace) -> None:
    with quick_imports():
        from minilm.models.inference import classify, escape_line_breaks, load_classifier
    pairs: list[str] | None = None
    if options.pair_column is not None:
        if options.file is None or options.pair is not None:
            raise ValueError("--pair-column is a column of --file: give --file and no --pair, or --pair TEXT alone")
        rows = _documents(options)
        texts, pairs = list(rows["text"]), list(rows["pair"])
    else:
        texts = _texts(options)
        pairs = None if options.pair is None else [options.pair] * len(texts)
    model, tokenizer = load_classifier(options.model)
    is_regression = model.config.problem_type == "regression"
    for index, labels in enumerate(classify(model, tokenizer, texts, pairs)):
        if options.json:
            pair = {} if pairs is None else {"pair": pairs[index]}
            fields = [asdict(label) for label in labels[: options.top_k]]
            _print_json({**_row_field(options, index), "input": texts[index], **pair, "labels": fields})
            continue
        text = escape_line_breaks(texts[index] if pairs is None else f"{texts[index]} | {pairs[index]}")
        prefix = _row_number(options, index, len(texts))
        for label in labels[: options.top_k]:
            score = f"{label.score:8.4f}" if is_regression else f"{label.score:6.1%}  {label.label:<16}"
            print(f"{prefix}{score}  {text}")
        if not labels:
            # A text without tokens has no label. It still has its line in the output.
            print(f"{prefix}{'-':>8}  {text}" if is_regression else f"{prefix}{'-':>6}  {'-':<16}  {text}")


def _evaluate(options: argparse.Namespace) -> None:
    from minilm.config.command_line import parse_data_flags

    data = parse_data_flags(options.rest)
    with quick_imports():
        from minilm.commands.evaluate import evaluate
    with _quiet_transformers():
        figures = evaluate(options.model, data)
    if options.json:
        _print_json(figures)
    else:
        width = max(map(len, figures))
        for name, value in figures.items():
            print(f"{name:<{width}}  {value:.6g}")


@_quiet_transformers()
def _export(options: argparse.Namespace) -> None:
    with quick_imports():
        from minilm.commands.export import export_model
    print(f"written: {export_model(options.model, options.output, options.format)}")


def _report(options: argparse.Namespace) -> None:
    from minilm.commands.report import write_report

    for path in write_report(options.folders, options.output, png=options.png):
        print(f"written: {path}")


def _doctor(options: argparse.Namespace) -> None:
    with quick_imports():
        from minilm.commands.doctor import findings
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


if __name__ == "__main__":
    main()
