"""Going on from a checkpoint: only with what computes the same steps, and then to the bit."""

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from minilm.checkpoint import (
    ADAPTER,
    OPTIMIZER,
    RESULTS,
    WEIGHTS,
    Checkpoint,
    Progress,
    copy_to_cpu,
    describe_optimizer,
    is_stateless,
    parameter_names,
    read_checkpoint,
)
from minilm.config import Config, Run
from minilm.inputs import compare_circumstances, compare_inputs
from minilm.lora import is_adapted, unmerged
from minilm.settings import flat, to_dict
from minilm.sharding import part_like
from minilm.stop import TrainingStopped
from minilm.zero import ZeroOptimizer, writable

log = logging.getLogger("minilm")

# Settings that may change when a run goes on. They decide how it runs and how long, not what a step computes.
_WHERE = ("run.output_dir", "run.overwrite", "run.resume")  # the run's own place, which is no news
_SOURCES = ("data.source", "data.eval_source", "tokens.name", "model.name")  # what they hold is compared in their place
_MAY_CHANGE = (
    *_WHERE,
    *_SOURCES,
    *(f"run.{name}" for name in ("epochs", "max_steps", "eval_every", "save_every", "keep_last", "max_bad_steps")),
    *("run.load_best", "run.patience", "run.trackers", "run.push_to_hub", "run.license"),
    *("run.timeout", "run.samples", "run.deterministic", "batch.micro_tokens", "batch.workers"),
    *("model.gradient_checkpointing", "model.attention"),
)
# Those of them by which a step's sums are taken in another order, or dropout draws other numbers.
_ROUNDING = ("batch.micro_tokens", "model.gradient_checkpointing", "model.attention", "run.deterministic")


def resume(
    checkpoint: Checkpoint | None,
    config: Config,
    inputs: dict[str, Any],
    total: int,
    network: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    precision: str,
) -> Progress:
    """Put the model and the optimizer where the checkpoint was, and return how far that is; without one, the start.

    inputs: what the result depends on besides the settings, by `minilm.inputs.collect_inputs`.
    precision: what this job computes in; where `auto` chose it and had chosen another one before, a warning says so.
    Raises ValueError when the checkpoint is of another run, TrainingStopped when its run is finished.
    """
    if checkpoint is None:
        return Progress()
    changed = check_settings(checkpoint, config)
    origin = checkpoint.config.get("model", {}).get("name") != config.model.name
    if others := compare_inputs(checkpoint.inputs, inputs, origin=origin, base=is_adapted(network)):
        _refuse(checkpoint, "", others)
    _check_unfinished(checkpoint, config.run, total)
    _warn_of_precision(checkpoint, config.run, precision)
    rounding = [line for line in changed if line.startswith(_ROUNDING)]
    rounding += compare_circumstances(checkpoint.inputs, inputs)
    if rounding:
        log.warning(f"the run may not repeat to the bit: {'; '.join(rounding)}")
    log.info(f"resuming from {checkpoint.folder}")
    for line in changed:
        if line not in rounding:
            log.info(f"changed since: {line}")
    restore(checkpoint, network, optimizer)
    return checkpoint.progress


def _check_unfinished(checkpoint: Checkpoint, run: Run, total: int) -> None:
    """Raise TrainingStopped where the run of the checkpoint is finished, ValueError where it is beyond `total`."""
    step = checkpoint.progress.step
    folder = checkpoint.folder.parent
    if step > total:
        raise ValueError(
            f"{checkpoint.folder} is at step {step}, beyond the {total} steps that are asked for: ask for more"
        )
    if not (folder / RESULTS).exists():
        return
    if step == total:
        raise TrainingStopped(f"the run in {folder} is finished; a larger --run.max-steps goes on from step {step}", 0)
    if run.patience is not None and checkpoint.progress.stale >= run.patience:
        raise TrainingStopped(
            f"the run in {folder} stopped by run.patience; a larger --run.patience goes on from step {step}", 0
        )


def _warn_of_precision(checkpoint: Checkpoint, run: Run, precision: str) -> None:
    """Warn where `run.precision` is auto and has chosen another precision than before."""
    before = _precision_of(checkpoint)
    if run.precision == "auto" and before not in (None, precision):
        log.warning(
            f"run.precision auto is {precision} now and was {before}: the run will not repeat to the bit; "
            f"--run.precision {before} keeps it"
        )


def check_settings(checkpoint: Checkpoint | None, config: Config) -> list[str]:
    """What changed since the checkpoint and may, a line each. Raises ValueError for what changes the mathematics."""
    if checkpoint is None:
        return []
    # An older checkpoint lacks settings that are new, which had no effect but their default's.
    defaults = to_dict(Config(objective=type(config.objective)()))
    before, now = flat(defaults) | flat(checkpoint.config), flat(to_dict(config))
    if before.get("run.precision") == "auto" != config.run.precision:
        before["run.precision"] = _precision_of(checkpoint) or "auto"
    changes = {
        name: f"{name} was {json.dumps(before.get(name))}, is {json.dumps(now.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    }
    refused = [change for name, change in changes.items() if name not in _MAY_CHANGE]
    if refused:
        _refuse(checkpoint, " with other settings", refused)
    return [change for name, change in changes.items() if name not in _WHERE]


def check_best(checkpoint: Checkpoint | None, run: Run) -> None:
    """Raise ValueError where `run.load_best` could not load the best weights so far at the end of the run."""
    if checkpoint is None or not run.load_best:
        return
    progress, folder = checkpoint.progress, checkpoint.folder.parent
    if progress.best_step in (0, progress.step):
        return
    try:
        found = read_checkpoint(folder / f"checkpoint-{progress.best_step}").progress
        if (found.step, found.figure) != (progress.best_step, progress.best):
            raise ValueError(f"{folder / f'checkpoint-{progress.best_step}'} is of another run")
    except ValueError as error:
        raise ValueError(
            f"run.load_best: the best evaluation was after step {progress.best_step}, and {error}: "
            "leave run.load_best out, or run.resume to start anew"
        ) from error


def _precision_of(checkpoint: Checkpoint) -> str | None:
    """What the run computed in when it was last started, by its run.json; None where that does not tell."""
    found = None
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        found = json.loads((checkpoint.folder.parent / "run.json").read_text(encoding="utf-8"))["precision"]
    return found if found in ("fp32", "bf16", "fp16") else None


def _refuse(checkpoint: Checkpoint, why: str, changes: list[str]) -> NoReturn:
    raise ValueError(
        f"cannot resume from {checkpoint.folder}{why}: {'; '.join(changes)}; "
        "set them back, or leave run.resume out to start anew"
    )


def load_step(folder: Path, step: int, network: PreTrainedModel) -> None:
    """Put the weights of a checkpoint of this run into its model; for step 0 it keeps its own, and a warning says so.

    Raises ValueError when the checkpoint is not usable any more.
    """
    if step == 0:
        log.warning("run.load_best: no evaluation gave a finite run.best_metric, the last weights are the result")
        return
    try:
        _load_weights(read_checkpoint(folder / f"checkpoint-{step}"), network)
    except ValueError as error:
        raise ValueError(
            f"run.load_best: {error}; --run.resume latest without run.load_best ends the run with its last weights"
        ) from error


def restore(checkpoint: Checkpoint, network: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Put weights, moments and loss scaling back, bit for bit. Raises ValueError when they are not this model's."""
    _load_weights(checkpoint, network)
    _load_moments(checkpoint, optimizer, network)
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None and checkpoint.scaler:
        try:
            scaler.load_state_dict(checkpoint.scaler)
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{checkpoint.folder}: its loss scaling cannot be read: {error}") from error


def _load_weights(checkpoint: Checkpoint, network: PreTrainedModel) -> None:
    current = network.state_dict(keep_vars=True)
    try:
        weights = load_file(checkpoint.folder / WEIGHTS)
        if is_adapted(network):
            weights = unmerged(
                network, weights, load_file(checkpoint.folder / ADAPTER), copy_to_cpu(current, keep=True)
            )
        parts = {name: part_like(tensor, current.get(name, tensor)) for name, tensor in weights.items()}
        with writable(network):
            missing, unexpected = network.load_state_dict(parts, strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{checkpoint.folder}: its weights do not fit the model: {' '.join(str(error).split())}"
        ) from error
    loaded = {id(current[name]) for name in weights if name in current}
    lost = [name for name in missing if id(current[name]) not in loaded]  # tied ones are there
    if lost or unexpected:
        raise ValueError(
            f"{checkpoint.folder}: its weights do not fit the model: {', '.join([*lost, *unexpected][:3])}"
        )


def _load_moments(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, network: PreTrainedModel) -> None:
    try:
        stored = load_file(checkpoint.folder / OPTIMIZER)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{checkpoint.folder}: {OPTIMIZER} cannot be read: {error}") from error
    _check_optimizer(checkpoint, optimizer, stored)
    names = parameter_names(network)
    parameters: list[Any] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if isinstance(optimizer, ZeroOptimizer):  # whose groups hold what DeepSpeed makes of the parameters
        parameters = [*optimizer.state]
    slots = [_slots_of(names[parameter], parameter, stored) for parameter in parameters]
    if sum(map(len, slots)) != len(stored):
        raise ValueError(f"{checkpoint.folder}: {OPTIMIZER} does not belong to this model")
    numbers = checkpoint.optimizer.get("numbers", [])
    state: dict[int, dict[str, Any]] = {
        index: {slot: _number(value) if slot in numbers else value for slot, value in own.items()}
        for index, own in enumerate(slots)
        if own
    }
    if isinstance(optimizer, ZeroOptimizer):
        optimizer.restore({parameters[index]: own for index, own in state.items()})
    else:
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


_ADAMW = {"step", "exp_avg", "exp_avg_sq"}  # the state of the optimizer of every checkpoint that does not name one


def _check_optimizer(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, stored: dict[str, Tensor]) -> None:
    """Raise ValueError where the checkpoint's optimizer is another one, or keeps its state where no checkpoint is."""
    now, before = describe_optimizer(optimizer)["name"], checkpoint.optimizer.get("name")
    slots = {key.partition("/")[0] for key in stored}
    anew = "leave run.resume out to start anew"
    if before is None and slots and (slots == _ADAMW) != (now == "AdamW"):
        raise ValueError(
            f"{checkpoint.folder}: {OPTIMIZER} holds {', '.join(sorted(slots))}, which is not the state of {now}, the "
            f"optimizer of this run: take the one that wrote it, or {anew}"
        )
    if before not in (None, now):
        raise ValueError(
            f"{checkpoint.folder}: its optimizer is {before}, and that of this run is {now}: take {before}, or {anew}"
        )
    if not slots and checkpoint.progress.step > 0 and not is_stateless(optimizer):
        raise ValueError(
            f"{checkpoint.folder}: {OPTIMIZER} holds no state, so {now} cannot go on from it (an optimizer is saved by "
            f"its state_dict): {anew}"
        )


def _number(value: Tensor) -> int | float:
    number = float(value)
    return int(number) if number.is_integer() else number


def _slots_of(name: str, parameter: Tensor, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is stored for the parameter of this name: of each tensor, what this process holds."""
    end = f"/{name}"
    return {key.removesuffix(end): part_like(tensor, parameter) for key, tensor in stored.items() if key.endswith(end)}
