"""What the arguments of several `minilm` commands share, and the JSON that `--json` prints."""

import argparse
import json
from collections.abc import Callable
from typing import Any


def add_command(commands: Any, name: str, work: Callable[[argparse.Namespace], None], summary: str) -> Any:
    """Add a subcommand whose function is `work`, and return its parser."""
    command = commands.add_parser(name, help=summary)
    command.add_argument("--debug", action="store_true", help="show tracebacks")
    command.set_defaults(work=work)
    return command


def add_model(command: argparse.ArgumentParser, kind: str) -> None:
    """Add the argument for the model, whose kind the help names, and --json."""
    command.add_argument("model", metavar="DIR", help=f"folder or hub id of a {kind}")
    add_json(command)


def add_json(command: argparse.ArgumentParser) -> None:
    """Add --json."""
    command.add_argument("--json", action="store_true", help="print JSON objects, one per line, for programs")


def print_json(line: dict[str, Any]) -> None:
    """Print one line of the output of --json."""
    print(json.dumps(line, ensure_ascii=False))


def parse_whole(text: str) -> int:
    """Return a whole number that is 0 or more, or raise ArgumentTypeError."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def parse_positive(text: str) -> int:
    """Return a whole number that is 1 or more, or raise ArgumentTypeError."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def parse_positive_number(text: str) -> float:
    """Return a finite number above 0, or raise ArgumentTypeError."""
    number = parse_not_negative(text)
    if number == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def parse_not_negative(text: str) -> float:
    """Return a finite number that is 0 or more, or raise ArgumentTypeError."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or a positive number")
    return number


def parse_probability(text: str) -> float:
    """Return a number above 0 and at most 1, or raise ArgumentTypeError."""
    number = parse_not_negative(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} does not lie in (0, 1]")
    return number
