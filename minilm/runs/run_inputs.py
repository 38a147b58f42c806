"""The inputs of a run: what its result depends on besides the settings, in a form that can be compared."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from minilm.data.corpus import PreparedData
from minilm.data.tokenizer_state import serialize_tokenizer
from minilm.distributed.hardware import describe
from minilm.models.head import Head
from minilm.runs.run_facts import library_versions

# Fields of a model configuration that say where the model comes from, not what it computes. The dtype is among them,
# since minilm always trains float32 weights.
_ORIGIN = ("transformers_version", "architectures", "dtype", "torch_dtype")
_CHUNK = 2**20  # elements of a parameter that are summed at a time
_WEIGHTS = "weights before training"
_TEACHER = "teacher"
_PERIODS = "training examples of the phases"
_FUNCTIONS = "functions of the user"
# The libraries that decide which examples a run makes of its data.
_MAKERS_OF_EXAMPLES = ("minilm", "datasets", "tokenizers", "transformers")


def collect_inputs(
    prepared: PreparedData, head: Head, processes: int, own_functions: Mapping[str, bool] | None = None
) -> dict[str, Any]:
    """Return what the result of a run depends on besides the settings, by name, as JSON types.

    This is the only such list. Facts in "versions" and "machine" are compared by name. If you add another input here,
    also compare it in `compare_inputs`, or in `compare_periods` if only later steps depend on it. A checkpoint holds
    all trained weights, so the weights before training matter in two cases only. With LoRA, a resumed run takes the
    weights under the adapter from `model.name`, not from the checkpoint. And a changed `model.name` must still name the
    same model. The generation configuration does not change a step, but a run saves it with its model.

    own_functions: for each argument of `train` that is a function and decides a step, whether the user gave one.
    """
    network = head.model
    holders = prepared.holders_PxN
    teacher = None if head.teacher is None else dict(head.teacher.head.named_parameters())
    inputs = {
        "training examples": prepared.train.identity(),
        _PERIODS: [examples.identity() for examples in prepared.train_by_period],
        "evaluation examples": {**prepared.eval.identity(), "parts": prepared.eval_parts},
        "tokenizer": _digest(serialize_tokenizer(prepared.tokenizer)),
        "model configuration": _fields(network.config.to_dict()),
        "generation configuration": _fields(network.generation_config.to_dict()) if network.can_generate() else {},
        _WEIGHTS: {
            kind: _checksum({n: p for n, p in network.named_parameters() if p.requires_grad == (kind == "trained")})
            for kind in ("trained", "frozen")
        },
        _TEACHER: None if teacher is None else _checksum(teacher),
        _FUNCTIONS: dict(own_functions or {}),
        "versions": library_versions(),
        "machine": {
            "processes": processes,
            "pieces of the source by process": "all"
            if holders is None
            else hashlib.sha256(holders.tobytes()).hexdigest()[:12],
            **describe(network.device),
            "attention": network.config._attn_implementation,
        },
    }
    plain: dict[str, Any] = json.loads(json.dumps(inputs, default=str))
    return plain


def _digest(state: Any) -> str:
    return hashlib.sha256(json.dumps(state, default=str).encode("utf-8", "surrogatepass")).hexdigest()


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration that decide what a model computes, also of nested configurations."""
    return {
        name: _fields(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if not str(name).startswith("_") and name not in _ORIGIN
    }


def _checksum(parameters: Mapping[str, Tensor]) -> str:
    """Return a checksum of the parameters: of their names, their order and their bits as float32."""
    return _digest({name: _sums(parameter.detach()) for name, parameter in parameters.items()})


def _sums(parameter: Tensor) -> list[int]:
    """Return a sum for each chunk: its elements' bits as integers, times the factors 1, 3, 5, …, modulo 2**64."""
    bits = parameter.float().flatten().view(torch.int32)
    factors = torch.arange(1, 2 * min(_CHUNK, len(bits)) + 1, 2, device=bits.device)
    sums: list[int] = [int((chunk * factors[: len(chunk)]).sum()) for chunk in torch.split(bits, _CHUNK)]
    return sums


def compare_inputs(before: dict[str, Any], now: dict[str, Any], *, origin: bool, base: bool) -> list[str]:
    """Return a line for each difference between two results of `collect_inputs`, except the versions and the machine.

    origin: whether `model.name` has changed; then the weights before training are compared. base: whether to compare
    the frozen weights, which the checkpoints of LoRA do not hold. Inputs that an older checkpoint does not hold are
    not compared.
    """
    changes = []
    for part in ("training examples", "evaluation examples"):
        if part in before and before[part] != now[part]:
            changes.append(f"the {part} were {json.dumps(before[part])}, are now {json.dumps(now[part])}")
    if changes:
        # Another version of these libraries may make other examples of the same data.
        changes += _compare_facts(before, now, "versions", _MAKERS_OF_EXAMPLES)
    if before.get("tokenizer", now["tokenizer"]) != now["tokenizer"]:
        changes.append("the tokenizer has changed: its vocabulary, its rules or its special tokens are different")
    same_library = _library(before) == _library(now)
    for part in ("model configuration", "generation configuration"):
        fields, others = _part(before, part, now[part]), now[part]
        for field in sorted(fields.keys() | others.keys() if same_library else fields.keys() & others.keys()):
            if (old := fields.get(field)) != (new := others.get(field)):
                changes.append(f"{field} of the {part} was {json.dumps(old)}, is {json.dumps(new)}")
    if before.get(_TEACHER, now.get(_TEACHER)) != now.get(_TEACHER):
        changes.append("objective.teacher is not the model that the run began with: its weights are different")
    for name, given in _part(now, _FUNCTIONS, {}).items():
        had = _part(before, _FUNCTIONS, {}).get(name, given)
        if had != given:
            changes.append(f"the run was begun {'with' if had else 'without'} a function for train({name}=…)")
    weights, others = _part(before, _WEIGHTS, {}), now[_WEIGHTS]
    if (origin or base) and weights.get("frozen", others["frozen"]) != others["frozen"]:
        changes.append("model.name is no longer the model that the run began with: its weights are different")
    elif origin and weights.get("trained", others["trained"]) != others["trained"]:
        changes.append("model.name is not the model that the run began with: its weights are different")
    return changes


def compare_periods(before: dict[str, Any], now: dict[str, Any], count: int) -> list[str]:
    """Return a line if the training examples of one of the run's first `count` periods have changed."""
    old, new = before.get(_PERIODS, now[_PERIODS]), now[_PERIODS]
    if old[:count] == new[:count]:
        return []
    return [f"the {_PERIODS} were {json.dumps(old[:count])}, are now {json.dumps(new[:count])}"]


def compare_environments(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each difference in the libraries and the machine, which may change the last bits of a step."""
    changes = []
    for part in ("versions", "machine"):
        changes += _compare_facts(before, now, part, now[part])
    return changes


def _compare_facts(before: dict[str, Any], now: dict[str, Any], part: str, names: Iterable[str]) -> list[str]:
    """Return a line for each of these facts in a part of the inputs that has changed."""
    old, new = _part(before, part, {}), now[part]
    different = [name for name in names if name in new and old.get(name, new[name]) != new[name]]
    return [f"{name} was {old[name]}, is {new[name]}" for name in different]


def _library(inputs: dict[str, Any]) -> Any:
    """Return the release of transformers, since releases differ in the fields of their configurations."""
    return _part(inputs, "versions", {}).get("transformers")


def _part(inputs: dict[str, Any], name: str, missing: dict[str, Any]) -> dict[str, Any]:
    """Return a part of a checkpoint's inputs. A part of a wrong type counts as empty, since the file may be wrong."""
    value = inputs.get(name, missing)
    return value if isinstance(value, dict) else {}
