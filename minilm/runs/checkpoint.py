"""Checkpoints: a kill at any moment leaves the last one whole, and minilm checks each one before it uses it.

A checkpoint is a folder `checkpoint-<step>` in the output folder. It holds the model and its tokenizer as Hugging Face
saves them (it loads with `from_pretrained`), the state of the optimizer and of the loss scaling, the progress, the
configuration and the inputs of the run, and a manifest of sizes and SHA-256 sums. The weights and the state of the
optimizer of a large model are files in several parts (`minilm.runs.checkpoint_parts`). The run has no other state:
order, masks, learning rate and dropout follow from the configuration and the step.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilm.config import Run
from minilm.objectives.metrics import lower_is_better
from minilm.runs.checkpoint_parts import check_parts
from minilm.runs.ledger import EXAMPLES, LEDGER, find_evaluations, find_numbered, step_of
from minilm.utils.atomic_files import hash_file
from minilm.utils.validation import check

WEIGHTS = "model.safetensors"
ADAPTER = "adapter.safetensors"  # LoRA's matrices, which are merged into those weights
OPTIMIZER = "optimizer.safetensors"
STATE = "training.json"  # the other fields of `Checkpoint`
INDEX = "model.safetensors.index.json"  # the part that holds each weight, where the checkpoint has parts
MANIFEST = "manifest.json"  # the size and the SHA-256 sum of each file


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a run: all that it keeps besides its weights and moments."""

    step: int = 0
    """Updates made."""
    tokens: int = 0
    """Tokens without padding that all processes together trained on."""
    seconds: float = 0.0
    """Training time."""
    flops: float = 0.0
    """Model FLOPs."""
    log_bytes: int = 0
    """Length of log.jsonl."""
    figure: float | None = None
    """`run.best_metric` of the evaluation after this step; None if there was none or it was not finite."""
    best: float | None = None
    """The best `run.best_metric` of all evaluations so far."""
    best_step: int = 0
    """The step after which that evaluation took place; 0 if there was none."""
    stale: int = 0
    """The number of evaluations since then."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files match its manifest."""

    folder: Path
    progress: Progress
    config: dict[str, Any]
    """The configuration of the run that wrote it, in the form of `minilm.config.serialization.to_dict`."""
    inputs: dict[str, Any]
    """The result of `minilm.runs.run_inputs.collect_inputs` in the run that wrote it."""
    scaler: dict[str, Any]
    """The state of the loss scaling of fp16; empty in other precisions."""
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The result of `describe_optimizer`; empty in checkpoints of minilm 0.1, which did not store it."""
    windows: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The result of `minilm.data.stream_windows.StreamWindows.export_index`; empty without windows."""
    revisions: dict[str, str] = dataclasses.field(default_factory=dict)
    """The commit that the run reads of each source that is a dataset on the hub."""


def find_checkpoint(resume: str, folder: Path) -> Checkpoint:
    """Return the checkpoint that `run.resume` names: a path, or "latest" for the newest complete one in `folder`.

    Raises ValueError if there is none, or if it is damaged; the message then names the file.
    """
    if resume != "latest":
        path = Path(resume).expanduser().resolve()
    elif complete := find_complete_checkpoints(folder):
        path = complete[-1]
    else:
        raise ValueError(
            f"run.resume latest: there is no complete checkpoint in {folder}; leave run.resume out to start again"
        )
    try:
        return read_checkpoint(path)
    except ValueError as error:
        others = [other.name for other in find_complete_checkpoints(path.parent) if other != path]
        hint = f"; to resume from {' or '.join(others)}, give its path" if others else ""
        raise ValueError(f"{error}{hint}") from error


def is_checkpoint(folder: Path) -> bool:
    """Return whether the folder holds a checkpoint, complete or not."""
    return any((folder / name).exists() for name in (MANIFEST, STATE))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check the size and the hash of every file of the checkpoint against its manifest, then read its state.

    Raises ValueError that names the file that is missing, damaged or out of place. No code of a checkpoint is run.
    """
    try:
        check(folder.is_dir(), "there is no such folder; give the path of a checkpoint, or latest")
        manifest = _read_json(folder / MANIFEST)
        for name in (WEIGHTS, OPTIMIZER, STATE):
            check_parts(manifest, name)
        check(WEIGHTS in manifest or INDEX in manifest, f"{INDEX} is not in its {MANIFEST}")
        for name, facts in manifest.items():
            path = folder / name
            check(
                Path(name).name == name and path.is_file() and not path.is_symlink(),
                f"{name!r} is not a regular file in it",
            )
            check(hash_file(path) == facts, f"{name} is damaged: its size or hash is not the one in {MANIFEST}")
        # Checkpoints of minilm 0.1 do not hold these four, and their only inputs are the training examples.
        state = {"scaler": {}, "optimizer": {}, "windows": {}, "revisions": {}} | _read_json(folder / STATE)
        if "data" in state and "inputs" not in state:
            state["inputs"] = {"training examples": state.pop("data")}
        # Earlier versions stored the commits with the windows.
        if not state["revisions"] and isinstance(state["windows"], dict):
            state["revisions"] = state["windows"].get("revisions", {})
        whole = state.keys() == {field.name for field in dataclasses.fields(Checkpoint)} - {"folder"}
        whole = whole and all(isinstance(part, dict) for part in state.values())
        whole = whole and all(isinstance(commit, str) for commit in state["revisions"].values())
        check(whole, f"{STATE} does not hold the parts of a checkpoint's state")
        return Checkpoint(**state | {"folder": folder, "progress": _parse_progress(state["progress"])})
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a usable checkpoint: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint. Raise ValueError if it cannot be read."""
    check(os.path.lexists(path), f"there is no {path.name} in it")
    check(path.is_file() and not path.is_symlink(), f"{path.name} is not a regular file")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON") from error
    check(isinstance(tree, dict), f"{path.name} is not a JSON object")
    result: dict[str, Any] = tree
    return result


def _parse_progress(values: dict[str, Any]) -> Progress:
    """Return the progress. Raise ValueError if the fields or their types are wrong."""
    kinds = typing.get_type_hints(Progress)
    right = values.keys() == kinds.keys() and all(
        isinstance(values[name], kind) or (kind is float and isinstance(values[name], int))
        for name, kind in kinds.items()
    )
    check(right, f"{STATE} does not hold the progress of a run")
    return Progress(**values)


def is_branch(checkpoint: Checkpoint, output_dir: str | Path | None) -> bool:
    """Return whether a run in `output_dir` that resumes from the checkpoint is a branch of another run."""
    return output_dir is not None and Path(output_dir).resolve() != checkpoint.folder.parent.resolve()


def link_run(checkpoint: Checkpoint, folder: Path) -> None:
    """Fill `folder` as if its own run had written the checkpoint: link the checkpoint and the best one before it.

    It also links the evaluations in the ledger up to there, and copies the lines of the log. On another file system, it
    copies all files. Raises ValueError, and leaves no file, if the other run has removed the checkpoint in the
    meantime.
    """
    origin, progress = checkpoint.folder.parent, checkpoint.progress
    made = [folder / "log.jsonl"]
    try:
        for step in {progress.step, progress.best_step} - {0}:
            path, writing = origin / f"checkpoint-{step}", folder / f".checkpoint-{step}.writing"
            if step == progress.step or (path / MANIFEST).is_file():
                made += [writing, folder / path.name]
                shutil.copytree(path, writing, copy_function=_link_or_copy)
                os.rename(writing, folder / path.name)
        evaluations = [path for path in find_evaluations(origin) if step_of(path) <= progress.step]
        # The run removes what it must not take over of these.
        epochs = find_numbered(origin, "train")
        if evaluations or epochs:
            made.append(folder / LEDGER)
            made[-1].mkdir()
            for path in (*[origin / LEDGER / EXAMPLES] * bool(evaluations), *evaluations, *epochs):
                _link_or_copy(str(path), str(made[-1] / path.name))
        if (origin / "log.jsonl").is_file():
            with (origin / "log.jsonl").open("rb") as source:
                (folder / "log.jsonl").write_bytes(source.read(progress.log_bytes))
    except (OSError, shutil.Error) as error:
        for path in made:
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
        raise ValueError(
            f"{checkpoint.folder} cannot be linked ({' '.join(str(error).split())[:200]}): another run may have "
            "removed it in the meantime; take another one"
        ) from error


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of an earlier run and the leftovers of killed runs. Other folders stay."""
    for path in find_leftovers(folder):
        shutil.rmtree(path)
    for path in filter(is_checkpoint, _find_checkpoint_folders(folder)):
        _remove_checkpoint(path)


def find_name_conflicts(folder: Path, steps: int) -> list[Path]:
    """Return the paths that are named like a checkpoint of a step up to `steps` but are not checkpoints."""
    others = [path for path in sorted(folder.glob("checkpoint-*")) if not is_checkpoint(path)]
    return [path for path in others if _step_of(path).isdecimal() and int(_step_of(path)) <= steps]


def find_leftovers(folder: Path) -> list[Path]:
    """Return the folders that a killed run left: checkpoints half written or half removed, and models half saved."""
    named = re.compile(r"\.checkpoint-\d+(\.part-\d+)?\.(writing|replaced|discarded)|\.(export|probe)-\w+")
    return [path for path in folder.iterdir() if named.fullmatch(path.name) and path.is_dir()]


def _find_checkpoint_folders(folder: Path) -> list[Path]:
    """Return the folders named checkpoint-<step>, in the order of their steps."""
    if not folder.is_dir():
        return []
    steps = {_step_of(path): path for path in folder.glob("checkpoint-*") if path.is_dir()}
    return [steps[step] for step in sorted((s for s in steps if s.isdecimal()), key=int)]


def _step_of(path: Path) -> str:
    return path.name.removeprefix("checkpoint-")


def find_complete_checkpoints(folder: Path) -> list[Path]:
    """Return the folders of checkpoints that were written completely, in the order of their steps."""
    return [path for path in _find_checkpoint_folders(folder) if (path / MANIFEST).is_file()]


def remove_old_checkpoints(folder: Path, step: int, run: Run) -> None:
    """Remove the checkpoints that the run does not keep, now that the checkpoint of `step` is saved.

    It keeps the newest `run.keep_last` and the best. Checkpoints of later steps go as well. They exist if a run was
    resumed from an earlier checkpoint.
    """
    complete = find_complete_checkpoints(folder)
    ahead = [path for path in complete if int(_step_of(path)) > step]
    complete = complete[: len(complete) - len(ahead)]
    figures: dict[Path, float] = {}
    for path in complete:
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
            figure = _parse_progress(_read_json(path / STATE)["progress"]).figure
            if figure is not None and math.isfinite(figure):
                figures[path] = figure if lower_is_better(run.best_metric) else -figure
    best = min(figures, key=lambda path: figures[path], default=None)
    for path in (*complete[: -run.keep_last], *ahead):
        if path != best:
            _remove_checkpoint(path)


def _remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint. Raise OSError if it is a symbolic link or cannot be removed."""
    if path.is_symlink():
        raise OSError(f"{path.name} is a symbolic link")
    discarded = path.with_name(f".{path.name}.discarded")
    shutil.rmtree(discarded, ignore_errors=True)
    # The folder is renamed first, so that a folder that is half removed does not look like a checkpoint.
    os.rename(path, discarded)
    shutil.rmtree(discarded)
