"""The `minilm` command, and `run_recipe`, the command line of every recipe."""

import argparse
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from minilm.config import Config
from minilm.settings import parse
from minilm.signals import ended_by_signals, first_to_tell


def run_recipe(
    config: Config, description: str = "", trains: Callable[[Config, str], dict[str, float]] | None = None
) -> None:
    """Apply the command line to a recipe's configuration and train, with `minilm.train.train` or a fork of it.

    What the user got wrong ends the process with one line on stderr and status 2; `--debug` shows the traceback.
    """
    arguments = [word for word in sys.argv[1:] if word != "--debug"]

    @ended_by_signals()
    def work() -> None:
        resolved = parse(config, description, arguments)
        _show_log()
        if trains is None:
            from minilm.train import train  # after the flags are known to be right: torch takes seconds to import
        (trains or train)(resolved, Path(sys.argv[0]).stem)

    guarded(work, debug="--debug" in sys.argv)


def guarded(work: Callable[[], None], *, debug: bool = False) -> None:
    """Run `work`; what ends it becomes one line on stderr, from one process of a job, and an exit status.

    That is 2 for a ValueError (what the user got wrong), 1 for an OSError (a full disk, a lost process), 128 and its
    number for a signal, and its own for what stops a run in good order. Anything else is a bug and shows its traceback,
    as everything does with `debug`.
    """
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    try:
        work()
    except (Exception, KeyboardInterrupt) as error:
        status, said = _verdict(error)
        if said is None or debug:
            if not several:
                raise
            first_to_tell()  # so that those who lose contact for it are silent
            traceback.print_exc()
        elif first_to_tell():
            print(said, file=sys.stderr, flush=True)
        if several and (said is None or isinstance(error, OSError | KeyboardInterrupt)):
            _leave(status)
        sys.exit(status)


def _verdict(error: BaseException) -> tuple[int, str | None]:
    """The exit status, and the line that says why: None for a bug."""
    if isinstance(error, KeyboardInterrupt):
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        return 128 + number, "interrupted" if number == signal.SIGINT else f"interrupted by {number.name}"
    if hasattr(error, "status"):  # TrainingStopped: not named here, so that torch need not be imported
        return error.status, f"stopped: {error}"
    for kind, status in ((ValueError, 2), (OSError, 1)):
        if isinstance(error, kind):
            return status, f"error: {error}"
    return 1, None


def _leave(status: int) -> NoReturn:
    """End now: destructors of a broken process group may wait for ever. A checkpoint is still written to its end."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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
    fill.set_defaults(work=_fill_mask)
    more = commands.add_parser(
        "generate",
        help="go on with a text",
        description='Go on with each text, as a causal LM: minilm generate DIR "Once upon a time" --top-p 0.95',
    )
    more.add_argument("model", metavar="DIR", help="folder or hub id of a causal LM")
    more.add_argument("texts", metavar="TEXT", nargs="*", default=["-"], help="beginning; none or - reads lines")
    more.add_argument(
        "--max-new-tokens",
        type=_positive,
        metavar="N",
        help="at most so many (default: 100, if there is room)",
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
    more.add_argument("--json", action="store_true", help="a JSON object a line, for programs")
    more.add_argument("--debug", action="store_true", help="show tracebacks")
    more.set_defaults(work=_generate)
    options = parser.parse_args(arguments)
    guarded(lambda: options.work(options), debug=options.debug)


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
    """The texts of the command line, `-` replaced by the lines of standard input."""
    return [
        line for text in options.texts for line in (sys.stdin.read().splitlines() if text == "-" else [text]) if line
    ]


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _generate(options: argparse.Namespace) -> None:
    _quiet_transformers()
    from minilm.infer import check_beginnings, generate, load_causal_lm

    texts = _texts(options)
    model, tokenizer = load_causal_lm(options.model)
    check_beginnings(model, tokenizer, texts, max_new_tokens=options.max_new_tokens or 1)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    settings = {name: getattr(options, name) for name in names}
    for number, text in enumerate(texts):
        if number and not options.json:
            print()
        (result,) = generate(model, tokenizer, [text], **settings, stream=not options.json)
        if options.json:
            print(json.dumps({"input": text, "text": result}, ensure_ascii=False))


def _fill_mask(options: argparse.Namespace) -> None:
    _quiet_transformers()
    from minilm.infer import check_masks, fill_mask, load_masked_lm, on_one_line

    texts = _texts(options)
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
                    print(f"{fill.probability:6.1%}  {fill.token:<16}  {on_one_line(fill.text)}")
