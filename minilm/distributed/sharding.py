"""Fully sharded data parallelism (FSDP2): each process holds a part of every weight, gradient and moment.

A layer's weights are gathered before it runs and freed after it, as in Rajbhandari et al. 2020, "ZeRO", section 5.3.
Steps and checkpoints are those of one process, up to rounding. Any number of processes can resume from such a
checkpoint.
"""

import logging
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

from minilm.models.head import Head

log = logging.getLogger("minilm")

# For each variable that `accelerate launch` sets: the only value that minilm supports, and accelerate's default.
_SUPPORTED = {
    "FSDP_VERSION": ("2", "1"),
    "FSDP_OFFLOAD_PARAMS": ("false", "false"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "false"),
}


def read_sharding(environment: Mapping[str, str]) -> FullyShardedDataParallelPlugin | None:
    """Return the settings of FSDP2 if the launcher was asked for it, or else None.

    Raises ValueError for kinds of sharding that minilm does not support: DeepSpeed, FSDP1, offloading to CPUs and
    accelerate's activation checkpointing.
    """
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError("minilm does not support DeepSpeed: pass --use_fsdp --fsdp_version 2 in place of its flags")
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    for variable, (supported, default) in _SUPPORTED.items():
        if (value := environment.get(variable, default).lower()) != supported:
            flag = f"--{variable.lower()}"
            raise ValueError(
                f"the launch asks for {flag} {value}, which minilm does not support: pass {flag} {supported}"
            )
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        # Autocast lowers the precision of products, as it does without sharding.
        mixed_precision_policy=MixedPrecisionPolicy(),
        cpu_offload=OffloadPolicy(),
        # Each process tries the shortcuts of the head, and needs the weights for that.
        cpu_ram_efficient_loading=False,
    )


def enable_on_cpus(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Make accelerate shard on CPUs, where it uses DDP without a warning even if FSDP is asked for.

    Raises ValueError on a machine with GPUs, since torch would shard on those.
    """
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        if torch.accelerator.is_available():
            raise ValueError("FSDP on CPUs needs a machine without GPUs: leave ACCELERATE_USE_CPU or --use_fsdp out")
        # Each new AcceleratorState copies from PartialState, so both must change.
        for state in (PartialState(), accelerator.state):
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin


class _SumInBf16(DistributedDataParallelKwargs):  # type: ignore[misc]
    """DDP's settings with a hook that sends gradients in bf16. accelerate registers it with each model it wraps."""

    def register_comm_hook(self, model: DistributedDataParallel) -> None:
        model.register_comm_hook(None, _sum_in_bf16)


def _sum_in_bf16(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """Sum a bucket of gradients in bf16.

    It calls torch's hook. DDP refuses that hook by its name on CPUs, though gloo sums bf16.
    """
    return bf16_compress_hook(group, bucket)  # type: ignore[arg-type]  # None: of all processes


def reduce_in_bf16(
    accelerator: Accelerator, ddp: DistributedDataParallelKwargs, sharding: FullyShardedDataParallelPlugin | None
) -> None:
    """Make DDP with these settings, or FSDP2, send gradients in bf16. They are float32 before and after."""
    accelerator.ddp_handler = _SumInBf16(**ddp.to_kwargs())
    if sharding is not None:
        sharding.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)


def distribute(
    accelerator: Accelerator, head: Head, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model and the optimizer as `accelerator.prepare` does. Under FSDP2 each layer becomes a unit.

    Raises ValueError under FSDP2 for a model that takes rows of one length only. The number of forwards would then
    differ between processes, but all processes gather a layer's weights together in every forward.
    """
    sharded = accelerator.is_fsdp2
    if sharded:
        if head.needs_equal_lengths:
            raise ValueError(
                f"{type(head.model).__name__} takes rows of one length at a time, so its weights cannot be sharded: "
                "use --multi_gpu"
            )
        layers = {type(layer).__name__ for layer in head.layers}
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(layers)
        # accelerate wraps the forward of a model for DDP in autocast, but not that of a model for FSDP2.
        head.forward = accelerator.autocast()(head.forward)  # type: ignore[method-assign]
        # Some layers return a view. Nothing changes it in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    model, wrapped = accelerator.prepare(head, optimizer)
    # accelerate's wrapper of the optimizer looks for other libraries in every step, and only a scaler needs it.
    if accelerator.scaler is not None:
        optimizer = wrapped
    if sharded:
        for module in model.modules():
            if isinstance(module, FSDPModule) and accelerator.device.type == "cpu":
                # gloo computes sums but not means.
                module.set_force_sum_reduction_for_comms(True)
        parameters = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
        here, total = sum(p.to_local().numel() for p in parameters), sum(p.numel() for p in parameters)
        log.info(f"FSDP2: of {total:,} parameters, the main process holds {here:,}")
    return model, optimizer


def gather_whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor. If it is sharded, every process must call this function, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of `tensor` that belongs to this process's shard of `parameter`.

    Every process has the whole tensor, so that nothing is sent. A scalar is returned unchanged, and so is any tensor
    if `parameter` is not sharded.
    """
    if not isinstance(parameter, DTensor) or tensor.ndim == 0:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
