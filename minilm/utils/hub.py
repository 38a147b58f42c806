"""Access to the hub: fall back on the cache if it does not answer, and explain loading errors in one line."""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from minilm.utils.errors import iterate_causes
from minilm.utils.local_files import PERMISSION_DENIED, is_local_path
from minilm.utils.progress import quiet_transformers

log = logging.getLogger("minilm")

LOGIN_HINT = "log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def explain_loading_errors(name: str, refusal: str) -> Iterator[None]:
    """Turn any error of the block into a ValueError with the message `refusal: reason`.

    The block loads the model or tokenizer `name` quietly. If the hub does not answer, it loads from the cache, and a
    warning says so.
    """
    try:
        cached = use_cache_if_offline(name, "model")
        with quiet_transformers():
            yield
        if cached:
            log.warning(f"the hub does not answer: {name} comes from the cache")
    except Exception as error:
        # The libraries raise errors of many types for damaged files.
        raise ValueError(f"{refusal}: {describe_loading_error(error)}") from error


def use_cache_if_offline(name: str, kind: str) -> bool:
    """Return True if the hub does not answer, and from then on let the Hugging Face libraries use only their cache.

    Without this, the libraries would ask the hub again for each file, for a minute in all. Return False for a local
    path. Raise ValueError if the path does not exist or this user may not read it.

    name: a path or a hub id. kind: `model` or `dataset`.
    """
    if is_local_path(name):
        if not os.path.exists(os.path.expanduser(name)):
            raise ValueError("there is no such folder")
        if not os.access(os.path.expanduser(name), os.R_OK):
            raise ValueError(f"{name}: {PERMISSION_DENIED}")
        if kind == "model":
            _refuse_unfinished_run(Path(name).expanduser())
        return False
    if constants.is_offline_mode():
        return False
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=10)
    except Exception as error:
        # Several HTTP libraries may raise here, each with its own errors.
        answered = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        if answered or isinstance(error, ValueError):
            # The load itself will fail, and its error says what is wrong.
            return False
        import datasets  # takes a while, and most commands do without it

        # The libraries read HF_HUB_OFFLINE only when they are imported. These are the values that it sets.
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return True
    return False


def _refuse_unfinished_run(folder: Path) -> None:
    """Raise ValueError for the output folder of a run that has saved no model yet: it goes on, or was stopped."""
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "run.json" in files and files.isdisjoint({"config.json", "all_results.json"}):
        checkpoints = [path.name for path in folder.glob("checkpoint-*") if (path / "config.json").is_file()]
        last = max(checkpoints, key=lambda name: (len(name), name), default=None)
        raise ValueError(
            f"the run has only checkpoints yet: give {folder / last}"
            if last
            else "the run has saved no model and no checkpoint yet"
        )


def describe_loading_error(error: BaseException, kind: str = "model") -> str:
    """Return one line that says why a model or dataset could not be loaded, and what to do.

    error: what the libraries raised. kind: `model` or `dataset`.
    """
    import datasets

    causes = [*iterate_causes(error)]
    message = " ".join(str(error).split())

    def caused_by(*kinds: type) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if file := next(filter(None, map(_denied_file, causes)), None):
        return f"{file}: {PERMISSION_DENIED}"
    if caused_by(GatedRepoError) or "is a gated dataset" in message:
        return f"it is gated: accept its terms on its page on the hub, then {LOGIN_HINT}"
    if caused_by(RevisionNotFoundError):
        commit = re.search(r"\b[0-9a-f]{40}\b", message)
        which = f"the commit {commit[0]}" if commit else "the commit"
        return (
            f"the hub no longer has {which} with which this began: start again without run.resume, or with another "
            "output folder"
        )
    if caused_by(RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError):
        return f"there is no such file or folder here and no such {kind} on the hub; if it is private, {LOGIN_HINT}"
    if caused_by(ConnectionError, LocalEntryNotFoundError):
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES:
            return "HF_HUB_OFFLINE forbids the hub, and no copy in the cache can be used: unset it, or give a folder"
        return "the hub cannot be reached, and no copy in the cache can be used: check the network, or give a folder"
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
            "there is no model.safetensors. minilm does not read pickled weights (pytorch_model.bin), because they can "
            "run code. If you trust the weights, convert them with save_pretrained of transformers"
        )
    if caused_by(UnicodeDecodeError) and kind == "dataset":
        return f"one of its files is not UTF-8 ({message})"
    if caused_by(json.JSONDecodeError, UnicodeDecodeError):
        return f"one of its files is not valid JSON, so copy or download it again ({message})"
    return (message if len(message) < 200 else message.split(". ")[0][:400]) or type(error).__name__


def _denied_file(error: BaseException) -> str | None:
    """Return the file that the error is about if this user may not read it, else None."""
    if not isinstance(error, OSError):
        return None
    # safetensors reports every file that it cannot open as missing.
    file = str(error.filename or str(error).removeprefix("No such file or directory: "))
    return file if os.path.exists(file) and not os.access(file, os.R_OK) else None
