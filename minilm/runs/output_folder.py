"""The output folder: minilm chooses it before any work, and fills it so that a kill leaves no half-written file."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers import PreTrainedModel

from minilm.config import Run
from minilm.runs.checkpoint import (
    Checkpoint,
    find_checkpoint,
    find_name_conflicts,
    is_branch,
    is_checkpoint,
    link_run,
    remove_checkpoints,
)
from minilm.runs.hub_upload import check_hub_access, create_hub_repo
from minilm.runs.ledger import LEDGER
from minilm.utils.folder_lock import LOCK, lock_folder

AVERAGES = "ema"
"""The subfolder of the output folder for the averages of the weights."""


def choose_output_dir(run: Run, name: str) -> tuple[Path, Checkpoint | None]:
    """Return the output folder, and the checkpoint to resume from if `run.resume` asks for one.

    A new run gets `run.output_dir`, or the first of out/NAME, out/NAME-2, … that does not exist or is empty. With
    `run.overwrite` that is always out/NAME. A resumed run gets the folder of its checkpoint. For `latest` without
    `run.output_dir`, its checkpoint is the newest one in out/NAME, out/NAME-2, … If the checkpoint is not in
    `run.output_dir`, the run is a branch: it gets `run.output_dir`, which must be new or empty.

    The function creates and changes nothing, but it locks a folder that exists (`minilm.utils.folder_lock`), so call it
    inside `unlock_at_end`. Raises ValueError if the folder cannot be written, if it is not empty and neither
    `run.resume` nor `run.overwrite` is set, if another run uses it, if there is no checkpoint, or if the hub would
    refuse `run.push_to_hub`.
    """
    if run.resume is not None:
        folder, checkpoint = _find_resumed_run(run.resume, run.output_dir, name)
    else:
        folder, checkpoint = _choose_new(run.output_dir, name, overwrite=run.overwrite), None
    with explain_unwritable_folder(folder):
        # The run replaces all other files, but it appends to this one.
        if (folder / "log.jsonl").is_symlink():
            raise ValueError(f"{folder / 'log.jsonl'} is a symbolic link: remove it, or choose another run.output_dir")
        with tempfile.TemporaryFile(dir=_nearest_existing(folder)):  # fails if the folder could not be created
            pass
        if checkpoint is None and not run.overwrite and not is_free(folder):
            raise ValueError(
                f"run.output_dir {folder} is not empty: choose another one, or pass --run.overwrite, or "
                "--run.resume latest to continue the run in it"
            )
        if checkpoint is not None and is_branch(checkpoint, folder) and not is_free(folder):
            raise ValueError(
                f"run.output_dir {folder} is not empty, and {run.resume} is a checkpoint of another run: give a new "
                "folder for a branch, or leave run.output_dir out to resume that run"
            )
    _lock(folder)
    if run.push_to_hub is not None:
        check_hub_access(run.push_to_hub, run.license)
    return folder, checkpoint


def claim_output_dir(
    folder: Path,
    run: Run,
    network: PreTrainedModel,
    steps: int = 0,
    checkpoint: Checkpoint | None = None,
    *,
    averages: bool = False,
) -> None:
    """Create the output folder, and the repository `run.push_to_hub` on the hub. Call it after all other checks.

    `run.overwrite` removes the checkpoints of an earlier run. If `checkpoint` belongs to another run, the folder gets
    hard links to its files and a copy of that run's log up to there. averages: whether the run keeps averages of the
    weights. Raises ValueError, and leaves the folder as it is,

    - if the disk has no room for a checkpoint and the model;
    - if a path that minilm did not write has the name of a checkpoint of one of the `steps`, or of the ledger;
    - if the hub refuses the repository;
    - if another run has taken the folder in the meantime.
    """
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    # A checkpoint (weights, two moments) and the model; both also hold the averages.
    needed = ((4 if run.save_every else 1) + averages * (2 if run.save_every else 1)) * weights
    with explain_unwritable_folder(folder):
        free = shutil.disk_usage(_nearest_existing(folder)).free
        if free < needed:
            raise ValueError(
                f"run.output_dir {folder} has {free / 1e6:,.1f} MB free and the run needs {needed / 1e6:,.1f} MB: "
                "delete files there, or choose another run.output_dir"
            )
        obstacles = find_name_conflicts(folder, steps) if run.save_every else []
        ledger = folder / LEDGER
        if ledger.is_symlink() or (ledger.exists() and not ledger.is_dir()):
            raise ValueError(
                f"run.output_dir {folder} holds {LEDGER}, which is not a folder of minilm: move it away, or choose "
                "another run.output_dir"
            )
        if obstacles:
            raise ValueError(
                f"run.output_dir {folder} holds {obstacles[0].name}, which minilm did not write and which has the name "
                "of a checkpoint: move it away, or choose another run.output_dir"
            )
    if run.push_to_hub is not None:
        create_hub_repo(run.push_to_hub)
    with explain_unwritable_folder(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
        if run.overwrite:
            remove_checkpoints(folder)
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (folder / "adapter" / name).unlink(missing_ok=True)
            _remove_averages(folder)
        elif run.resume is None:
            _take_empty(folder)
        elif checkpoint is not None and is_branch(checkpoint, folder):
            _take_empty(folder)
            link_run(checkpoint, folder)


def _remove_averages(folder: Path) -> None:
    """Remove the averaged model of an earlier run in this folder, if its run.json says that it kept one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"]
        if settings["optim"]["ema"] is not None:
            for name in ("config.json", "model.safetensors"):
                (folder / AVERAGES / name).unlink(missing_ok=True)
            shutil.rmtree(folder / AVERAGES / "adapter", ignore_errors=True)


def _take_empty(folder: Path) -> None:
    """Create the log in an empty folder. If several runs find it empty, only one can, and the others get ValueError."""
    with suppress(FileExistsError):
        if is_free(folder):
            (folder / "log.jsonl").touch(exist_ok=False)
            return
    raise ValueError(
        f"another run has taken run.output_dir {folder} in the meantime: give another --run.output-dir, or leave it "
        "out and start again, so that minilm finds a free name"
    )


def is_free(folder: Path) -> bool:
    """Return whether the folder does not exist or is empty, except for the lock file of a killed run."""
    return not folder.exists() or all(path.name == LOCK for path in folder.iterdir())


def _nearest_existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))


@contextmanager
def explain_unwritable_folder(folder: Path) -> Iterator[None]:
    """Turn an OSError into a ValueError that names run.output_dir."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"run.output_dir {folder} cannot be written: {error.strerror or error}") from error


def _choose_new(output_dir: str | None, name: str, *, overwrite: bool) -> Path:
    """Return the output folder of a new run."""
    if output_dir is not None:
        return Path(output_dir).expanduser()
    folder, number = Path("out", name), 1
    while not overwrite and not is_free(folder):
        number += 1
        folder = Path("out", f"{name}-{number}")
    return folder


def _find_newest_run(name: str) -> Path:
    """Return the folder with the newest checkpoint among out/NAME, out/NAME-2, …"""
    first, others = Path("out", name), Path("out").glob(f"{name}-*")
    folders = [first, *(path for path in others if path.name.removeprefix(f"{name}-").isdecimal())]
    manifests = [path for folder in folders for path in folder.glob("checkpoint-*/manifest.json")]
    return max(manifests, key=lambda path: path.stat().st_mtime_ns).parent.parent if manifests else first


def _find_resumed_run(resume: str, output_dir: str | None, name: str) -> tuple[Path, Checkpoint]:
    """Return the folder of the checkpoint and the checkpoint.

    The folder is locked first, since another run that uses it may remove the checkpoint during the read.
    """
    if resume == "latest":
        folder = Path(output_dir).expanduser() if output_dir is not None else _find_newest_run(name)
        _lock(folder)
        return folder, find_checkpoint(resume, folder)
    path = Path(resume).expanduser().resolve()
    if output_dir is not None and Path(output_dir).expanduser().resolve() != path.parent:
        # The other run may be training, and several branches may begin at once, so its folder is not locked.
        return Path(output_dir).expanduser(), find_checkpoint(resume, Path())
    if is_checkpoint(path):
        _lock(path.parent)
    return path.parent, find_checkpoint(resume, Path())


def _lock(folder: Path) -> None:
    """Lock the folder if it exists."""
    with explain_unwritable_folder(folder):
        if folder.is_dir():
            lock_folder(folder)
