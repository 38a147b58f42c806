"""The `minilm` command. `model_commands`, `run_commands` and `training_commands` hold its subcommands."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version

from minilm.commands import model_commands, run_commands, training_commands
from minilm.commands.completion import SHELLS, PrintCompletion
from minilm.commands.recipe import exit_on_error, quick_exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line, by default that of this process, which ends then."""
    with quick_exit() if arguments is None else nullcontext():
        _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: Sequence[str]) -> None:
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no text after an option if none is before it: minilm answer DIR --question "Who?" "Bob."
    if not getattr(options, "texts", True) and all(word == "-" or not word.startswith("-") for word in rest):
        options.texts, rest = rest, []
    if rest and options.command not in ("branch", "compare", "evaluate", "replay", "suite", "train"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    exit_on_error(lambda: options.work(options), debug=options.debug)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. The parsed `work` is the function of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="minilm", description="Use models trained with minilm, or other models of the same kinds."
    )
    parser.add_argument(
        "--completion", action=PrintCompletion, choices=SHELLS, help="print a script that lets the shell complete words"
    )
    parser.add_argument("--version", action="version", version=f"minilm {version('minilm')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    model_commands.add_fill_mask(commands)
    model_commands.add_generate(commands)
    model_commands.add_classify(commands)
    model_commands.add_embed(commands)
    model_commands.add_answer(commands)
    model_commands.add_tag(commands)
    run_commands.add_evaluate(commands)
    run_commands.add_compare(commands)
    run_commands.add_ledger(commands)
    run_commands.add_export(commands)
    run_commands.add_report(commands)
    training_commands.add_doctor(commands)
    training_commands.add_branch(commands)
    training_commands.add_verify(commands)
    training_commands.add_replay(commands)
    run_commands.add_merge(commands)
    training_commands.add_tokenize(commands)
    training_commands.add_suite(commands)
    training_commands.add_train(commands)
    return parser


if __name__ == "__main__":
    main()
