"""ZeRO by DeepSpeed (Rajbhandari et al. 2020): stage 2 shares out gradients and moments, stage 3 the weights too.

The steps are those of one process, and so are the checkpoints: any number of processes goes on from them. DeepSpeed
takes the update as one: norm, clipping and AdamW. accelerate launches, casts and reduces as it does for DDP.
"""

import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from minilm.models.head import Head

log = logging.getLogger("minilm")

# What minilm does, by the variables that `accelerate launch` makes of its flags.
_ONLY = {
    "ZERO_STAGE": ("2", "3"),
    "OFFLOAD_OPTIMIZER_DEVICE": ("none",),
    "OFFLOAD_PARAM_DEVICE": ("none",),
    "CONFIG_FILE": ("none",),
}
_USE = "ACCELERATE_USE_DEEPSPEED"
_SLOTS = ("exp_avg", "exp_avg_sq")
_BUCKET = 2**26  # elements that are reduced, or gathered, at a time at most


def zero_stage(environment: Mapping[str, str]) -> int | None:
    """The stage that the launcher was asked for, if any; ValueError for what minilm does not do."""
    if environment.get(_USE, "false").lower() != "true":
        return None
    for name, done in _ONLY.items():
        asked = environment.get(f"ACCELERATE_DEEPSPEED_{name}", done[0]).lower()
        if asked not in done:
            flag = f"--deepspeed_{name.lower()}" if name == "CONFIG_FILE" else f"--{name.lower()}"
            wanted = "leave it out" if done == ("none",) else f"pass {flag} {' or '.join(done)}"
            raise ValueError(f"{flag} {asked} was asked for at launch and minilm does not do it: {wanted}")
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError('DeepSpeed was asked for at launch and is not installed: pip install "minilm[deepspeed]"')
    return int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


@contextlib.contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """Inside it accelerate makes of the launch what it makes of one without DeepSpeed."""
    asked = os.environ.pop(_USE, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[_USE] = asked


class ZeroOptimizer(torch.optim.Optimizer):
    """DeepSpeed's optimizer in the place of torch's, whose moments the processes hold in parts."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        inside = engine.optimizer
        flat = inside.fp32_partitioned_groups_flat if _is_stage_3(engine) else inside.single_partition_of_fp32_groups
        # DeepSpeed links moments to parameters at the first step, and then only those that are there before it.
        for part in flat:
            moments = {slot: torch.zeros_like(part) for slot in _SLOTS}
            inside.optimizer.state[part] = {"step": torch.zeros((), device=part.device), **moments}
        if not _is_stage_3(engine):
            inside._lazy_init_hp_params_optimizer_state()

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those of AdamW, for their learning rates."""
        groups: list[dict[str, Any]] = self.engine.optimizer.param_groups
        return groups

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Any]]:  # type: ignore[override]
        """By parameter the step, a tensor, and the moments, each a `Moment`; as that of torch's AdamW."""
        step = next(iter(self.engine.optimizer.optimizer.state.values()))["step"]
        return {
            parameter: {"step": step.clone(), **{slot: Moment(parameter=parameter, slot=slot) for slot in _SLOTS}}
            for parameter in self.engine.module.parameters()
            if parameter.requires_grad
        }

    def clip_and_step(self, max_norm: float) -> Tensor:
        """Update, unless the gradient's norm is not finite; returns that norm, before clipping to `max_norm`."""
        self.engine.optimizer.clip_grad = max_norm
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.engine.device)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing: `clip_and_step` did it."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: `clip_and_step` did it."""

    def restore(self, state: dict[nn.Parameter, dict[str, Tensor]]) -> None:
        """Take the weights that the model has now for its own, and these moments, each a whole tensor."""
        for parameter, slots in state.items():
            _set(parameter, gathered(parameter).detach(), None)
            for slot in _SLOTS:
                _set(parameter, slots[slot].to(self.engine.device), slot)
        step = next(iter(state.values()))["step"]
        for part in self.engine.optimizer.optimizer.state.values():
            part["step"].copy_(step)


def _set(parameter: Any, value: Tensor, slot: str | None) -> None:
    """Set AdamW's copy of a parameter, or one of its moments, to a whole tensor."""
    if not hasattr(parameter, "ds_id"):
        parameter.set_full_hp_param(value, slot)
        return
    # DeepSpeed takes no whole tensor whose size the processes do not divide: the last of them hold padding.
    each, rank = parameter.ds_tensor.numel(), dist.get_rank()
    padded = functional.pad(value.flatten(), (0, each * dist.get_world_size() - value.numel()))
    parameter._z3_optimizer.set_local_hp_param(padded[rank * each : (rank + 1) * each], parameter, slot)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One of AdamW's moments of a parameter, which the processes hold in parts."""

    parameter: nn.Parameter
    slot: str

    def whole(self) -> Tensor:
        """float32, of the parameter's shape; every process calls this, in the same order."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found: Tensor = safe_get_full_optimizer_state(self.parameter, self.slot)
        return found


def gathered(tensor: Tensor) -> Tensor:
    """A tensor as it is; a weight that stage 3 shares out, whole: then every process calls this, in the same order."""
    if not hasattr(tensor, "ds_id"):
        return tensor
    import deepspeed

    _let_go([tensor])
    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


@contextlib.contextmanager
def writable(module: nn.Module) -> Iterator[None]:
    """Inside it the weights that stage 3 shares out are whole; what the main process writes into them is kept."""
    parameters = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    _let_go(parameters)
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield


def _let_go(parameters: Sequence[Any]) -> None:
    """Part again what an evaluation's forward has on its way for a backward that does not come."""
    if any(parameter.ds_status.name == "INFLIGHT" for parameter in parameters):
        parameters[0]._z3_optimizer.empty_partition_cache()


def leave_zero() -> None:
    """Have DeepSpeed forget the process group, which is gone, before the next run of this process."""
    if "deepspeed" in sys.modules:
        from deepspeed.utils import groups

        groups._release_process_group_references()


def size_of(parameter: nn.Parameter) -> int:
    """Elements of a parameter, over all processes."""
    size: int = getattr(parameter, "ds_numel", parameter.numel())
    return size


def _is_stage_3(engine: Any) -> bool:
    return bool(engine.zero_optimization_stage() == 3)


def shard_by_zero(accelerator: Accelerator, head: Head, optimizer: torch.optim.Optimizer, stage: int) -> Any:
    """(the engine, in place of the model, and its `ZeroOptimizer`)."""
    import deepspeed

    size = sum(parameter.numel() for parameter in head.parameters())
    bucket = min(_BUCKET, size + size % 2)  # of an even number of elements
    layer = max((sum(parameter.numel() for parameter in layer.parameters()) for layer in head.layers), default=size)
    head.forward = accelerator.autocast()(head.forward)  # DeepSpeed turns off the one around it
    if (last := head.model.get_output_embeddings()) is not None:  # the loss takes the weights past their module
        deepspeed.zero.register_external_parameter(head, last.weight)
    engine, *_ = deepspeed.initialize(
        model=head,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,  # not what it is, but no gradient is divided by it
            "managed_gradient_accumulation": False,
            "zero_optimization": {
                "stage": stage,
                # DeepSpeed's own numbers are for models of billions, and would keep smaller ones whole.
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                "stage3_prefetch_bucket_size": layer,
                "stage3_max_live_parameters": 2 * layer,
                "stage3_max_reuse_distance": 2 * layer,
            },
            "timers": {"throughput": {"enabled": False}},  # it would wait for the device in each step
        },
    )
    engine.no_sync = contextlib.nullcontext  # each backward hands its gradients on
    engine._backward_prologue_per_tensor = lambda gradient: gradient  # else divided by 1, which makes a tensor of it
    accelerator.deepspeed_engine_wrapped = SimpleNamespace(engine=engine)  # `free_memory` ends it
    held = sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in head.parameters())
    log.info(f"ZeRO-{stage}: of {size:,} parameters, the main process holds {held:,}; of moments its share")
    return engine, ZeroOptimizer(engine)
