"""`run_recipe`, the command line of every recipe, and `exit_on_error`, which reports errors in one line."""

import atexit
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from minilm.commands.completion import COMPLETION_FLAG, build_recipe_completion
from minilm.commands.fast_imports import quick_imports
from minilm.config import Config
from minilm.config.command_line import parse_flags, parse_seeds
from minilm.runs.run_history import runs_of_recipe
from minilm.utils.errors import TrainingStopped
from minilm.utils.launch_variables import claim_error_report, is_distributed
from minilm.utils.log import show_log
from minilm.utils.openmp import stop_spinning_if_busy
from minilm.utils.output_streams import discard_unread_output, survive_closed_output
from minilm.utils.processor_load import ProcessorLoad
from minilm.utils.signals import interrupt_on_signals
from minilm.utils.validation import check

if TYPE_CHECKING:
    from minilm.runs.train_result import TrainResult

log = logging.getLogger("minilm")


def run_recipe(
    config: Config, description: str = "", train_function: Callable[[Config, str], "TrainResult"] | None = None
) -> None:
    """Apply the command line to a recipe's configuration, and train with it.

    train_function: the loop of a fork; `minilm.train.train` by default.

    `--dry-run` describes the run in place of training (`minilm.commands.dry_run`). `--seeds` trains once per seed
    (`minilm.commands.seeds`). A mistake of the user ends the process with one line on stderr and status 2; `--debug`
    shows the traceback. `--tyro-print-completion SHELL` prints a script that lets the shell complete all these flags.
    """
    arguments = [word for word in sys.argv[1:] if word not in ("--debug", "--dry-run")]

    @interrupt_on_signals()
    def work() -> None:
        if arguments[:1] == [COMPLETION_FLAG]:
            print(build_recipe_completion(config, Path(sys.argv[0]).name, "".join(arguments[1:])))
            return
        seeds, rest = parse_seeds(arguments)
        check(
            not seeds or "--dry-run" not in sys.argv, "--seeds and --dry-run exclude each other: leave one of them out"
        )
        resolved = parse_flags(config, description, rest)
        show_log()
        # The imports take seconds. The flags were checked before, and the log says what takes the time.
        log.info("importing torch …")
        load = ProcessorLoad()
        time.sleep(ProcessorLoad.LEAST_SECONDS)
        stop_spinning_if_busy(os.environ, load.others())
        with quick_imports():
            import torch  # noqa: F401
        log.info("importing transformers …")
        name = Path(sys.argv[0]).stem
        if "--dry-run" in sys.argv:
            with quick_imports():
                from minilm.commands.dry_run import dry_run
            dry_run(resolved, name, own_loop=train_function is not None)
            return
        with quick_imports():
            from minilm.commands.seeds import train_seeds
            from minilm.train import train
        with runs_of_recipe(config):
            if seeds:
                train_seeds(resolved, name, seeds, train_function or train)
            else:
                (train_function or train)(resolved, name)

    with survive_closed_output():
        exit_on_error(work, debug="--debug" in sys.argv)


def exit_on_error(work: Callable[[], None], *, debug: bool = False) -> None:
    """Run `work`. If an exception ends it, exit with a status; one process of the job prints one line to stderr.

    The status is 2 for a ValueError (a mistake of the user), 1 for an OSError (a full disk, a lost process), 128 + n
    for signal n, and the exception's own for TrainingStopped. It is 141, without a line, if nothing reads stdout any
    more. Any other exception is a bug and shows its traceback. With `debug`, all exceptions do.
    """
    several = is_distributed(os.environ)
    try:
        work()
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError) and discard_unread_output(sys.stdout):
            sys.exit(128 + signal.SIGPIPE)
        status, line = _describe(error)
        if line is None or debug:
            if not several:
                raise
            # The other processes end because they lose contact with this one. This claim keeps them from printing why.
            claim_error_report()
            traceback.print_exc()
        elif claim_error_report():
            print(line, file=sys.stderr, flush=True)
        if several and (line is None or isinstance(error, OSError | KeyboardInterrupt)):
            _leave(status)
        sys.exit(status)


def _describe(error: BaseException) -> tuple[int, str | None]:
    """Return the exit status and the line that says why the program ended; the line is None for a bug."""
    if isinstance(error, KeyboardInterrupt):
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        return 128 + number, "interrupted" if number == signal.SIGINT else f"interrupted by {number.name}"
    if isinstance(error, TrainingStopped):
        return error.status, f"stopped: {error}"
    for kind, status in ((ValueError, 2), (OSError, 1)):
        if isinstance(error, kind):
            return status, f"error: {error}"
    return 1, None


@contextmanager
def quick_exit() -> Iterator[None]:
    """Let the process end without destructors once it ends after the block: those of large libraries take a second.

    Functions that libraries register in the block for the end of the process do run.
    """
    status = 1

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    # Python calls such functions in reverse order, so that this one is the last.
    atexit.register(end)
    try:
        yield
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise


def _leave(status: int) -> NoReturn:
    """End the process without destructors: those of a broken process group may wait for ever.

    A thread that writes a checkpoint finishes first.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
