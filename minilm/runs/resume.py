"""Resuming from a checkpoint: minilm checks that the settings and inputs fit, and repeats the run to the bit."""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from minilm.config import Config, Phase, Run
from minilm.config.phases import list_periods
from minilm.config.serialization import default_settings, flatten_settings, to_dict
from minilm.distributed.sharding import shard_like
from minilm.models.lora import has_adapter, unmerge_adapter
from minilm.runs.checkpoint import ADAPTER, MANIFEST, WEIGHTS, Checkpoint, Progress, is_branch, read_checkpoint
from minilm.runs.optimizer_state import load_optimizer_state
from minilm.runs.run_facts import RESULTS
from minilm.runs.run_inputs import compare_environments, compare_inputs, compare_periods
from minilm.runs.state_tensors import gather_full_state, load_tensors
from minilm.runs.step_changes import compared_settings, find_first_change
from minilm.utils.errors import TrainingStopped
from minilm.utils.number_ranges import format_ranges, parse_ranges

log = logging.getLogger("minilm")

SET_BACK = "set them back, or leave run.resume out to start again"
"""What an error advises where the settings or the inputs of a run have changed."""
# Settings that change in nearly every resume, so that no line reports them.
_UNREPORTED = ("run.output_dir", "run.overwrite", "run.resume")
# Settings that name inputs. The names may change, but not the content, which minilm.runs.run_inputs compares.
_SOURCES = ("data.source", "data.eval_source", "tokens.name", "model.name", "objective.teacher")
# Settings that may change when a run is resumed. They decide how a step is computed and what the run saves. Those of
# `compared_settings` may change as well, if no step before the checkpoint changes.
_MAY_CHANGE = (
    *_UNREPORTED,
    *_SOURCES,
    *(f"run.{name}" for name in ("eval_every", "save_every", "keep_last", "ledger", "train_ledger", "max_bad_steps")),
    *("run.load_best", "run.patience", "run.trackers", "run.push_to_hub", "run.license"),
    # max_tokens decides run.max_steps, which is compared.
    *("data.max_tokens", "data.exclude_loss"),
    *("run.timeout", "run.samples", "run.deterministic", "batch.micro_tokens", "batch.workers"),
    *("model.gradient_checkpointing", "model.attention", "objective.defined_in"),
)
# Those of them that change the order of a step's sums, or the random numbers of dropout.
_ROUNDING = ("batch.micro_tokens", "model.gradient_checkpointing", "model.attention", "run.deterministic")


def resume(
    checkpoint: Checkpoint | None,
    config: Config,
    inputs: dict[str, Any],
    steps_per_epoch: int,
    network: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    precision: str,
    *,
    own_rate: Callable[[int, int], float] | None = None,
    first_use: Callable[[Sequence[range], range], tuple[int, int] | None] | None = None,
) -> Progress:
    """Load the checkpoint into the model and the optimizer, and return its progress: `Progress()` without one.

    inputs: the result of `minilm.runs.run_inputs.collect_inputs`. precision: the precision in which this job computes.
    own_rate: the user's function that gives the learning rate of a step in place of `optim`.
    first_use: `minilm.data.excluded_documents.find_first_use` of this run's plan and data, for `data.exclude_loss`.

    Raises ValueError where the checkpoint belongs to another run, or where this run would have made another step before
    the checkpoint; TrainingStopped where its run is finished.
    """
    if checkpoint is None:
        return Progress()
    changed = check_settings(checkpoint, config)
    origin = checkpoint.config.get("model", {}).get("name") != config.model.name
    if others := compare_inputs(checkpoint.inputs, inputs, origin=origin, base=has_adapter(network)):
        _raise_refusal(checkpoint, "", others)
    _check_length(checkpoint, config, steps_per_epoch)
    _check_steps(checkpoint, config, steps_per_epoch, own_rate)
    _check_excluded_documents(checkpoint, config, first_use)
    begun = sum(period.start < checkpoint.progress.step for period in list_periods(config))
    if others := compare_periods(checkpoint.inputs, inputs, begun):
        _raise_refusal(checkpoint, "", others)
    _check_unfinished(checkpoint, config, steps_per_epoch, own_rate)
    _warn_if_precision_changed(checkpoint, config.run, precision)
    rounding = [line for line in changed if line.startswith(_ROUNDING)]
    rounding += compare_environments(checkpoint.inputs, inputs)
    if rounding:
        log.warning(f"the run may not repeat to the bit: {'; '.join(rounding)}")
    if not (checkpoint.folder / MANIFEST).is_file():
        raise ValueError(f"{checkpoint.folder} is gone: another run has removed it in the meantime; take another one")
    log.info(f"{'branching' if is_branch(checkpoint, config.run.output_dir) else 'resuming'} from {checkpoint.folder}")
    for line in changed:
        if line not in rounding:
            log.info(f"changed since: {line}")
    restore_state(checkpoint, network, optimizer)
    return checkpoint.progress


def _check_length(checkpoint: Checkpoint, config: Config, steps_per_epoch: int) -> None:
    """Raise ValueError where the checkpoint is beyond the last step of this run, or a branch has no step to make."""
    step, total = checkpoint.progress.step, config.run.count_steps(steps_per_epoch)
    if step > total or (step == total and is_branch(checkpoint, config.run.output_dir)):
        raise ValueError(
            f"{checkpoint.folder} is at step {step}, and this run ends after {total} steps: set a larger run.max_steps "
            "or run.epochs"
        )


def _check_steps(
    checkpoint: Checkpoint, config: Config, steps_per_epoch: int, own_rate: Callable[[int, int], float] | None
) -> None:
    """Raise ValueError that names the first step before the checkpoint that `config` would make in another way."""
    old = flatten_settings(default_settings(type(config.objective))) | flatten_settings(checkpoint.config)
    new = flatten_settings(to_dict(config))
    names = [name for name in compared_settings(config) if old[name] != new[name]]
    before = config
    for group in {name.split(".")[0] for name in names}:
        fields = {name.split(".")[1]: old[name] for name in names if name.startswith(f"{group}.")}
        if "phases" in fields:
            fields["phases"] = tuple(map(Phase.parse, fields["phases"]))
        before = replace(before, **{group: replace(getattr(config, group), **fields)})
    steps = checkpoint.progress.step
    change = find_first_change(before, config, steps=steps, steps_per_epoch=steps_per_epoch, own_rate=own_rate)
    if change is None:
        return
    changes = "; ".join(f"{name} was {json.dumps(old[name])}, is {json.dumps(new[name])}" for name in names)
    earlier = f"resume from a checkpoint before step {change.step}, " if change.step > 1 else ""
    raise ValueError(
        f"cannot resume from {checkpoint.folder}: step {change.step} had the {change.what} {change.before} and "
        f"would have {change.now} ({changes}); set them back, {earlier}or leave run.resume out to start again"
    )


def _check_excluded_documents(
    checkpoint: Checkpoint,
    config: Config,
    first_use: Callable[[Sequence[range], range], tuple[int, int] | None] | None,
) -> None:
    """Raise ValueError that names the first step before the checkpoint that `data.exclude_loss` would change."""
    before, now = checkpoint.config["data"].get("exclude_loss"), config.data.exclude_loss
    documents = [{*chain.from_iterable(parse_ranges(text) if text else ())} for text in (before, now)]
    if not (changed := documents[0] ^ documents[1]) or first_use is None:
        return
    use = first_use(parse_ranges(format_ranges(changed)), range(checkpoint.progress.step))
    if use is not None:
        step, document = use
        raise ValueError(
            f"cannot resume from {checkpoint.folder}: step {step + 1} reads the training document {document}, and "
            f"data.exclude_loss was {json.dumps(before)}, is {json.dumps(now)}; set it back, resume from a checkpoint "
            "before this step, or leave run.resume out to start again"
        )


def _check_unfinished(
    checkpoint: Checkpoint, config: Config, steps_per_epoch: int, own_rate: Callable[[int, int], float] | None
) -> None:
    """Raise TrainingStopped where the run of the checkpoint is finished, ValueError for a branch without patience."""
    run, total = config.run, config.run.count_steps(steps_per_epoch)
    step = checkpoint.progress.step
    folder = checkpoint.folder.parent
    impatient = run.patience is not None and checkpoint.progress.stale >= run.patience
    if is_branch(checkpoint, run.output_dir) and impatient:
        raise ValueError(f"{checkpoint.folder}: its run had run out of patience there: set a larger run.patience")
    if is_branch(checkpoint, run.output_dir) or not (folder / RESULTS).exists():
        return
    if step == total:
        longer = replace(config, run=replace(run, max_steps=total + 1))
        more = find_first_change(config, longer, steps=step, steps_per_epoch=steps_per_epoch, own_rate=own_rate)
        advice = (
            f"A larger --run.max-steps continues it from step {step}"
            if more is None
            else f"It cannot be made longer, since step {more.step} would have another {more.what}; branch at an "
            f"earlier checkpoint, or begin another run with its weights: --model.name {folder}"
        )
        raise TrainingStopped(f"the run in {folder} is finished. {advice}", 0)
    if impatient:
        raise TrainingStopped(
            f"the run in {folder} stopped by run.patience. A larger --run.patience continues it from step {step}", 0
        )


def _warn_if_precision_changed(checkpoint: Checkpoint, run: Run, precision: str) -> None:
    """Warn where `run.precision` is auto and has chosen another precision than before."""
    before = read_precision(checkpoint.folder.parent)
    if run.precision == "auto" and before not in (None, precision):
        log.warning(
            f"run.precision auto is {precision} now and was {before}: the run will not repeat to the bit; "
            f"--run.precision {before} keeps it"
        )


def check_settings(checkpoint: Checkpoint | None, config: Config) -> list[str]:
    """Return a line for each setting that has changed. Raise ValueError where a change would change the result."""
    if checkpoint is None:
        return []
    # An older checkpoint lacks newer settings. Its run behaved as their defaults do.
    defaults = default_settings(type(config.objective))
    before, now = flatten_settings(defaults) | flatten_settings(checkpoint.config), flatten_settings(to_dict(config))
    if before.get("run.precision") == "auto" != config.run.precision:
        before["run.precision"] = read_precision(checkpoint.folder.parent) or "auto"
    changes = {
        name: f"{name} was {json.dumps(before.get(name))}, is {json.dumps(now.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    }
    may_change = (*_MAY_CHANGE, *compared_settings(config))
    refused = [change for name, change in changes.items() if name not in may_change]
    if refused:
        _raise_refusal(checkpoint, " with other settings", refused)
    return [change for name, change in changes.items() if name not in _UNREPORTED]


def check_best_checkpoint(checkpoint: Checkpoint | None, run: Run) -> None:
    """With `run.load_best`, raise ValueError where the checkpoint of the best evaluation so far cannot be used."""
    if checkpoint is None or not run.load_best:
        return
    progress, folder = checkpoint.progress, checkpoint.folder.parent
    if progress.best_step in (0, progress.step):
        return
    try:
        path = folder / f"checkpoint-{progress.best_step}"
        best = read_checkpoint(path).progress
        if (best.step, best.figure) != (progress.best_step, progress.best):
            raise ValueError(f"{path} belongs to another run")
    except ValueError as error:
        raise ValueError(
            f"run.load_best: the best evaluation was after step {progress.best_step}, and {error}: "
            "leave run.load_best out, or leave run.resume out to start again"
        ) from error


def read_precision(folder: Path) -> Any:
    """Return the precision in run.json, which the last start of the run wrote, or None where it holds none."""
    precision = None
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        precision = json.loads((folder / "run.json").read_text(encoding="utf-8"))["precision"]
    return precision if precision in ("fp32", "bf16", "fp16") else None


def _raise_refusal(checkpoint: Checkpoint, why: str, changes: list[str]) -> NoReturn:
    """Raise ValueError with the changes that prevent the resume."""
    raise ValueError(f"cannot resume from {checkpoint.folder}{why}: {'; '.join(changes)}; {SET_BACK}")


def load_best_weights(folder: Path, step: int, network: PreTrainedModel) -> None:
    """Load the weights of the checkpoint of `step`, the best step of the run, into the model.

    Step 0 means that no evaluation gave a finite figure. Then the function warns, and the model keeps its weights.
    Raises ValueError where the checkpoint is no longer usable.
    """
    if step == 0:
        log.warning("run.load_best: no evaluation gave a finite run.best_metric, so the last weights are the result")
        return
    try:
        _load_weights(read_checkpoint(folder / f"checkpoint-{step}"), network)
    except ValueError as error:
        raise ValueError(
            f"run.load_best: {error}; --run.resume latest without run.load_best ends the run with its last weights"
        ) from error


def restore_state(checkpoint: Checkpoint, network: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Load weights, optimizer state and loss scaling, bit for bit. Raise ValueError where they do not fit."""
    _load_weights(checkpoint, network)
    load_optimizer_state(checkpoint, optimizer, network)
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None and checkpoint.scaler:
        try:
            scaler.load_state_dict(checkpoint.scaler)
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{checkpoint.folder}: its loss scaling cannot be read: {error}") from error


def _load_weights(checkpoint: Checkpoint, network: PreTrainedModel) -> None:
    """Load the weights bit for bit; each process loads its shard. Raise ValueError where they do not fit."""
    current = network.state_dict(keep_vars=True)
    try:
        weights = load_tensors(checkpoint.folder, WEIGHTS)
        if has_adapter(network):
            adapter = load_tensors(checkpoint.folder, ADAPTER)
            weights = unmerge_adapter(network, weights, adapter, gather_full_state(current, keep=True))
        parts = {name: shard_like(tensor, current.get(name, tensor)) for name, tensor in weights.items()}
        missing, unexpected = network.load_state_dict(parts, strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{checkpoint.folder}: its weights do not fit the model: {' '.join(str(error).split())}"
        ) from error
    loaded = {id(current[name]) for name in weights if name in current}
    lost = [name for name in missing if id(current[name]) not in loaded]  # tied weights are stored under one name
    if lost or unexpected:
        raise ValueError(
            f"{checkpoint.folder}: its weights do not fit the model: {', '.join([*lost, *unexpected][:3])}"
        )
