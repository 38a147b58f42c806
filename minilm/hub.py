"""Names on the Hugging Face hub: which ones are, whether the hub answers, and why one cannot be had, in a line."""

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

from minilm.files import DENIED

log = logging.getLogger("minilm")

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def is_path(name: str) -> bool:
    """Whether a name can only be that of a file or folder here: it is there, or no hub id looks like it."""
    return os.path.exists(name) or name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers without its progress bars and tables: what matters of them is said in a line of our own."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


@contextmanager
def loading(name: str, refusal: str) -> Iterator[None]:
    """Around what loads the model or tokenizer `name`: whatever it raises becomes a ValueError, `refusal: reason`."""
    try:
        cached = expect(name, "model")
        with quiet_transformers():
            yield
        if cached:
            log.warning(f"the hub does not answer: {name} comes from the cache")
    except Exception as error:  # files by other people make the libraries raise anything
        raise ValueError(f"{refusal}: {reason(error)}") from error


def expect(name: str, kind: str) -> bool:
    """Before a `model` or `dataset` is loaded: turn to the cache at once when the hub does not answer, and say so.

    The libraries would ask it for a minute, file by file. Raises ValueError for a path that is not there or
    may not be read.
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
    except Exception as error:  # of one of several libraries of HTTP
        answered = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        if answered or isinstance(error, ValueError):
            return False  # whoever loads it says what is wrong
        # What HF_HUB_OFFLINE sets; the libraries read that once, when they are imported.
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return True
    return False


def reason(error: BaseException, kind: str = "model") -> str:
    """Why a name could not be loaded, in one line that says what to do, from what the libraries raised."""
    causes = [*chain(error)]
    said = " ".join(str(error).split())

    def found(*kinds: type) -> bool:
        return any(isinstance(one, kinds) for one in causes)

    if file := next(filter(None, map(_denied_file, causes)), None):
        return f"{file}: {DENIED}"
    if found(GatedRepoError) or "is a gated dataset" in said:
        return f"it is gated: accept its terms on its page on the hub, then {LOG_IN}"
    if found(RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError):
        return f"there is no such file or folder here and no such {kind} on the hub; if it is a private one, {LOG_IN}"
    if found(ConnectionError, LocalEntryNotFoundError):
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES:
            return (
                "it is neither here nor in the cache, and HF_HUB_OFFLINE keeps from the hub: unset it, or give a folder"
            )
        return "it is neither here nor in the cache, and the hub cannot be reached: check the network, or give a folder"
    if "trust_remote_code" in said:
        return "it needs code of its own, which is never run: take a model that transformers itself knows"
    if "should have a `model_type` key" in said.lower():
        return "there is no config.json that names the type of a model"
    if "instantiate the backend tokenizer" in said:
        return "there is no tokenizer.json"
    if found(SafetensorError):
        return f"its weights are damaged, so copy or download them again ({said})"
    if "file named" in said and "model.safetensors" in said:
        return (
            "there is no model.safetensors; pickled weights such as pytorch_model.bin can run code and are not read: "
            "convert them with save_pretrained of transformers"
        )
    if found(json.JSONDecodeError, UnicodeDecodeError):
        return f"one of its files is no JSON, so copy or download it again ({said})"
    return said if len(said) < 200 else said.split(". ")[0][:400]


def _denied_file(error: BaseException) -> str | None:
    """The file that an error is about, where this user may not read it."""
    if not isinstance(error, OSError):
        return None
    # safetensors says of each file that it cannot open that there is none.
    file = str(error.filename or str(error).removeprefix("No such file or directory: "))
    return file if os.path.exists(file) and not os.access(file, os.R_OK) else None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
