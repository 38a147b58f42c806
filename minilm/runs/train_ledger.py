"""The losses of the training examples in each epoch, in the ledger of a run (`run.train_ledger`).

`train-<epoch>.safetensors` in the folder `ledger` has, for the E training examples of the run, `loss` float32[E], the
sum of the losses of each example's targets in nats, and `targets` int32[E], their number; -1 for an example that the
epoch has not read. The examples of all periods of the run have one numbering (`JoinedExamples`).
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor

from minilm.config import Config
from minilm.data.batch_plan import Step
from minilm.data.corpus import PreparedData
from minilm.data.micro_batch import MicroBatch
from minilm.data.phased_batches import RunPlan
from minilm.runs.ledger import LEDGER, LEDGER_BYTES, find_numbered, read_arrays
from minilm.utils.atomic_files import write_atomically

log = logging.getLogger("minilm")

UNREAD = -1
"""The number of targets of an example that an epoch has not read."""


@dataclass(frozen=True, kw_only=True)
class _PendingStep:
    """The losses of a step on their way to the host."""

    example_N: NDArray[np.int64]
    losses_N: Tensor
    counted_N: NDArray[np.bool_]
    """Which of the targets count in the loss of the step."""


class TrainLedger:
    """Collects the losses of the training examples, and writes them at checkpoints and at the end of each epoch.

    Every process of the job has one, and calls its methods at the same steps. The losses of a step are copied from the
    device while the next step runs. Each process adds up those of its own micro-batches; `flush` joins them.

    folder: the output folder. steps: the number of steps that a resumed run has made.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, prepared: PreparedData, plan: RunPlan, steps: int
    ) -> None:
        self._folder, self._accelerator = folder, accelerator
        self._lengths_E = np.concatenate([examples.lengths for examples in prepared.all_train])
        self._identity = identify_train_examples(prepared)
        self._pending: _PendingStep | None = None
        self._copied = torch.Event("cuda") if accelerator.device.type == "cuda" else None
        self._start_epoch(plan.epoch_of(steps))
        if not accelerator.is_main_process:
            return
        for path in find_train_losses(folder):
            if epoch_of(path) > self._epoch:
                path.unlink()
            elif epoch_of(path) == self._epoch:
                self._continue(path, plan, steps)

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._loss_E = np.zeros(len(self._lengths_E), np.float32)
        self._targets_E = np.full(len(self._lengths_E), UNREAD, np.int32)

    def _continue(self, path: Path, plan: RunPlan, steps: int) -> None:
        """Take over what the epoch has before the step, of a file that a later step may have written."""
        try:
            stored, _ = read_arrays(path)
        except ValueError as error:
            log.warning(f"{error}; so this epoch of the ledger begins after step {steps:,}")
            return
        first = steps
        while first and plan.epoch_of(first - 1) == self._epoch:
            first -= 1
        for step in range(first, steps):
            ids = plan.examples_of(step)
            self._loss_E[ids], self._targets_E[ids] = stored["loss"][ids], stored["targets"][ids]

    def record(self, step: Step, micro_batches: Sequence[MicroBatch], losses: Sequence[Tensor]) -> None:
        """Record a step.

        micro_batches: those of this process, on the CPU. losses: the losses of the targets of each, on the device.
        """
        self._add_pending()
        if step.epoch != self._epoch:
            self.flush()
            self._start_epoch(step.epoch)
        parts = step.micro_batches[self._accelerator.process_index]
        examples = [self._find_examples(batch, ids) for batch, ids in zip(micro_batches, parts, strict=True)]
        copies = torch.cat([*losses]).to("cpu", non_blocking=self._copied is not None)
        if self._copied is not None:
            self._copied.record()
        counted = [
            np.ones(len(batch.target_ids_N), bool) if batch.counted_N is None else batch.counted_N.numpy()
            for batch in micro_batches
        ]
        self._pending = _PendingStep(
            example_N=np.concatenate(examples), losses_N=copies, counted_N=np.concatenate(counted)
        )
        # An example may have no target.
        ids = np.concatenate(parts)
        self._targets_E[ids] = 0

    def _find_examples(self, batch: MicroBatch, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the example of each target of a micro-batch with the rows of these examples."""
        if batch.example_ids_N is not None:
            return ids
        begin_R = np.cumsum([0, *self._lengths_E[ids]])[:-1]
        found: NDArray[np.int64] = ids[np.searchsorted(begin_R, batch.target_index_N.numpy(), side="right") - 1]
        return found

    def _add_pending(self) -> None:
        if self._pending is None:
            return
        if self._copied is not None:
            self._copied.synchronize()
        pending, self._pending = self._pending, None
        losses_N = pending.losses_N.double().numpy()[pending.counted_N]
        ids_U, at_N = np.unique(pending.example_N[pending.counted_N], return_inverse=True)
        sums_U = np.bincount(at_N, losses_N, minlength=len(ids_U))
        self._loss_E[ids_U] = sums_U
        self._targets_E[ids_U] = np.bincount(at_N, minlength=len(ids_U))

    def flush(self) -> None:
        """Write the losses of the epoch so far. Every process calls it."""
        self._add_pending()
        # Only one process has read an example in an epoch. So the sums are exact.
        if self._accelerator.num_processes > 1:
            device = self._accelerator.device
            loss_E, read_E = (
                self._accelerator.reduce(torch.from_numpy(array).to(device)).cpu().numpy()
                for array in (self._loss_E, self._targets_E - UNREAD)
            )
            targets_E = read_E + UNREAD
            if self._accelerator.is_main_process:
                self._loss_E, self._targets_E = loss_E, targets_E
            else:
                self._start_epoch(self._epoch)
        if not self._accelerator.is_main_process:
            return
        (self._folder / LEDGER).mkdir(exist_ok=True)
        arrays = {"loss": self._loss_E, "targets": self._targets_E}
        path = self._folder / LEDGER / f"train-{self._epoch}.safetensors"
        write_atomically(path, save(arrays, {"identity": self._identity}))
        size = sum(array.nbytes for array in arrays.values())
        for old in find_train_losses(self._folder)[: -max(2, LEDGER_BYTES // size)]:
            old.unlink()


def start_train_ledger(
    folder: Path, config: Config, accelerator: Accelerator, prepared: PreparedData, plan: RunPlan, steps: int
) -> TrainLedger | None:
    """Return the ledger if `run.train_ledger` asks for one. Else remove what an earlier run left in the folder."""
    if config.run.train_ledger:
        return TrainLedger(folder, accelerator, prepared, plan, steps)
    if accelerator.is_main_process:
        for path in find_train_losses(folder):
            path.unlink()
    return None


def identify_train_examples(prepared: PreparedData) -> str:
    """Return what the training examples of a run are, as JSON."""
    return json.dumps([examples.identity() for examples in prepared.all_train])


def find_train_losses(folder: Path) -> list[Path]:
    """Return the files of `TrainLedger` in an output folder, in the order of their epochs."""
    return find_numbered(folder, "train")


def epoch_of(path: Path) -> int:
    """Return the epoch, from 0, of a file of `find_train_losses`."""
    return int(path.stem.removeprefix("train-"))


def read_train_losses(path: Path) -> tuple[NDArray[np.float64], str]:
    """Return the mean loss of the targets of each example, and the result of `identify_train_examples`.

    The mean is NaN for an example that the epoch has not read, or that had no target in it. Raise ValueError if the
    file cannot be read.
    """
    arrays, metadata = read_arrays(path)
    if arrays.keys() != {"loss", "targets"} or "identity" not in metadata:
        raise ValueError(f"{path} is not a file of a ledger: remove it")
    mean_E = np.full(len(arrays["loss"]), np.nan)
    np.divide(arrays["loss"], arrays["targets"], out=mean_E, where=arrays["targets"] > 0)
    return mean_E, metadata["identity"]
