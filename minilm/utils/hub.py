"""Names on the Hugging Face hub: tell them from paths, ask whether the hub answers, and explain failures in a line."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from minilm.utils.local_files import DENIED, is_path

log = logging.getLogger("minilm")

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off the progress bars and warnings of transformers in the block; minilm prints what matters itself."""
    level, has_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if has_bar:
            transformers_logging.enable_progress_bar()


@contextmanager
def loading(name: str, refusal: str) -> Iterator[None]:
    """Turn any error of the block, which loads the model or tokenizer `name`, into the ValueError `refusal: reason`."""
    try:
        cached = expect(name, "model")
        with quiet_transformers():
            yield
        if cached:
            log.warning(f"the hub does not answer: {name} comes from the cache")
    except Exception as error:
        # The libraries raise all kinds of errors for damaged files.
        raise ValueError(f"{refusal}: {reason(error)}") from error


def expect(name: str, kind: str) -> bool:
    """Prepare to load a `model` or `dataset`: return True, and use only the cache, if the hub does not answer.

    The libraries themselves would ask the hub for a minute, file by file. Raise ValueError for a path that does not
    exist or may not be read.
    """
    if is_path(name):
        if not os.path.exists(os.path.expanduser(name)):
            raise ValueError("there is no such folder")
        if not os.access(os.path.expanduser(name), os.R_OK):
            raise ValueError(f"{name}: {DENIED}")
        return False
    if constants.is_offline_mode():
        return False
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=10)
    except Exception as error:
        # Several HTTP libraries may raise here, each with its own errors.
        answered = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        if answered or isinstance(error, ValueError):
            # The error of the load itself will say what is wrong.
            return False
        # The libraries read the variable HF_HUB_OFFLINE only when they are imported. These are the values it sets.
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return True
    return False


def reason(error: BaseException, kind: str = "model") -> str:
    """Return one line that says why a name could not be loaded and what to do, from an error of the libraries."""
    causes = [*chain(error)]
    message = " ".join(str(error).split())

    def caused_by(*kinds: type) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if file := next(filter(None, map(_denied_file, causes)), None):
        return f"{file}: {DENIED}"
    if caused_by(GatedRepoError) or "is a gated dataset" in message:
        return f"it is gated: accept its terms on its page on the hub, then {LOG_IN}"
    if caused_by(RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError):
        return f"there is no such file or folder here and no such {kind} on the hub; if it is private, {LOG_IN}"
    if caused_by(ConnectionError, LocalEntryNotFoundError):
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES:
            return "it is neither here nor in the cache, and HF_HUB_OFFLINE forbids the hub: unset it, or give a folder"
        return "it is neither here nor in the cache, and the hub cannot be reached: check the network, or give a folder"
    if "trust_remote_code" in message:
        return "it comes with its own code, which minilm never runs: choose a model that transformers itself has"
    if "should have a `model_type` key" in message.lower():
        return "there is no config.json that names the type of a model"
    if "instantiate the backend tokenizer" in message:
        return "there is no tokenizer.json"
    if caused_by(SafetensorError):
        return f"its weights are damaged, so copy or download them again ({message})"
    if "file named" in message and "model.safetensors" in message:
        return (
            "there is no model.safetensors, and minilm does not read pickled weights such as pytorch_model.bin, since "
            "they can run code: convert weights that you trust with save_pretrained of transformers"
        )
    if caused_by(json.JSONDecodeError, UnicodeDecodeError):
        return f"one of its files is not valid JSON, so copy or download it again ({message})"
    return message if len(message) < 200 else message.split(". ")[0][:400]


def _denied_file(error: BaseException) -> str | None:
    """Return the file that an error is about if this user may not read it, or else None."""
    if not isinstance(error, OSError):
        return None
    # safetensors reports every file that it cannot open as missing.
    file = str(error.filename or str(error).removeprefix("No such file or directory: "))
    return file if os.path.exists(file) and not os.access(file, os.R_OK) else None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors that caused it, latest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
