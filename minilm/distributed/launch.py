"""The start and the end of each process of a run: the accelerator, agreement between processes, and cleaning up."""

import contextlib
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    AutocastKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)

from minilm.config import Run
from minilm.distributed.hardware import (
    fair_threads,
    keep_few_kernels,
    keep_freed_memory,
    repeat_to_the_bit,
    set_deterministic,
)
from minilm.distributed.launch_checks import check_devices, check_launch
from minilm.distributed.precision import Precision, choose_precision
from minilm.distributed.sharding import enable_on_cpus, read_sharding, reduce_in_bf16
from minilm.utils.launch_variables import check_launch_variables, hide_leftover_ranks
from minilm.utils.signals import restore_default_signals

T = TypeVar("T")

# Lists, so that functions can change them.
_staying = [False]  # whether `finish` stays in the process group, for the next run
_joined = [False]  # whether minilm itself joined the process group, and so must leave it
_STATES = (PartialState, AcceleratorState, GradientState)
_undo = list[Callable[[], None]]()  # functions that restore the state that the process had before the run


def join_job(run: Run) -> PartialState:
    """Join the other processes of the job, unless that is done, and return this process's rank and device.

    Raises ValueError for a wrong launch.
    """
    # This call refuses kinds of sharding that minilm does not support.
    read_sharding(os.environ)
    _remember_process()
    cpu = _on_cpu()
    check_devices(0 if cpu else torch.accelerator.device_count(), os.environ)
    outside = not dist.is_initialized()
    if outside:
        check_launch_variables(os.environ)
    with restore_default_signals(), hide_leftover_ranks():
        state = PartialState(cpu=cpu, timeout=timedelta(seconds=run.timeout))
    _joined[0] |= outside and dist.is_initialized()
    check_launch(state.num_processes, os.environ)
    return state


def _on_cpu() -> bool:
    return bool(parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def start(run: Run) -> tuple[Accelerator, Precision]:
    """Return the accelerator of this process, and the precision that the main process chose.

    `finish` or `restore_on_error` restores the state that the process had before. Where a run ended without either,
    this function restores it first. Raises ValueError for a wrong launch.
    """
    if not _staying[0]:
        restore_process()
    try:
        return _start(run)
    except BaseException:
        restore_process()
        raise


def _start(run: Run) -> tuple[Accelerator, Precision]:
    state = join_job(run)
    sharding = read_sharding(os.environ)
    if threads := fair_threads(os.environ):
        torch.set_num_threads(threads)
    keep_freed_memory(state.device)
    keep_few_kernels(run.precision)
    repeat_to_the_bit(run.deterministic)
    precision = broadcast_object_list([choose_precision(run.precision, state.device)])[0]
    mode = "no" if precision.name == "fp32" else precision.name
    # The replacement of broadcast_buffers, forward_sync_buffers, is not in every release of torch that minilm supports.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    # With views, DDP does not need a second copy of every gradient. No model here has a buffer that differs between
    # processes.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    # Autocast keeps the half-precision copy of a weight until the end of the step. FSDP2 frees the weight before that.
    autocast = AutocastKwargs(cache_enabled=sharding is None)
    # The loop accumulates gradients itself. accelerate must not do it again if the environment asks for it.
    once = GradientAccumulationPlugin(num_steps=1)
    _check_combination(run, mode, state.device, sharded=sharding is not None)
    _check_earlier(mode, state.device)
    with hide_leftover_ranks():
        accelerator = Accelerator(
            mixed_precision=mode,
            cpu=_on_cpu(),
            kwargs_handlers=[ddp, autocast],
            fsdp_plugin=sharding,
            gradient_accumulation_plugin=once,
        )
    if run.reduce_dtype == "bf16":
        reduce_in_bf16(accelerator, ddp, sharding)
    enable_on_cpus(accelerator, sharding)
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP):
        raise ValueError(f"the launch asks for {kind.value}, which has not been tried with minilm: use --multi_gpu")
    return accelerator, precision


def _check_combination(run: Run, mode: str, device: torch.device, *, sharded: bool) -> None:
    """Raise ValueError for settings that do not work together, or that have not been tried together."""
    if run.compile and sharded:
        raise ValueError("run.compile has not been tried with sharding: leave one of them out")
    if run.compile and device.type == "cpu":
        raise ValueError("run.compile is for GPUs: on CPUs compiled layers take as long as others. Leave it out")
    if sharded and mode == "fp16":
        raise ValueError("fp16 has not been tried with sharding: use --run.precision bf16, or fp32")


def _remember_process() -> None:
    """Store the state for `restore_process`: torch's settings, and the state that accelerate shares in the process."""
    if _undo:
        return
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    shared = [(state._shared_state, dict(state._shared_state)) for state in _STATES]

    def undo() -> None:
        for now, before in shared:
            now.clear()
            now.update(before)
        torch.set_num_threads(threads)
        set_deterministic(deterministic, warn_only=warn_only)

    _undo.append(undo)


def restore_process() -> None:
    """Restore the state that the process had before the run, including an Accelerator that the user made."""
    while _undo:
        _undo.pop()()


@contextlib.contextmanager
def restore_on_error() -> Iterator[None]:
    """If the block raises, restore the state that the process had before the run, so that another `train` can follow.

    The process stays in the process group, since all processes of a job end or continue together.
    """
    try:
        yield
    except BaseException:
        restore_process()
        raise


def _check_earlier(mode: str, device: torch.device) -> None:
    """Raise ValueError if an Accelerator of the user has another precision or device. accelerate allows one of each."""
    if not (earlier := AcceleratorState._shared_state):
        return
    theirs = earlier["_mixed_precision"]
    if theirs != mode:
        names = [{"no": "fp32"}.get(name, name) for name in (theirs, mode)]
        raise ValueError(
            f"this process made an Accelerator before, for {names[0]}, and the run is in {names[1]}: set run.precision "
            f"to {names[0]}, or make that Accelerator after the run"
        )
    if earlier["device"].type != device.type:
        raise ValueError(
            f"this process made an Accelerator before, for {earlier['device'].type}, and the run is on {device.type}: "
            "make that Accelerator after the run"
        )


@contextlib.contextmanager
def on_all_ranks() -> Iterator[None]:
    """Turn a ValueError that one process raises inside the block into one on all processes.

    Otherwise the others would wait for a process that has given up. Every process must run the block, and nothing in
    it may communicate with the other processes.
    """
    try:
        yield
    except ValueError as error:
        _share_error(str(error))
        raise
    _share_error(None)


def _share_error(message: str | None) -> None:
    """Raise ValueError with the first message that any process has. Every process must call this function."""
    for one in gather_object([message]):
        if one is not None:
            raise ValueError(one)


def broadcast_from_main(work: Callable[[], T]) -> T:
    """Return on all processes what `work` returns on the main process. If it raises ValueError, all processes do."""
    result, message = _attempt(work) if PartialState().is_main_process else (None, None)
    result, message = broadcast_object_list([result, message])
    if message is not None:
        raise ValueError(message)
    return cast(T, result)


def _attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return the result of `work` and None, or None and the message of its ValueError."""
    try:
        return work(), None
    except ValueError as error:
        return None, str(error)


def local_main_process_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Return the result of `work`, which the main process of each host runs before the others.

    The others then find its results in the cache. A ValueError on one process becomes one on all. The work may take
    hours. So the processes wait in a separate process group with a timeout of a day in place of `run.timeout`, and
    they receive signals while they wait.
    """
    group = None
    if accelerator.num_processes > 1:
        with restore_default_signals():
            group = dist.new_group(backend="gloo", timeout=timedelta(days=1))

    def wait_for_everyone() -> None:
        if group is not None:
            arrival = dist.barrier(group, async_op=True)
            while not arrival.is_completed():
                time.sleep(0.02)
            arrival.wait()

    if not accelerator.is_local_main_process:
        wait_for_everyone()
    result, message = _attempt(work)
    if accelerator.is_local_main_process:
        wait_for_everyone()
    wait_for_everyone()
    if group is not None:
        dist.destroy_process_group(group)
    _share_error(message)
    return cast(T, result)


@contextlib.contextmanager
def lost_peer_as_error(advice: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn an error that comes from the loss of another process into a ConnectionError of one line.

    The line ends with the sentence that `advice` returns.
    """
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if not isinstance(error, dist.DistError) and not re.search(r"gloo|NCCL|Application timeout", message):
            raise
        # The first sentence, without the place in torch's source before it and torch's advice after it.
        reason = re.sub(r"^\[\S+\] ", "", message.splitlines()[0]).split(". ")[0]
        hint = "" if advice is None else f"; {advice()}"
        raise ConnectionError(f"lost contact with another process of the job ({reason}){hint}") from error


def finish(accelerator: Accelerator) -> None:
    """End the trackers, leave the process group and restore the process, so that `train` can be called again.

    The caller must delete DDP first. If DDP were the last owner of the group, its destructor would hold Python's global
    lock while it waits for threads of gloo, which wait for that lock.
    """
    for tracker in accelerator.trackers:
        tracker.finish()
    if not _staying[0]:
        _leave_group()
    restore_process()


@contextlib.contextmanager
def one_job() -> Iterator[None]:
    """Let `finish` stay in the process group inside the block, so that the next `start` continues in it.

    If a process rejoins a group at the same address at once, another process may not have left it yet.
    """
    _staying[0] = True
    try:
        yield
    finally:
        _staying[0] = False
    _leave_group()
    restore_process()


def _leave_group() -> None:
    """Leave the process group, unless the process was in it before the run."""
    if _joined[0] and dist.is_initialized():
        dist.destroy_process_group()
    _joined[0] = False
