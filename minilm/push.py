"""The result of a run on the Hugging Face hub: whether it may go there is asked first, and it goes there at the end.

The token and the address of the hub are those of every Hugging Face tool: HF_TOKEN or `hf auth login`, and HF_ENDPOINT.
"""

import glob
import logging
import re
import shlex
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from minilm.hub import LOG_IN, chain

log = logging.getLogger("minilm")

_RECORDS = ("README.md", "run.json", "log.jsonl", "all_results.json")  # of the files of a run, those besides the model


def check_access(repo: str, license: str | None) -> None:
    """Raise ValueError where the hub would not take a result as `repo`, as far as it tells. Nothing is created there.

    license: what the card will name, which the hub refuses if it does not know it.
    """
    if constants.is_offline_mode():
        raise ValueError("run.push_to_hub needs the hub, and HF_HUB_OFFLINE keeps from it: unset one of the two")
    with _refusing(repo):
        api = HfApi()
        owner = api.whoami()["name"]
        with suppress(RepositoryNotFoundError):  # claim_repo creates it
            api.auth_check(repo if "/" in repo else f"{owner}/{repo}", write=True)
    if license is not None:
        with _refusing(repo):
            ModelCard(f"---\nlicense: {license}\n---\n").validate()


def claim_repo(repo: str) -> None:
    """Create the repository where it is not there. Raises ValueError where that, or writing to it, is not allowed."""
    with _refusing(repo):
        api = HfApi()
        # For one that is there, create_repo is content with the right to read.
        api.auth_check(api.create_repo(repo, exist_ok=True).repo_id, write=True)


def push(repo: str, folder: Path, files: Sequence[str]) -> None:
    """Upload a finished run: the `files` of its model, by their names in `folder`, its card and records, nothing else.

    Where that fails, one warning says why, and the command that does it: the run is whole in `folder`.
    """
    left_out = _others(folder, {PurePath(name).parts[0] for name in (*files, *_RECORDS)})
    try:
        api = HfApi()
        url = api.create_repo(repo, exist_ok=True)  # whose name has the owner
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the hub's advice on cards
            api.upload_folder(
                repo_id=url.repo_id,
                folder_path=folder,
                ignore_patterns=list(left_out),
                commit_message="Upload a model trained with minilm",
            )
        log.info(f"published: {url}")
    except Exception as error:  # of libraries of HTTP and of storage
        excluded = "".join(f" --exclude {shlex.quote(pattern)}" for pattern in left_out)
        log.warning(
            f"run.push_to_hub {repo}: {_reason(error)}; the run is whole in {folder}, to upload it: "
            f"hf upload {repo} {shlex.quote(str(folder))} .{excluded}"
        )


def _others(folder: Path, ours: set[str]) -> list[str]:
    """Patterns of all that is in the folder besides `ours`: checkpoints, trackers' files, and files of other people."""
    found = {
        re.sub(r"^checkpoint-\d+$", "checkpoint-*", glob.escape(path.name)) + ("/*" if path.is_dir() else "")
        for path in folder.iterdir()
        if path.name not in ours
    }
    return sorted(found)


@contextmanager
def _refusing(repo: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of one of several libraries of HTTP
        raise ValueError(f"run.push_to_hub {repo}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why the hub did not do what it was asked for, in one line that says what to do."""
    causes = [*chain(error)]
    if any(isinstance(one, LocalTokenNotFoundError) for one in causes):
        return f"there is no token: {LOG_IN}"
    if any(isinstance(one, UnicodeEncodeError) for one in causes):  # of the header that it is sent in
        return f"the token is none that the hub has given: {LOG_IN}"
    status = next((one.response.status_code for one in causes if isinstance(one, HfHubHTTPError)), 0)
    if status == 401:
        return f"the hub does not know the token: {LOG_IN}"
    if status == 403:
        return "the token may not write there: give a repository of your own, or take a token with write access"
    if status >= 500:
        return f"the hub has an error of its own ({status}): try again later"
    said = " ".join(str(error).split())[:300]
    if status == 0 and any(isinstance(one, OSError) for one in causes):
        return f"the hub cannot be reached at {constants.ENDPOINT}: check the network"
    return said
