"""`batch.micro_tokens=auto`: the tokens of a forward pass, found by trying a few sizes before the first step."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from minilm.batch import MicroBatch, loss_sum
from minilm.checkpoint import Checkpoint
from minilm.config import Config
from minilm.hardware import peak_memory
from minilm.head import Head
from minilm.job import processes_here
from minilm.sharding import is_sharded

log = logging.getLogger("minilm")

_SMALLEST = 512  # tokens; each size is twice the one before
_SECONDS = 8.0  # after which no larger size is tried
_REPEATS = 3
_NEAR = 1.03  # a size as good as this many times the fastest one's time is taken if it is smaller
_SLOW = 1.1  # this much above the fastest time, larger sizes are given up
_ROOM = 0.8  # share of the free memory that a run may use


def resolve_micro_tokens(
    config: Config,
    accelerator: Accelerator,
    head: Head,
    checkpoint: Checkpoint | None,
    first_step: Callable[[Config], Sequence[MicroBatch]],
) -> Config:
    """`config` with a number of tokens in place of `auto`; the same one on every process.

    Each process times the largest micro-batch that `first_step` gives under a configuration, forward and backward, and
    the gradients are dropped. A run that goes on keeps the number that it had, so that it repeats to the bit. Raises
    ValueError where the smallest size does not fit into the memory, and for a sharded run.
    """
    if config.batch.micro_tokens != "auto":
        return config
    if is_sharded(accelerator):
        raise ValueError("batch.micro_tokens=auto tries a model that is not sharded: give a number of tokens")
    if checkpoint is not None:
        return _with(config, checkpoint.config["batch"]["micro_tokens"])
    tried = _try_sizes(accelerator, head, lambda size: first_step(_with(config, size)))
    everyones: list[dict[int, float]] = gather_object([tried])
    worst = {size: max(found[size] for found in everyones) for size in tried if all(size in f for f in everyones)}
    if not worst:
        raise ValueError(f"batch.micro_tokens=auto: {_SMALLEST} tokens do not fit into the memory; set a lower number")
    found = fastest(worst)
    if accelerator.is_main_process:
        speeds = ", ".join(f"{1 / seconds:,.0f} tokens/s of {size:,}" for size, seconds in worst.items())
        log.info(f"micro-batches of up to {found:,} tokens (tried: {speeds})")
    return _with(config, found)


def micro_tokens_of(config: Config) -> int:
    """`batch.micro_tokens`, once it is settled; ValueError for `auto` where nothing settles it."""
    if config.batch.micro_tokens == "auto":
        raise ValueError("batch.micro_tokens=auto is for the loop of minilm.train: give this one a number of tokens")
    return config.batch.micro_tokens


def fastest(seconds: dict[int, float]) -> int:
    """The smallest size whose seconds a token are near the fewest."""
    return min(size for size, taken in seconds.items() if taken <= _NEAR * min(seconds.values()))


def _with(config: Config, micro_tokens: int) -> Config:
    return replace(config, batch=replace(config.batch, micro_tokens=micro_tokens))


def _try_sizes(
    accelerator: Accelerator, head: Head, micro_batches: Callable[[int], Sequence[MicroBatch]]
) -> dict[int, float]:
    """Seconds a token by size, while larger ones fit and promise to be faster."""
    found: dict[int, float] = {}
    training, began, room = head.training, time.perf_counter(), _Room(accelerator, head)
    head.train()
    size = _SMALLEST
    while True:
        batches = micro_batches(size)
        largest = max(batches, key=lambda batch: len(batch.input_ids_T))
        try:
            taken = min(_seconds(accelerator, head, largest) for _ in range(_REPEATS))
        except torch.OutOfMemoryError:
            break
        found[size] = taken / max(1, len(largest.input_ids_T))
        late = time.perf_counter() - began > _SECONDS
        if len(batches) == 1 or late or found[size] > _SLOW * min(found.values()) or not room.for_twice():
            break
        size *= 2
    head.train(training)
    return found


def _seconds(accelerator: Accelerator, head: Head, batch: MicroBatch) -> float:
    """Of a forward and a backward."""
    mark = time.perf_counter()
    with accelerator.autocast():
        nats = loss_sum(head, batch.to(accelerator.device))
    torch.autograd.grad(nats, [p for p in head.parameters() if p.requires_grad])
    float(nats.detach())  # waits for the device
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize(accelerator.device)
    return time.perf_counter() - mark


class _Room:
    """What is left of a process's memory."""

    def __init__(self, accelerator: Accelerator, head: Head) -> None:
        self.device = accelerator.device
        trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
        self.moments = 2 * 4 * trained
        if self.device.type == "cuda":
            self.held, self.free = torch.cuda.memory_allocated(self.device), torch.cuda.mem_get_info(self.device)[0]
        else:
            share = psutil.virtual_memory().available // processes_here(os.environ)
            self.held, self.free = psutil.Process().memory_info().rss, share

    def for_twice(self) -> bool:
        """Whether twice the work of what was done until now would fit, beside the optimizer's moments."""
        used = peak_memory(self.device) - self.held
        return 2 * used + self.moments < _ROOM * self.free
