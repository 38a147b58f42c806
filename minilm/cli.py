"""The `minilm` command, and `run_recipe`, the command line of every recipe."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from minilm.config import Config, parse


def run_recipe(config: Config, description: str = "") -> None:
    """Apply the command line to a recipe's configuration and train.

    What the user got wrong ends the process with one line on stderr and status 2; `--debug` shows the traceback.
    """
    arguments = [word for word in sys.argv[1:] if word != "--debug"]

    def work() -> None:
        resolved = parse(config, description, arguments)
        _show_log()
        from minilm.train import train  # after the flags are known to be right: torch takes seconds to import

        train(resolved, name=Path(sys.argv[0]).stem)

    guarded(work, debug="--debug" in sys.argv)


def guarded(work: Callable[[], None], *, debug: bool = False) -> None:
    """Run `work`; what ends it becomes one line on the main process's stderr, and an exit status.

    That is 2 for a ValueError (what the user got wrong), 1 for an OSError (a full disk), 130 for ctrl-C, and its own
    for what stops a run in good order. Anything else is a bug and shows its traceback, as everything does with `debug`.
    """
    try:
        work()
    except (Exception, KeyboardInterrupt) as error:
        kinds = ((ValueError, 2), (OSError, 1), (KeyboardInterrupt, 130))
        # TrainingStopped carries its status; its class is not named here, so that torch need not be imported.
        status = getattr(error, "status", next((status for kind, status in kinds if isinstance(error, kind)), None))
        if debug or status is None:
            raise
        if os.environ.get("RANK", "0") == "0":
            kind = "stopped" if hasattr(error, "status") else "error"
            said = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{kind}: {error}"
            print(said, file=sys.stderr, flush=True)
        sys.exit(status)


def _show_log() -> None:
    """minilm's messages on the main process's stderr."""
    logger = logging.getLogger("minilm")
    logger.propagate = False
    logger.handlers = [logging.StreamHandler()]
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


def main(arguments: Sequence[str] | None = None) -> None:
    """The `minilm` command."""
    parser = argparse.ArgumentParser(prog="minilm", description="Use models trained with minilm, or any like them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fill = commands.add_parser(
        "fill-mask",
        help="the likeliest words for a mask",
        description='Show the likeliest tokens for each mask of each text: minilm fill-mask DIR "A [MASK] barks."',
    )
    fill.add_argument("model", metavar="DIR", help="folder or hub id of a masked LM")
    fill.add_argument(
        "texts", metavar="TEXT", nargs="*", default=["-"], help="text with a mask token; none or - reads lines"
    )
    fill.add_argument("--top-k", type=_positive, default=5, metavar="K", help="candidates for a mask (default: 5)")
    fill.add_argument("--json", action="store_true", help="a JSON object a line, for programs")
    fill.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    guarded(lambda: _fill_mask(options), debug=options.debug)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _fill_mask(options: argparse.Namespace) -> None:
    from transformers.utils import logging as transformers_logging

    from minilm.infer import check_masks, fill_mask, load_masked_lm

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    texts = [
        line for text in options.texts for line in (sys.stdin.read().splitlines() if text == "-" else [text]) if line
    ]
    model, tokenizer = load_masked_lm(options.model)
    check_masks(model, tokenizer, texts)
    for number, text in enumerate(texts):
        if number and not options.json:
            print()
        for mask, fills in enumerate(fill_mask(model, tokenizer, [text], top_k=options.top_k)[0]):
            if options.json:
                line = {"input": text, "mask": mask, "fills": [asdict(fill) for fill in fills]}
                print(json.dumps(line, ensure_ascii=False))
            else:
                for fill in fills:
                    print(f"{fill.probability:6.1%}  {fill.token:<16}  {fill.text}")
