"""Checkpoints: written so that a kill at any moment leaves the last one whole, checked before they are believed.

A checkpoint is a folder `checkpoint-<step>` in the output folder: the model and its tokenizer as Hugging Face saves
them (it loads with `from_pretrained`), the optimizer's moments, where the run stood, a manifest of sizes and SHA-256.
Order, masks, learning rate and dropout follow from the configuration and the step, so that nothing else is state.
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
from minilm.disk import file_facts, replacing
from minilm.hub import quiet_transformers
from minilm.lora import adapter_weights, is_adapted, merged
from minilm.optim import unwrapped
from minilm.settings import to_dict
from minilm.sharding import whole
from minilm.zero import ZeroOptimizer

log = logging.getLogger("minilm")

RESULTS = "all_results.json"  # there when the run is finished
WEIGHTS = "model.safetensors"
ADAPTER = "adapter.safetensors"  # of LoRA: what was merged into these weights
_MANIFEST, _STATE, OPTIMIZER = "manifest.json", "training.json", "optimizer.safetensors"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, beside its weights and moments."""

    step: int = 0
    """Updates made."""
    tokens: int = 0
    """Real tokens seen, all processes together."""
    seconds: float = 0.0
    """Training time."""
    flops: float = 0.0
    """Model FLOPs."""
    log_bytes: int = 0
    """Length of log.jsonl."""
    figure: float | None = None
    """`run.best_metric` of an evaluation after this very step, if there was one."""
    best: float | None = None
    """The best of all evaluations, by the same figure."""
    best_step: int = 0
    """The step after which that was."""
    stale: int = 0
    """Evaluations since."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found whole."""

    folder: Path
    progress: Progress
    config: dict[str, Any]
    """The configuration of the run that wrote it, as `minilm.settings.to_dict` gives it."""
    inputs: dict[str, Any]
    """What its result depends on besides, as `minilm.inputs.collect_inputs` gives it."""
    scaler: dict[str, Any]
    """Where the loss scaling of fp16 stood; empty without it."""
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What `describe_optimizer` gives; empty in checkpoints of minilm 0.1, which do not say it."""


class Saver:
    """Writes checkpoints of a run beside it: the run waits for the copy in memory, a thread writes that to disk.

    At most one checkpoint is being written at a time. Only when it is complete are older ones removed, but for the
    newest `keep_last` and the best by `run.best_metric`. One process of a job does it (`enabled`). Raises
    OSError from the call after a write that failed; the checkpoints before it are then untouched.
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
        """Whether there is a checkpoint after this step.

        There is every `run.save_every` steps, where a run ends, and with `run.load_best` where it is `better`.
        """
        run = self.config.run
        return run.save_every > 0 and (last or step % run.save_every == 0 or (better and run.load_best))

    def save(self, progress: Progress) -> None:
        """Write `checkpoint-<step>`; returns once the state is copied. Every process of the job calls it."""
        self.wait()
        # First this one: state_dict has FSDP put the parts back that the optimizer knows.
        weights = copy_to_cpu(self.network.state_dict(keep_vars=True), keep=self.enabled)
        moments = copy_to_cpu(_moments(self.optimizer, self.network), keep=self.enabled)
        if not self.enabled:
            return
        scaler = getattr(self.optimizer, "scaler", None)  # which accelerate's wrapper has under fp16
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
        """Wait until what was saved is on disk; raises OSError when it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def explain_resume(self) -> str:
        """From where the run can go on, in words, once what is being written is on disk."""
        with contextlib.suppress(OSError):
            self.wait()
        complete = _complete(self.folder)
        return f"--run.resume latest goes on from {complete[-1].name}" if complete else "no checkpoint was saved"

    def _write(self, step: int, state: dict[str, Any], weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        target = self.folder / f"checkpoint-{step}"
        try:
            with replacing(target) as temporary:
                with quiet_transformers():
                    # By the model's own names, to be put back: the original format may have others.
                    whole = merged(self.network, weights)
                    self.network.save_pretrained(temporary, state_dict=whole, save_original_format=False)
                    save_tokenizer(self.tokenizer, temporary)
                save_file(moments, temporary / OPTIMIZER)
                if is_adapted(self.network):
                    save_file(adapter_weights(self.network, weights), temporary / ADAPTER)
                (temporary / _STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
                files = {path.name: file_facts(path) for path in sorted(temporary.iterdir())}
                (temporary / _MANIFEST).write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")
        except Exception as error:  # raised again by the thread that trains
            reason = getattr(error, "strerror", None) or error
            self._error = OSError(f"{target} could not be written: {reason}; older checkpoints are untouched")
            return
        try:
            _rotate(self.folder, step, self.config.run)
        except OSError as error:
            log.warning(f"{target} is saved, but an older checkpoint could not be removed: {error}")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save it in the Hugging Face format, in files alone.

    Several chat templates go into tokenizer_config.json, in place of the folder that transformers would make of them.
    """
    several = isinstance(tokenizer.chat_template, dict)
    tokenizer.save_pretrained(folder, save_jinja_files=not several)


def find_checkpoint(resume: str, folder: Path) -> Checkpoint:
    """The checkpoint that `run.resume` means: a path, or the newest complete one of the output folder.

    Raises ValueError when there is none, or when it is damaged: then it names the file.
    """
    if resume != "latest":
        path = Path(resume).expanduser().resolve()
    elif complete := _complete(folder):
        path = complete[-1]
    else:
        raise ValueError(f"run.resume latest: there is no complete checkpoint in {folder}; leave it out to start anew")
    try:
        return read_checkpoint(path)
    except ValueError as error:
        others = [other.name for other in _complete(path.parent) if other != path]
        hint = f"; there is also {', '.join(others)}: give its path to go on from there" if others else ""
        raise ValueError(f"{error}{hint}") from error


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder says of itself that it is a checkpoint, whole or not."""
    return any((folder / name).exists() for name in (_MANIFEST, _STATE))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check every file of the checkpoint against its manifest, then read where the run stood.

    Raises ValueError that names what is missing, damaged or out of place. Nothing in it is ever executed.
    """
    try:
        _require(folder.is_dir(), "there is no such folder; give the path of one, or latest")
        manifest = _read_json(folder / _MANIFEST)
        for name in (WEIGHTS, OPTIMIZER, _STATE):
            _require(name in manifest, f"{name} is not in its {_MANIFEST}")
        for name, facts in manifest.items():
            path = folder / name
            _require(
                Path(name).name == name and path.is_file() and not path.is_symlink(), f"{name!r} is no file of its own"
            )
            _require(file_facts(path) == facts, f"{name} is not what its {_MANIFEST} says: it is damaged")
        state = {"scaler": {}, "optimizer": {}} | _read_json(folder / _STATE)  # which older ones lack
        if "data" in state and "inputs" not in state:  # of older ones
            state["inputs"] = {"training examples": state.pop("data")}
        whole = state.keys() == {"progress", "config", "inputs", "scaler", "optimizer"}
        whole = whole and all(isinstance(part, dict) for part in state.values())
        _require(whole, f"{_STATE} does not have the parts that it should")
        return Checkpoint(**state | {"folder": folder, "progress": _progress(state["progress"])})
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no usable checkpoint: {error}") from error


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _read_json(path: Path) -> dict[str, Any]:
    _require(os.path.lexists(path), f"there is no {path.name} in it")
    _require(path.is_file() and not path.is_symlink(), f"{path.name} is no file of its own")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON") from error
    _require(isinstance(tree, dict), f"{path.name} holds no names")
    result: dict[str, Any] = tree
    return result


def _progress(values: dict[str, Any]) -> Progress:
    kinds = typing.get_type_hints(Progress)
    right = values.keys() == kinds.keys() and all(
        isinstance(values[name], kind) or (kind is float and isinstance(values[name], int))
        for name, kind in kinds.items()
    )
    _require(right, f"{_STATE} does not say where the run stood")
    return Progress(**values)


def parameter_names(network: PreTrainedModel) -> dict[Tensor, str]:
    """The name of each parameter, under which a checkpoint keeps its moments; a tied one has a single name."""
    return {parameter: name for name, parameter in network.named_parameters()}


# Settings of torch's optimizers that decide what they keep of a parameter.
_DECIDING = ("momentum", "amsgrad", "centered")


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What tells the optimizer's state from another's, as JSON types.

    `name` is that of its class, with the settings that add to its state: "SGD with momentum". `numbers` are the parts
    of the state of a parameter that are no tensors, such as the step of some optimizers.
    """
    if isinstance(optimizer, ZeroOptimizer):  # DeepSpeed's AdamW, whose checkpoints are those of torch's
        return {"name": "AdamW", "numbers": []}
    group = optimizer.param_groups[0]
    deciding = [name for name in _DECIDING if group.get(name)]
    numbers = {slot for slots in optimizer.state.values() for slot, value in slots.items() if _is_number(value)}
    name = type(unwrapped(optimizer)).__name__ + (f" with {' and '.join(deciding)}" if deciding else "")
    return {"name": name, "numbers": sorted(numbers)}


def is_stateless(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer needs no state: SGD without momentum."""
    return bool(describe_optimizer(optimizer)["name"] == "SGD")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _moments(optimizer: torch.optim.Optimizer, network: PreTrainedModel) -> dict[str, Tensor]:
    """The optimizer's tensors, and its numbers as tensors, by `<slot>/<name of the parameter>`.

    SGD keeps a None for its momentum where it has none.
    """
    names = parameter_names(network)
    return {
        f"{slot}/{names[parameter]}": torch.tensor(value, dtype=torch.float64) if _is_number(value) else value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
        if value is not None
    }


def copy_to_cpu(tensors: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """A copy of each tensor on the CPU where `keep`; every process calls this, for it may hold parts of the tensors.

    Tied weights, which are one tensor under two names, stay one.
    """
    copies = {}
    for tensor in {id(tensor): tensor for tensor in tensors.values()}.values():
        gathered = whole(tensor)
        if keep:
            copies[id(tensor)] = gathered.detach().to("cpu", copy=True)
    return {name: copies[id(tensor)] for name, tensor in tensors.items()} if keep else {}


def discard_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of an earlier run, and what killed ones left; folders of other programs stay."""
    for path in _leftovers(folder):
        shutil.rmtree(path)
    for path in filter(is_checkpoint, _checkpoints(folder)):
        _discard(path)


def find_obstacles(folder: Path, steps: int) -> list[Path]:
    """What has the name of a checkpoint of one of these steps and is none."""
    others = [path for path in sorted(folder.glob("checkpoint-*")) if not is_checkpoint(path)]
    return [path for path in others if _step(path).isdecimal() and int(_step(path)) <= steps]


def _leftovers(folder: Path) -> list[Path]:
    """Folders that a killed run left: checkpoints half written or half removed, and a model half saved."""
    named = re.compile(r"\.checkpoint-\d+\.(writing|replaced|discarded)|\.export-\w+")
    return [path for path in folder.iterdir() if named.fullmatch(path.name) and path.is_dir()]


def _checkpoints(folder: Path) -> list[Path]:
    """The folders named checkpoint-<step>, by step."""
    if not folder.is_dir():
        return []
    steps = {_step(path): path for path in folder.glob("checkpoint-*") if path.is_dir()}
    return [steps[step] for step in sorted((s for s in steps if s.isdecimal()), key=int)]


def _step(path: Path) -> str:
    return path.name.removeprefix("checkpoint-")


def _complete(folder: Path) -> list[Path]:
    """Those of them that were written to the end."""
    return [path for path in _checkpoints(folder) if (path / _MANIFEST).is_file()]


def _rotate(folder: Path, step: int, run: Run) -> None:
    """Remove what is not to be kept now that `step` is saved.

    That is older checkpoints, and those ahead of it: the run went on from an earlier one than they are.
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
    os.rename(path, discarded)  # so that half a folder never looks like a checkpoint
    shutil.rmtree(discarded)
