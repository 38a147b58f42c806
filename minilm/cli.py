"""`run_recipe`, the command line of every recipe, and how a program ends: in one line that says why."""

import atexit
import gc
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from minilm.checks import check
from minilm.completion import RECIPE, recipe_completion
from minilm.config import Config
from minilm.job import is_main, is_one_of_several
from minilm.settings import parse, take_seeds
from minilm.shell import outlasting_readers, reader_is_gone
from minilm.signals import ended_by_signals, first_to_tell


def run_recipe(
    config: Config, description: str = "", trains: Callable[[Config, str], dict[str, float]] | None = None
) -> None:
    """Apply the command line to a recipe's configuration and train, with `minilm.train.train` or a fork of it.

    `--dry-run` tells what the run would be in place of it (`minilm.dryrun`); `--seeds` repeats it (`minilm.sweep`).
    What the user got wrong ends the process with one line on stderr and status 2; `--debug` shows the traceback.
    `--tyro-print-completion SHELL` prints what has a shell complete all these flags.
    """
    arguments = [word for word in sys.argv[1:] if word not in ("--debug", "--dry-run")]

    @ended_by_signals()
    def work() -> None:
        if arguments[:1] == [RECIPE]:
            print(recipe_completion(config, Path(sys.argv[0]).name, "".join(arguments[1:])))
            return
        seeds, rest = take_seeds(arguments)
        check(
            not seeds or "--dry-run" not in sys.argv, "--seeds and --dry-run exclude each other: leave one of them out"
        )
        resolved = parse(config, description, rest)
        _show_log()
        name = Path(sys.argv[0]).stem
        if "--dry-run" in sys.argv:
            with quick_imports():
                from minilm.dryrun import dry_run
            dry_run(resolved, name, own_loop=trains is not None)
            return
        # After the flags are known to be right: torch takes seconds to import.
        with quick_imports():
            from minilm.sweep import sweep
            from minilm.train import train
        if seeds:
            sweep(resolved, name, seeds, trains or train)
        else:
            (trains or train)(resolved, name)

    with outlasting_readers():
        guarded(work, debug="--debug" in sys.argv)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import large libraries in four fifths of the time: garbage collection, which finds nothing in them, passes by.

    It does so afterwards as well, with all that there is by then, until the process ends.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # else libraries tell of what is left as of leaks
        if collects:
            gc.enable()


def guarded(work: Callable[[], None], *, debug: bool = False) -> None:
    """Run `work`; what ends it becomes one line on stderr, from one process of a job, and an exit status.

    That is 2 for a ValueError (what the user got wrong), 1 for an OSError (a full disk, a lost process), 128 and its
    number for a signal, 141 without a line where the reader of stdout has gone, and its own for what stops a run in
    good order. Anything else is a bug and shows its traceback, as everything does with `debug`.
    """
    several = is_one_of_several(os.environ)
    try:
        work()
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError) and reader_is_gone(sys.stdout):
            sys.exit(128 + signal.SIGPIPE)
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
    logger.setLevel(logging.INFO if is_main(os.environ) else logging.ERROR)
