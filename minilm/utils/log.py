"""Where minilm's messages go."""

import logging
import os

from minilm.utils.launch_variables import is_main_process


def show_log() -> None:
    """Print minilm's messages to stderr in the main process, and only its errors in the others."""
    logger = logging.getLogger("minilm")
    logger.propagate = False
    logger.handlers = [logging.StreamHandler()]
    logger.setLevel(logging.INFO if is_main_process(os.environ) else logging.ERROR)


def show_log_by_default() -> None:
    """Do what `show_log` does, unless the program has a handler for the messages, as after `logging.basicConfig()`."""
    if not logging.getLogger("minilm").hasHandlers():
        show_log()
