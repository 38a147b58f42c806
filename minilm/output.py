"""The output folder: chosen before any work is done, and filled so that a kill leaves no half-written file."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilm.checkpoint import (
    Checkpoint,
    discard_checkpoints,
    find_checkpoint,
    find_obstacles,
    is_checkpoint,
    save_tokenizer,
)
from minilm.config import Run
from minilm.disk import replacing_files, sync
from minilm.hub import quiet_transformers
from minilm.lock import LOCK, lock_folder
from minilm.lora import is_adapted, merged, save_adapter
from minilm.push import check_access, claim_repo
from minilm.zero import size_of


def choose_output_dir(run: Run, name: str) -> tuple[Path, Checkpoint | None]:
    """The output folder, and the checkpoint to go on from if that was asked for. Nothing is created or changed.

    A new run gets `run.output_dir`, or the first of out/NAME, out/NAME-2, … that is not there or empty. A resumed one
    gets the folder of its checkpoint: for `latest` without `run.output_dir`, of the newest in these folders. A folder
    that is there is locked (`minilm.lock`): call this inside `unlocked_at_end`. Raises
    ValueError when the folder cannot be written, when it is not empty and neither `resume` nor `overwrite` is set,
    when another run is in it, when there is no checkpoint, or when the hub would not take `run.push_to_hub`.
    """
    if run.resume is not None:
        folder, checkpoint = _resumed(run.resume, run.output_dir, name)
    else:
        folder, checkpoint = _new(run.output_dir, name, overwrite=run.overwrite), None
    with refuse_unwritable(folder):
        if (folder / "log.jsonl").is_symlink():  # all other files are replaced, this one is written to
            raise ValueError(f"{folder / 'log.jsonl'} is a symbolic link: remove it, or choose another run.output_dir")
        with tempfile.TemporaryFile(dir=_nearest(folder)):  # fails where the folder could not be created
            pass
        if checkpoint is None and not run.overwrite and not is_free(folder):
            raise ValueError(
                f"run.output_dir {folder} is not empty: choose another one, or pass --run.overwrite, or "
                "--run.resume latest to go on with the run in it"
            )
    _lock(folder)
    if run.push_to_hub is not None:
        check_access(run.push_to_hub, run.license)
    return folder, checkpoint


def claim_output_dir(folder: Path, run: Run, network: PreTrainedModel, steps: int = 0) -> None:
    """Create the folder, once all else was checked, and `run.push_to_hub` on the hub.

    `run.overwrite` removes the checkpoints of an earlier run. Raises ValueError, and leaves the folder as it is, where
    there is no room for a checkpoint and the model, what is not minilm's has the name of a checkpoint of one of these
    `steps`, the hub refuses the repository, or another run has taken the folder since it was chosen.
    """
    weights = sum(size_of(p) * p.element_size() for p in network.parameters())
    needed = (4 if run.save_every else 1) * weights  # a checkpoint holds two moments besides
    with refuse_unwritable(folder):
        free = shutil.disk_usage(_nearest(folder)).free
        if free < needed:
            raise ValueError(
                f"run.output_dir {folder} has {free / 1e6:,.1f} MB free and the run needs {needed / 1e6:,.1f} MB: free "
                "some or choose another one"
            )
        if run.save_every and (others := find_obstacles(folder, steps)):
            raise ValueError(
                f"run.output_dir {folder} holds {others[0].name}, which is not of minilm and where a checkpoint would "
                "be: move it away, or choose another one"
            )
    if run.push_to_hub is not None:
        claim_repo(run.push_to_hub)
    with refuse_unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
        if run.overwrite:
            discard_checkpoints(folder)
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (folder / "adapter" / name).unlink(missing_ok=True)
        elif run.resume is None:
            _take(folder)


def _take(folder: Path) -> None:
    """Take an empty folder. Of several runs that find it empty one alone can create its log."""
    with suppress(FileExistsError):
        if is_free(folder):
            (folder / "log.jsonl").touch(exist_ok=False)
            return
    raise ValueError(
        f"another run has taken run.output_dir {folder} meanwhile: give another --run.output-dir, or none, for which a "
        "new start finds a free name"
    )


def is_free(folder: Path) -> bool:
    """Whether nothing is there but what a killed run may have left of its lock."""
    return not folder.exists() or all(path.name == LOCK for path in folder.iterdir())


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))


@contextmanager
def refuse_unwritable(folder: Path) -> Iterator[None]:
    """Inside it an OSError becomes a ValueError that names run.output_dir."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"run.output_dir {folder} cannot be written: {error.strerror or error}") from error


def _new(asked: str | None, name: str, *, overwrite: bool) -> Path:
    if asked is not None:
        return Path(asked).expanduser()
    folder, number = Path("out", name), 1
    while not overwrite and not is_free(folder):
        number += 1
        folder = Path("out", f"{name}-{number}")
    return folder


def _newest(name: str) -> Path:
    """Of out/NAME, out/NAME-2, … the folder with the checkpoint that was written last."""
    first, others = Path("out", name), Path("out").glob(f"{name}-*")
    folders = [first, *(path for path in others if path.name.removeprefix(f"{name}-").isdecimal())]
    manifests = [path for folder in folders for path in folder.glob("checkpoint-*/manifest.json")]
    return max(manifests, key=lambda path: path.stat().st_mtime_ns).parent.parent if manifests else first


def _resumed(resume: str, asked: str | None, name: str) -> tuple[Path, Checkpoint]:
    """The folder of the checkpoint, locked before the checkpoint is read: a run that is in it may remove it."""
    if resume == "latest":
        folder = Path(asked).expanduser() if asked is not None else _newest(name)
        _lock(folder)
        return folder, find_checkpoint(resume, folder)
    path = Path(resume).expanduser().resolve()
    if asked is not None and Path(asked).expanduser().resolve() != path.parent:
        raise ValueError(
            f"run.output_dir {asked} is not the folder of {resume}; leave it out to go on in {path.parent}"
        )
    if is_checkpoint(path):
        _lock(path.parent)
    return path.parent, find_checkpoint(resume, Path())


def _lock(folder: Path) -> None:
    """Lock the folder where it is there."""
    with refuse_unwritable(folder):
        if folder.is_dir():
            lock_folder(folder)


def export(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: dict[str, Tensor] | None = None
) -> list[str]:
    """Save in the Hugging Face format, and return the names of the files in `folder`.

    `weights` takes the place of `network.state_dict()`. An adapter of LoRA is merged into the weights, and saved by
    itself besides, in `adapter/`. The files are written and synced in a temporary folder inside `folder`, then renamed
    into place, the weights last: each file is whole at any time.
    """
    weights = network.state_dict() if weights is None else weights
    with replacing_files(folder, last=".safetensors") as temporary:
        with quiet_transformers():
            network.save_pretrained(temporary, state_dict=merged(network, weights))
            save_tokenizer(tokenizer, temporary)
        if is_adapted(network):
            save_adapter(network, weights, temporary / "adapter")
        names = [str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file()]
    if "chat_template.jinja" not in names:  # those of an earlier model would go before this one's
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    sync(folder)
    return names
