"""Fully sharded data parallelism (FSDP2): each process holds a part of every weight, gradient and moment.

A layer's weights are gathered before it runs and let go after it, as in Rajbhandari et al. 2020, "ZeRO", section 5.3.
The steps are those of one process, and so are the checkpoints: any number of processes goes on from them.
"""

import logging
import os
import warnings
from collections.abc import Mapping

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from minilm.distributed.deepspeed import Moment, ZeroOptimizer, gathered, shard_by_zero, zero_stage
from minilm.models.head import Head
from minilm.optim.optimizer import is_fused, unwrapped

log = logging.getLogger("minilm")

# What minilm does, by the variables that `accelerate launch` makes of its flags, and what it takes one left out for.
_ONLY = {
    "FSDP_VERSION": ("2", "1"),
    "FSDP_OFFLOAD_PARAMS": ("false", "false"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "false"),
}


def asked_for_sharding(environment: Mapping[str, str]) -> FullyShardedDataParallelPlugin | None:
    """The sharding that the launcher was asked for, if any. Raises ValueError for kinds that minilm does not do."""
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    for variable, (done, default) in _ONLY.items():
        if (asked := environment.get(variable, default).lower()) != done:
            flag = f"--{variable.lower()}"
            raise ValueError(f"{flag} {asked} was asked for at launch and minilm does not do it: pass {flag} {done}")
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        mixed_precision_policy=MixedPrecisionPolicy(),  # autocast does it, as it does without sharding
        cpu_offload=OffloadPolicy(),
        cpu_ram_efficient_loading=False,  # each process tries the head's shortcuts, which takes the weights
    )


def enable_on_cpus(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Have accelerate shard on CPUs as it does on GPUs: by itself it makes DDP of it there, silently.

    Raises ValueError on a machine with GPUs, which torch would shard on whatever it is told.
    """
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        if torch.accelerator.is_available():
            raise ValueError("FSDP on CPUs needs a machine without GPUs: leave ACCELERATE_USE_CPU or --use_fsdp out")
        for state in (PartialState(), accelerator.state):  # the second copies from the first, time and again
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin


class _InBf16(DistributedDataParallelKwargs):  # type: ignore[misc]
    """For what accelerate wraps in DDP, in a recipe's own loop too."""

    def register_comm_hook(self, model: DistributedDataParallel) -> None:
        model.register_comm_hook(None, _sum_in_bf16)


def _sum_in_bf16(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """torch's hook, which DDP takes on GPUs only, by its name; gloo sums bf16 as well."""
    return bf16_compress_hook(group, bucket)  # type: ignore[arg-type]  # None: of all processes


def reduce_in_bf16(
    accelerator: Accelerator, ddp: DistributedDataParallelKwargs, sharding: FullyShardedDataParallelPlugin | None
) -> None:
    """Have DDP, with these settings, or FSDP2 send the gradients in bf16; they are fp32 before and after."""
    accelerator.ddp_handler = _InBf16(**ddp.to_kwargs())
    if sharding is not None:
        sharding.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)


def distribute(
    accelerator: Accelerator, head: Head, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`accelerator.prepare`, or what the launcher asked for: under FSDP2 each layer becomes a unit of its own.

    Raises ValueError for a model of which a process runs as many forwards as it has lengths, where the weights of each
    layer are gathered in every forward, of all processes together.
    """
    if head.needs_equal_lengths and (accelerator.is_fsdp2 or zero_stage(os.environ) == 3):
        raise ValueError(
            f"{type(head.model).__name__} takes rows of one length at a time, so its weights cannot be shared out: "
            "use --multi_gpu, or ZeRO's stage 2"
        )
    if (stage := zero_stage(os.environ)) is not None:
        sharded: tuple[nn.Module, torch.optim.Optimizer] = shard_by_zero(accelerator, head, optimizer, stage)
        return sharded
    if accelerator.is_fsdp2:
        layers = {type(layer).__name__ for layer in head.layers}
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(layers)
        head.forward = accelerator.autocast()(head.forward)  # as DDP's is prepared
        # Some layers end in a view; nothing changes it in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    model, wrapped = accelerator.prepare(head, optimizer)
    if accelerator.scaler is not None:  # else the wrapper does nothing, but looks for other libraries in every step
        optimizer = wrapped
    if accelerator.is_fsdp2:
        for module in model.modules():
            if isinstance(module, FSDPModule) and accelerator.device.type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo takes no means
        parameters = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
        here, all_of_them = sum(p.to_local().numel() for p in parameters), sum(p.numel() for p in parameters)
        log.info(f"FSDP2: of {all_of_them:,} parameters, the main process holds {here:,}")
    return model, optimizer


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the launcher asked for FSDP2 or ZeRO."""
    return accelerator.is_fsdp2 or zero_stage(os.environ) is not None


def clip(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer | ZeroOptimizer, max_norm: float
) -> Tensor:
    """Have the next `optimizer.step()` clip the gradient to `max_norm`, and return its norm before; ZeRO steps at once.

    A fused kernel divides by `grad_scale`, which spares a pass over the gradients; others are clipped here and now.
    """
    if isinstance(optimizer, ZeroOptimizer):
        return optimizer.clip_and_step(max_norm)
    if accelerator.scaler is not None or accelerator.is_fsdp2 or not is_fused(optimizer):
        return whole(accelerator.clip_grad_norm_(model.parameters(), max_norm))
    fused = unwrapped(optimizer)
    parameters = [parameter for group in fused.param_groups for parameter in group["params"]]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    fused.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1)  # as clip_grad_norm_ has it
    return norm


def whole(tensor: Tensor | Moment) -> Tensor:
    """The tensor, gathered where it is sharded: then every process must call this, in the same order."""
    if isinstance(tensor, Moment):
        return tensor.whole()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else gathered(tensor)


def part_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Of a whole tensor, which every process has, what this process holds of `parameter`; a scalar stays as it is."""
    if not isinstance(parameter, DTensor) or tensor.ndim == 0:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
