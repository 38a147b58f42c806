"""Publishing on the Hugging Face hub: minilm checks the access before a run, and uploads the result after it.

The token comes from HF_TOKEN or `hf auth login` and the address from HF_ENDPOINT, as in every Hugging Face tool.
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

from minilm.utils.errors import iterate_causes
from minilm.utils.hub import LOGIN_HINT

log = logging.getLogger("minilm")

_RECORDS = ("README.md", "run.json", "log.jsonl", "all_results.json")  # published in addition to the model


def check_hub_access(repo: str, license: str | None) -> None:
    """Raise ValueError if the hub would not let this user upload to `repo`, as far as it says so in advance.

    Creates nothing on the hub. license: the license that the card will name. The hub refuses a license that it does not
    know.
    """
    if constants.is_offline_mode():
        raise ValueError("run.push_to_hub needs the hub, but HF_HUB_OFFLINE is set: leave one of the two out")
    with _explain_refusal(repo):
        api = HfApi()
        owner = api.whoami()["name"]
        with suppress(RepositoryNotFoundError):  # create_hub_repo creates it
            api.auth_check(repo if "/" in repo else f"{owner}/{repo}", write=True)
    if license is not None:
        with _explain_refusal(repo):
            ModelCard(f"---\nlicense: {license}\n---\n").validate()


def create_hub_repo(repo: str) -> None:
    """Create the repository if it does not exist. Raise ValueError if the user may not create it or write to it."""
    with _explain_refusal(repo):
        api = HfApi()
        # Where the repository exists, create_repo succeeds with read access, so the write access is checked separately.
        api.auth_check(api.create_repo(repo, exist_ok=True).repo_id, write=True)


def upload_run(repo: str, folder: Path, files: Sequence[str]) -> None:
    """Upload a finished run: the `files` of its model, named relative to `folder`, its card and its records.

    If that fails, one warning says why and shows the command that uploads the run, which is complete in `folder`.
    """
    left_out = _patterns_of_others(folder, {PurePath(name).parts[0] for name in (*files, *_RECORDS)})
    try:
        api = HfApi()
        url = api.create_repo(repo, exist_ok=True)  # its repo_id includes the owner
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the hub's advice on cards
            api.upload_folder(
                repo_id=url.repo_id,
                folder_path=folder,
                ignore_patterns=list(left_out),
                commit_message="Upload a model trained with minilm",
            )
        log.info(f"published: {url}")
    except Exception as error:  # several libraries for HTTP and storage raise here
        excluded = "".join(f" --exclude {shlex.quote(pattern)}" for pattern in left_out)
        log.warning(
            f"run.push_to_hub {repo}: {_reason(error)}; the run is complete in {folder}. To upload it: "
            f"hf upload {repo} {shlex.quote(str(folder))} .{excluded}"
        )


def _patterns_of_others(folder: Path, ours: set[str]) -> list[str]:
    """Return patterns for everything in the folder except `ours`: checkpoints, trackers' files, and other files."""
    patterns = {
        re.sub(r"^checkpoint-\d+$", "checkpoint-*", glob.escape(path.name)) + ("/*" if path.is_dir() else "")
        for path in folder.iterdir()
        if path.name not in ours
    }
    return sorted(patterns)


@contextmanager
def _explain_refusal(repo: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # several libraries for HTTP raise here
        raise ValueError(f"run.push_to_hub {repo}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return one line that says why a request to the hub failed, and what to do."""
    causes = [*iterate_causes(error)]
    if any(isinstance(one, LocalTokenNotFoundError) for one in causes):
        return f"there is no token: {LOGIN_HINT}"
    if any(isinstance(one, UnicodeEncodeError) for one in causes):  # raised for the header that holds the token
        return f"the token is not a valid token of the hub: {LOGIN_HINT}"
    status = next((one.response.status_code for one in causes if isinstance(one, HfHubHTTPError)), 0)
    if status == 401:
        return f"the hub does not know the token: {LOGIN_HINT}"
    if status == 403:
        return "the token may not write there: give a repository of yours, or use a token with write access"
    if status >= 500:
        return f"the hub answered with error {status}: try again later"
    message = " ".join(str(error).split())[:300]
    if status == 0 and any(isinstance(one, OSError) for one in causes):
        return f"the hub cannot be reached at {constants.ENDPOINT}: check the network"
    return message
