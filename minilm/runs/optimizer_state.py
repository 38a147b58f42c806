"""The state of the optimizer in a checkpoint: tensors by the names of their parameters, stored bit for bit."""

from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from minilm.distributed.sharding import shard_like
from minilm.optim.optimizer import unwrap_optimizer
from minilm.runs.checkpoint import OPTIMIZER, Checkpoint
from minilm.runs.state_tensors import load_tensors

# Settings of torch's optimizers that add to the state of each parameter.
_STATE_SETTINGS = ("momentum", "amsgrad", "centered")
# The slots of AdamW. Checkpoints of minilm 0.1 do not name their optimizer. Nearly all of them are from AdamW.
_ADAMW = {"step", "exp_avg", "exp_avg_sq"}


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return facts that identify the kind of state that the optimizer keeps, as JSON types.

    `name` is the name of its class with the settings that add to its state: "SGD with momentum". `numbers` names the
    parts of a parameter's state that are plain numbers rather than tensors, such as the step of some optimizers.
    """
    group = optimizer.param_groups[0]
    settings = [name for name in _STATE_SETTINGS if group.get(name)]
    numbers = {slot for slots in optimizer.state.values() for slot, value in slots.items() if _is_number(value)}
    name = type(unwrap_optimizer(optimizer)).__name__ + (f" with {' and '.join(settings)}" if settings else "")
    return {"name": name, "numbers": sorted(numbers)}


def _is_stateless(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer keeps no state, as SGD without momentum does."""
    return bool(describe_optimizer(optimizer)["name"] == "SGD")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def collect_optimizer_state(optimizer: torch.optim.Optimizer, network: PreTrainedModel) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors by `<slot>/<name of the parameter>`.

    Plain numbers become tensors of float64. Values of None are left out. SGD without momentum has them in place of a
    buffer.
    """
    names = _parameter_names(network)
    return {
        f"{slot}/{names[parameter]}": torch.tensor(value, dtype=torch.float64) if _is_number(value) else value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
        if value is not None
    }


def load_optimizer_state(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, network: PreTrainedModel) -> None:
    """Load the state of the optimizer bit for bit; each process loads its shard.

    Raises ValueError if the state does not fit the optimizer or the model.
    """
    try:
        stored = load_tensors(checkpoint.folder, OPTIMIZER)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{checkpoint.folder}: {OPTIMIZER} cannot be read: {error}") from error
    _check_optimizer(checkpoint, optimizer, stored)
    names = _parameter_names(network)
    parameters: list[Any] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots = [_select_slots(names[parameter], parameter, stored) for parameter in parameters]
    if sum(map(len, slots)) != len(stored):
        raise ValueError(f"{checkpoint.folder}: {OPTIMIZER} does not belong to this model")
    numbers = checkpoint.optimizer.get("numbers", [])
    state: dict[int, dict[str, Any]] = {
        index: {slot: _to_number(value) if slot in numbers else value for slot, value in own.items()}
        for index, own in enumerate(slots)
        if own
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_optimizer(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, stored: dict[str, Tensor]) -> None:
    """Raise ValueError if another optimizer wrote the checkpoint, or if it holds no state of this one."""
    now, before = describe_optimizer(optimizer)["name"], checkpoint.optimizer.get("name")
    slots = {key.partition("/")[0] for key in stored}
    anew = "leave run.resume out to start again"
    if before is None and slots and (slots == _ADAMW) != (now == "AdamW"):
        raise ValueError(
            f"{checkpoint.folder}: {OPTIMIZER} holds {', '.join(sorted(slots))}, which is not the state of {now}, the "
            f"optimizer of this run: use the one that wrote it, or {anew}"
        )
    if before not in (None, now):
        raise ValueError(
            f"{checkpoint.folder}: its optimizer is {before}, and that of this run is {now}: use {before}, or {anew}"
        )
    if not slots and checkpoint.progress.step > 0 and not _is_stateless(optimizer):
        raise ValueError(
            f"{checkpoint.folder}: {OPTIMIZER} holds no state, so {now} cannot be resumed from it (minilm saves what "
            f"the state_dict of an optimizer returns): {anew}"
        )


def _to_number(value: Tensor) -> int | float:
    """Return the value as an int if it is a whole number, else as a float."""
    number = float(value)
    return int(number) if number.is_integer() else number


def _select_slots(name: str, parameter: Tensor, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the stored state of the parameter `name` by slot, with this process's shard of each tensor."""
    end = f"/{name}"
    return {key.removesuffix(end): shard_like(tensor, parameter) for key, tensor in stored.items() if key.endswith(end)}


def _parameter_names(network: PreTrainedModel) -> dict[Tensor, str]:
    """Return the name of each parameter in the stored state. A tied parameter has one name."""
    return {parameter: name for name, parameter in network.named_parameters()}
