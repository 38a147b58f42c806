"""`batch.micro_tokens=auto`: minilm times a few micro-batch sizes before the first step, and chooses one."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from minilm.config import Config
from minilm.data.micro_batch import MicroBatch, loss_sum
from minilm.distributed.hardware import peak_memory
from minilm.models.head import Head
from minilm.runs.checkpoint import Checkpoint
from minilm.utils.launch_variables import count_local_processes

log = logging.getLogger("minilm")

_SMALLEST_TOKENS = 512  # the first size; each further size is twice the one before
_LIMIT_SECONDS = 8.0  # after this time, no larger size is tried
_REPEATS = 3  # the fastest of these passes counts, since other programs slow some of them down
# A size may take this many times the shortest time per token. The smallest such size needs the least memory.
_FASTEST_TOLERANCE = 1.03
_GIVE_UP_FACTOR = 1.1  # after a size that is slower than the fastest by this factor, no larger size is tried
_MEMORY_SHARE = 0.8  # the share of the free memory that a run may use


def resolve_micro_tokens(
    config: Config,
    accelerator: Accelerator,
    head: Head,
    checkpoint: Checkpoint | None,
    first_step: Callable[[Config], Sequence[MicroBatch]],
) -> Config:
    """Return `config` with a number of tokens in place of `auto`, the same number on every process.

    Each process times the forward and backward pass of the largest micro-batch that `first_step` returns for a size,
    and drops the gradients. A resumed run keeps the number of its checkpoint, so that it repeats to the bit. Raises
    ValueError if the smallest size does not fit into the memory, and for a sharded run.
    """
    if config.batch.micro_tokens != "auto":
        return config
    if accelerator.is_fsdp2:
        raise ValueError("batch.micro_tokens=auto does not work with sharding: give a number of tokens")
    if checkpoint is not None:
        return _set_micro_tokens(config, checkpoint.config["batch"]["micro_tokens"])
    log.info("timing micro-batches of several sizes …")
    times = _try_sizes(accelerator, head, lambda size: first_step(_set_micro_tokens(config, size)))
    all_times: list[dict[int, float]] = gather_object([times])
    common = [size for size in times if all(size in one for one in all_times)]
    worst = {size: max(one[size] for one in all_times) for size in common}
    if not worst:
        raise ValueError(
            f"batch.micro_tokens=auto: {_SMALLEST_TOKENS} tokens do not fit into the memory: set a lower number"
        )
    best = choose_fastest(worst)
    if accelerator.is_main_process:
        speeds = ", ".join(f"{1 / seconds:,.0f} tokens/s of {size:,}" for size, seconds in worst.items())
        log.info(f"micro-batches of up to {best:,} tokens (tried: {speeds})")
    return _set_micro_tokens(config, best)


def micro_tokens_of(config: Config) -> int:
    """Return `batch.micro_tokens`. Raise ValueError if it is `auto` and has not been resolved."""
    if config.batch.micro_tokens == "auto":
        raise ValueError("batch.micro_tokens=auto works only in the loop of minilm.train: give a number of tokens")
    return config.batch.micro_tokens


def choose_fastest(seconds: dict[int, float]) -> int:
    """Return the smallest size that takes at most `_FASTEST_TOLERANCE` times the fewest seconds per token."""
    return min(size for size, taken in seconds.items() if taken <= _FASTEST_TOLERANCE * min(seconds.values()))


def _set_micro_tokens(config: Config, micro_tokens: int) -> Config:
    return replace(config, batch=replace(config.batch, micro_tokens=micro_tokens))


def _try_sizes(
    accelerator: Accelerator, head: Head, micro_batches: Callable[[int], Sequence[MicroBatch]]
) -> dict[int, float]:
    """Return the seconds per token by size. Each size is twice the one before, until one is too large or too slow."""
    times: dict[int, float] = {}
    training, began, room = head.training, time.perf_counter(), _FreeMemory(accelerator, head)
    head.train()
    size = _SMALLEST_TOKENS
    while True:
        batches = micro_batches(size)
        largest = max(batches, key=lambda batch: len(batch.input_ids_T))
        # If the loss compares the examples of a step, all micro-batches but one have another forward pass before.
        tokens = sum(len(batch.input_ids_T) for batch in batches)
        again = 1 - len(largest.input_ids_T) / tokens if head.coupled_rows else 0.0
        try:
            taken = min(_time_pass(accelerator, head, largest, again=again) for _ in range(_REPEATS))
        except torch.OutOfMemoryError:
            break
        times[size] = taken / max(1, len(largest.input_ids_T))
        late = time.perf_counter() - began > _LIMIT_SECONDS
        slow = times[size] > _GIVE_UP_FACTOR * min(times.values())
        if len(batches) == 1 or late or slow or not room.fits_twice():
            break
        size *= 2
    head.train(training)
    return times


def _time_pass(accelerator: Accelerator, head: Head, batch: MicroBatch, *, again: float = 0.0) -> float:
    """Return the seconds of one forward and backward pass, and `again` times those of a forward without gradients."""
    batch = batch.to(accelerator.device)
    before = 0.0
    if again:
        mark = time.perf_counter()
        with torch.no_grad(), accelerator.autocast():
            nats = loss_sum(head, batch)
        _wait(nats)
        before = again * (time.perf_counter() - mark)
    mark = time.perf_counter()
    with accelerator.autocast():
        nats = loss_sum(head, batch)
    torch.autograd.grad(nats, [p for p in head.parameters() if p.requires_grad])
    _wait(nats)
    return before + time.perf_counter() - mark


def _wait(nats: Tensor) -> None:
    """Wait for the device to finish."""
    float(nats.detach())
    if nats.device.type == "cuda":
        torch.cuda.synchronize(nats.device)


class _FreeMemory:
    """The memory that this process may still use, in bytes: device memory on a GPU, else its share of the host's."""

    def __init__(self, accelerator: Accelerator, head: Head) -> None:
        self.device = accelerator.device
        trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
        self.moments = 2 * 4 * trained
        if self.device.type == "cuda":
            self.held, self.free = torch.cuda.memory_allocated(self.device), torch.cuda.mem_get_info(self.device)[0]
        else:
            share = psutil.virtual_memory().available // count_local_processes(os.environ)
            self.held, self.free = psutil.Process().memory_info().rss, share

    def fits_twice(self) -> bool:
        """Return whether twice the memory used so far would fit, together with the optimizer's moments."""
        used = peak_memory(self.device) - self.held
        return 2 * used + self.moments < _MEMORY_SHARE * self.free
