"""The output folder: claimed before any work is done, and filled so that a kill leaves no half-written file."""

import os
import shutil
import tempfile
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilm.model import quiet_transformers


def claim_output_dir(asked: str | None, overwrite: bool, name: str) -> Path:
    """Create and return the output folder: `asked`, or the first of out/NAME, out/NAME-2, … that is not there or empty.

    Raises ValueError when the folder cannot be written, or is not empty and `overwrite` is not set. Nothing in it is
    touched.
    """
    if asked is None:
        folder, number = Path("out", name), 1
        while folder.exists() and any(folder.iterdir()):
            number += 1
            folder = Path("out", f"{name}-{number}")
    else:
        folder = Path(asked).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not overwrite:
            raise ValueError(f"run.output_dir {folder} is not empty: choose another one, or pass --run.overwrite")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"run.output_dir {folder} cannot be written: {error.strerror or error}") from error
    return folder


def export(
    accelerator: Accelerator,
    model: nn.Module,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Save in the Hugging Face format; called on every process, and done by the main one.

    `model` is the prepared wrapper around `network`. The files are written and synced in a temporary folder inside
    `folder`, then renamed into place, the weights last: each file is whole at any time.
    """
    prefix = "model."
    state = {name.removeprefix(prefix): tensor for name, tensor in accelerator.get_state_dict(model).items()}
    if not accelerator.is_main_process:
        return
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".export-"))
    try:
        with quiet_transformers():
            network.save_pretrained(temporary, state_dict=state)
            tokenizer.save_pretrained(temporary)
        new = [path for path in temporary.rglob("*") if path.is_file()]
        for path in sorted(new, key=lambda path: (path.suffix == ".safetensors", path.name)):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            os.chmod(path, 0o644)
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
