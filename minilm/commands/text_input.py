"""Texts for a command, from the command line, standard input or a file, and the numbers of their rows."""

import argparse
import io
import sys
from typing import Any


def add_texts(command: argparse.ArgumentParser) -> None:
    """Add the arguments that `read_texts` and `read_file_rows` read."""
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


def read_texts(options: argparse.Namespace) -> list[str]:
    """Return the texts of the command line, of standard input or of --file, blank ones too.

    If the text is `-` or missing, the texts are the lines of standard input. Raise ValueError if these are empty.
    """
    if options.file is not None:
        return list(read_file_rows(options)["text"])
    for flag in ("column", "delimiter"):
        if getattr(options, flag) is not None:
            raise ValueError(f"--{flag} describes the rows of --file: give --file too, or leave --{flag} out")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # By default Python would also end a line at a carriage return alone.
        sys.stdin.reconfigure(newline="\n")
    texts = [line for text in options.texts or ["-"] for line in (_read_lines() if text == "-" else [text])]
    if not any(texts):
        raise ValueError("there is no text: pass one as an argument, pass --file, or write lines to standard input")
    return texts


def read_file_rows(options: argparse.Namespace) -> Any:
    """Return the rows of --file with the column `text`, and with the column `pair` if --pair-column is given.

    Raise ValueError if the command line also has texts, or if the file cannot be read or holds no text.
    """
    if options.texts:
        raise ValueError("give texts or --file, not both")
    from minilm.config import Data
    from minilm.data.documents import load_all_documents

    names = ("column", "delimiter", "pair_column")
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    try:
        rows = load_all_documents(Data(source=options.file, **given))
    except ValueError as error:
        # What recipes call --data.column is --column here.
        raise ValueError(str(error).replace("--data.", "--")) from None
    if not any(text.strip() for text in rows["text"]):
        raise ValueError(f"{options.file}: it holds no text")
    return rows


def format_row_number(options: argparse.Namespace, row: int, rows: int) -> str:
    """Return the number of a row, from 0, for the start of a line; empty if all texts are on the command line."""
    return f"{row:>{len(str(rows - 1))}}  " if _has_rows(options) else ""


def row_field(options: argparse.Namespace, row: int) -> dict[str, Any]:
    """Return the number of a row, from 0, as a field of JSON; empty if all texts are on the command line."""
    return {"row": row} if _has_rows(options) else {}


def _has_rows(options: argparse.Namespace) -> bool:
    """Return whether texts come from a file or standard input. The output then has the number of each row."""
    return options.file is not None or not options.texts or "-" in options.texts


def _read_lines() -> list[str]:
    """Return the lines of standard input as other programs count them; `splitlines` would also cut at U+2028."""
    lines = sys.stdin.read().split("\n")
    # Text after the last line end is a line. Where there is none, the last part is empty and not a line.
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
