"""Checkpoints: a kill at any moment leaves the last one whole, and minilm checks each one before it uses it.

A checkpoint is a folder `checkpoint-<step>` in the output folder. It holds the model and its tokenizer as Hugging Face
saves them (it loads with `from_pretrained`), the state of the optimizer, the progress of the run, and a manifest of
sizes and SHA-256 sums. There is no other state: order, masks, learning rate and dropout follow from the configuration
and the step.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import shutil
import threading
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import Config, Run, lower_is_better
from minilm.config.parsing import to_dict
from minilm.distributed.deepspeed import ZeroOptimizer
from minilm.distributed.sharding import whole
from minilm.models.lora import adapter_weights, is_adapted, merged
from minilm.optim.optimizer import unwrapped
from minilm.utils.atomic_files import file_facts, replacing
from minilm.utils.hub import quiet_transformers

log = logging.getLogger("minilm")

RESULTS = "all_results.json"  # exists once the run is finished
WEIGHTS = "model.safetensors"
ADAPTER = "adapter.safetensors"  # LoRA's matrices, which are merged into those weights
_MANIFEST, _STATE, OPTIMIZER = "manifest.json", "training.json", "optimizer.safetensors"


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
    """`run.best_metric` of the evaluation after this step; None where there was none or it was not finite."""
    best: float | None = None
    """The best `run.best_metric` of all evaluations so far."""
    best_step: int = 0
    """The step after which that evaluation took place; 0 where there was none."""
    stale: int = 0
    """The number of evaluations since then."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files match its manifest."""

    folder: Path
    progress: Progress
    config: dict[str, Any]
    """The configuration of the run that wrote it, in the form of `minilm.config.parsing.to_dict`."""
    inputs: dict[str, Any]
    """The result of `minilm.runs.run_inputs.collect_inputs` in the run that wrote it."""
    scaler: dict[str, Any]
    """The state of the loss scaling of fp16; empty in other precisions."""
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The result of `describe_optimizer`; empty in checkpoints of minilm 0.1, which did not store it."""


class Saver:
    """The writer of a run's checkpoints: the run waits for a copy in memory, and a thread writes the copy to disk.

    The thread writes at most one checkpoint at a time. When that one is complete, it removes older ones, except the
    newest `run.keep_last` and the best by `run.best_metric`. Only one process of a job writes (`enabled`). After a
    write that failed, the next call raises OSError; older checkpoints are then untouched.
    """

    def __init__(
        self,
        folder: Path,
        network: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        tokenizer: PreTrainedTokenizerBase,
        config: Config,
        inputs: dict[str, Any],
        *,
        enabled: bool,
    ) -> None:
        self.folder, self.network, self.optimizer, self.tokenizer = folder, network, optimizer, tokenizer
        self.config, self.inputs = config, inputs
        self.enabled = enabled and config.run.save_every > 0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        if self.enabled:
            for leftover in _leftovers(folder):
                shutil.rmtree(leftover, ignore_errors=True)

    def due(self, step: int, *, last: bool, better: bool) -> bool:
        """Return whether to save after this step.

        That is true every `run.save_every` steps, at the end of the run (`last`), and with `run.load_best` after an
        evaluation that was the best so far (`better`).
        """
        run = self.config.run
        return run.save_every > 0 and (last or step % run.save_every == 0 or (better and run.load_best))

    def save(self, progress: Progress) -> None:
        """Begin to write `checkpoint-<step>`; return once the state is copied. Every process of the job calls it."""
        self.wait()
        # The weights come first: state_dict has FSDP restore the shards that the optimizer refers to.
        weights = copy_to_cpu(self.network.state_dict(keep_vars=True), keep=self.enabled)
        moments = copy_to_cpu(_moments(self.optimizer, self.network), keep=self.enabled)
        if not self.enabled:
            return
        scaler = getattr(self.optimizer, "scaler", None)  # accelerate's wrapper has one under fp16
        state = {
            "progress": dataclasses.asdict(progress),
            "config": to_dict(self.config),
            "inputs": self.inputs,
            "scaler": {} if scaler is None else scaler.state_dict(),
            "optimizer": describe_optimizer(self.optimizer),
        }
        arguments = (progress.step, state, weights, moments)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint is on disk; raise OSError where it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def explain_resume(self) -> str:
        """Wait until the checkpoint is on disk, and return a sentence that says how to resume the run."""
        with contextlib.suppress(OSError):
            self.wait()
        complete = _complete(self.folder)
        return f"--run.resume latest goes on from {complete[-1].name}" if complete else "no checkpoint was saved"

    def _write(self, step: int, state: dict[str, Any], weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        target = self.folder / f"checkpoint-{step}"
        try:
            with replacing(target) as temporary:
                with quiet_transformers():
                    # `resume` needs the names of the model in memory. The original format may have other names.
                    whole = merged(self.network, weights)
                    self.network.save_pretrained(temporary, state_dict=whole, save_original_format=False)
                    save_tokenizer(self.tokenizer, temporary)
                save_file(moments, temporary / OPTIMIZER)
                if is_adapted(self.network):
                    save_file(adapter_weights(self.network, weights), temporary / ADAPTER)
                (temporary / _STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
                files = {path.name: file_facts(path) for path in sorted(temporary.iterdir())}
                (temporary / _MANIFEST).write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")
        except Exception as error:  # wait() raises it again in the thread that trains
            reason = getattr(error, "strerror", None) or error
            self._error = OSError(f"{target} could not be written: {reason}; older checkpoints are untouched")
            return
        try:
            _rotate(self.folder, step, self.config.run)
        except OSError as error:
            log.warning(f"{target} is saved, but an older checkpoint could not be removed: {error}")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the tokenizer in the Hugging Face format, without subfolders.

    Several chat templates go into tokenizer_config.json. transformers would write them into a folder.
    """
    several = isinstance(tokenizer.chat_template, dict)
    tokenizer.save_pretrained(folder, save_jinja_files=not several)


def find_checkpoint(resume: str, folder: Path) -> Checkpoint:
    """Return the checkpoint that `run.resume` names: a path, or "latest" for the newest complete one in `folder`.

    Raises ValueError where there is none, or where it is damaged; the message then names the file.
    """
    if resume != "latest":
        path = Path(resume).expanduser().resolve()
    elif complete := _complete(folder):
        path = complete[-1]
    else:
        raise ValueError(
            f"run.resume latest: there is no complete checkpoint in {folder}; leave run.resume out to start anew"
        )
    try:
        return read_checkpoint(path)
    except ValueError as error:
        others = [other.name for other in _complete(path.parent) if other != path]
        hint = f"; to resume from {' or '.join(others)}, give its path" if others else ""
        raise ValueError(f"{error}{hint}") from error


def is_checkpoint(folder: Path) -> bool:
    """Return whether the folder holds a checkpoint, complete or not."""
    return any((folder / name).exists() for name in (_MANIFEST, _STATE))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check every file of the checkpoint against its manifest, then read its state.

    Raises ValueError that names the file that is missing, damaged or out of place. Nothing in a checkpoint is executed.
    """
    try:
        _require(folder.is_dir(), "there is no such folder; give the path of a checkpoint, or latest")
        manifest = _read_json(folder / _MANIFEST)
        for name in (WEIGHTS, OPTIMIZER, _STATE):
            _require(name in manifest, f"{name} is not in its {_MANIFEST}")
        for name, facts in manifest.items():
            path = folder / name
            _require(
                Path(name).name == name and path.is_file() and not path.is_symlink(),
                f"{name!r} is not a regular file in it",
            )
            _require(file_facts(path) == facts, f"{name} is not what its {_MANIFEST} says: it is damaged")
        # Checkpoints of minilm 0.1 lack these two, and have the training examples alone in place of all inputs.
        state = {"scaler": {}, "optimizer": {}} | _read_json(folder / _STATE)
        if "data" in state and "inputs" not in state:
            state["inputs"] = {"training examples": state.pop("data")}
        whole = state.keys() == {"progress", "config", "inputs", "scaler", "optimizer"}
        whole = whole and all(isinstance(part, dict) for part in state.values())
        _require(whole, f"{_STATE} does not hold the parts of a checkpoint's state")
        return Checkpoint(**state | {"folder": folder, "progress": _progress(state["progress"])})
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a usable checkpoint: {error}") from error


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _read_json(path: Path) -> dict[str, Any]:
    _require(os.path.lexists(path), f"there is no {path.name} in it")
    _require(path.is_file() and not path.is_symlink(), f"{path.name} is not a regular file")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON") from error
    _require(isinstance(tree, dict), f"{path.name} is not a JSON object")
    result: dict[str, Any] = tree
    return result


def _progress(values: dict[str, Any]) -> Progress:
    kinds = typing.get_type_hints(Progress)
    right = values.keys() == kinds.keys() and all(
        isinstance(values[name], kind) or (kind is float and isinstance(values[name], int))
        for name, kind in kinds.items()
    )
    _require(right, f"{_STATE} does not hold the progress of a run")
    return Progress(**values)


def parameter_names(network: PreTrainedModel) -> dict[Tensor, str]:
    """Return the name under which a checkpoint keeps each parameter's moments; a tied parameter has a single name."""
    return {parameter: name for name, parameter in network.named_parameters()}


# Settings of torch's optimizers that add to the state of each parameter.
_STATE_SETTINGS = ("momentum", "amsgrad", "centered")


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return facts that identify the kind of state that the optimizer keeps, as JSON types.

    `name` is the name of its class with the settings that add to its state: "SGD with momentum". `numbers` names the
    parts of a parameter's state that are plain numbers rather than tensors, such as the step of some optimizers.
    """
    # DeepSpeed's AdamW keeps the same state as torch's.
    if isinstance(optimizer, ZeroOptimizer):
        return {"name": "AdamW", "numbers": []}
    group = optimizer.param_groups[0]
    settings = [name for name in _STATE_SETTINGS if group.get(name)]
    numbers = {slot for slots in optimizer.state.values() for slot, value in slots.items() if _is_number(value)}
    name = type(unwrapped(optimizer)).__name__ + (f" with {' and '.join(settings)}" if settings else "")
    return {"name": name, "numbers": sorted(numbers)}


def is_stateless(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer keeps no state, as SGD without momentum does."""
    return bool(describe_optimizer(optimizer)["name"] == "SGD")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _moments(optimizer: torch.optim.Optimizer, network: PreTrainedModel) -> dict[str, Tensor]:
    """Return the optimizer's state by `<slot>/<name of the parameter>`, with its plain numbers as tensors.

    None is left out: SGD without momentum keeps it in place of a buffer.
    """
    names = parameter_names(network)
    return {
        f"{slot}/{names[parameter]}": torch.tensor(value, dtype=torch.float64) if _is_number(value) else value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
        if value is not None
    }


def copy_to_cpu(tensors: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return a copy of each tensor on the CPU where `keep`, else nothing.

    Every process calls this, since each may hold a shard of the tensors. Tied weights, which are one tensor under two
    names, stay one.
    """
    copies = {}
    for tensor in {id(tensor): tensor for tensor in tensors.values()}.values():
        gathered = whole(tensor)
        if keep:
            copies[id(tensor)] = gathered.detach().to("cpu", copy=True)
    return {name: copies[id(tensor)] for name, tensor in tensors.items()} if keep else {}


def discard_checkpoints(folder: Path) -> None:
    """Remove an earlier run's checkpoints and the leftovers of killed runs; the folders of other programs stay."""
    for path in _leftovers(folder):
        shutil.rmtree(path)
    for path in filter(is_checkpoint, _checkpoints(folder)):
        _discard(path)


def find_obstacles(folder: Path, steps: int) -> list[Path]:
    """Return the paths that are named like a checkpoint of one of these steps but are not checkpoints."""
    others = [path for path in sorted(folder.glob("checkpoint-*")) if not is_checkpoint(path)]
    return [path for path in others if _step(path).isdecimal() and int(_step(path)) <= steps]


def _leftovers(folder: Path) -> list[Path]:
    """Return folders that a killed run left: checkpoints half written or half removed, and a model half saved."""
    named = re.compile(r"\.checkpoint-\d+\.(writing|replaced|discarded)|\.export-\w+")
    return [path for path in folder.iterdir() if named.fullmatch(path.name) and path.is_dir()]


def _checkpoints(folder: Path) -> list[Path]:
    """Return the folders named checkpoint-<step>, in the order of their steps."""
    if not folder.is_dir():
        return []
    steps = {_step(path): path for path in folder.glob("checkpoint-*") if path.is_dir()}
    return [steps[step] for step in sorted((s for s in steps if s.isdecimal()), key=int)]


def _step(path: Path) -> str:
    return path.name.removeprefix("checkpoint-")


def _complete(folder: Path) -> list[Path]:
    """Return the checkpoint folders that were written to the end, in the order of their steps."""
    return [path for path in _checkpoints(folder) if (path / _MANIFEST).is_file()]


def _rotate(folder: Path, step: int, run: Run) -> None:
    """Remove the checkpoints that the run does not keep now that `step` is saved.

    These are old ones, and those of later steps, which a run leaves that was resumed from an earlier checkpoint.
    """
    complete = _complete(folder)
    ahead = [path for path in complete if int(_step(path)) > step]
    complete = complete[: len(complete) - len(ahead)]
    figures: dict[Path, float] = {}
    for path in complete:
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
            figure = _progress(_read_json(path / _STATE)["progress"]).figure
            if figure is not None and math.isfinite(figure):
                figures[path] = figure if lower_is_better(run.best_metric) else -figure
    best = min(figures, key=lambda path: figures[path], default=None)
    for path in (*complete[: -run.keep_last], *ahead):
        if path != best:
            _discard(path)


def _discard(path: Path) -> None:
    if path.is_symlink():
        raise OSError(f"{path.name} is a symbolic link")
    discarded = path.with_name(f".{path.name}.discarded")
    shutil.rmtree(discarded, ignore_errors=True)
    # Renamed first, so that a folder that is half removed never looks like a checkpoint.
    os.rename(path, discarded)
    shutil.rmtree(discarded)
