"""Exact evaluation: every evaluation example is evaluated once, and the processes share the work.

Axes: T tokens and N targets of the micro-batch, V ids of the vocabulary, E examples, P processes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from minilm.data.batch_plan import deal_micro_batches
from minilm.data.corpus import Examples
from minilm.data.micro_batch import Collator, LanguageCollator, MicroBatch, target_losses
from minilm.models.temporary_changes import evaluation_mode
from minilm.objectives.metrics import LANGUAGE_MODEL_FIGURES, EvaluationTotals
from minilm.utils.progress import show_progress


@dataclass(frozen=True, kw_only=True)
class LanguageModelEvaluator:
    """The evaluation of a language model: the losses of all targets are summed in float64 and divided once.

    Raises ValueError if the examples hold no target.
    """

    examples: Examples
    """The evaluation examples, with `text_bytes`."""
    collator: LanguageCollator
    micro_tokens: int
    """Maximum number of tokens in a forward pass, padding included. The figures do not depend on it."""
    unigram_nats_V: NDArray[np.float64]
    """-ln p of each id under the unigram model of the training tokens."""

    def __post_init__(self) -> None:
        ids = np.arange(len(self.examples))
        if not any(self.collator([self.examples[int(i)]], ids[i : i + 1], epoch=0).target_count for i in ids):
            raise ValueError("the evaluation documents hold no target: give more documents, or longer ones")

    names = LANGUAGE_MODEL_FIGURES

    def __call__(self, accelerator: Accelerator, model: nn.Module) -> EvaluationTotals:
        """Evaluate every example once. The processes share the examples, and all return the same totals.

        The targets are those of epoch 0. The forward passes do not depend on the number of processes. Therefore the
        totals are equal to the bit for the same model on the same hardware with the same number of threads.
        """
        nats: list[Tensor] = []
        places: list[NDArray[np.int64]] = []
        lengths_E = self.examples.lengths
        loss_E = np.zeros(len(self.examples))
        targets_E, bytes_E = np.zeros((2, len(self.examples)), np.int64)
        targets_V = np.zeros(len(self.unigram_nats_V), np.int64)
        with evaluation_mode(model):
            for ids, batch in iterate_local_batches(accelerator, self.examples, self.collator, self.micro_tokens):
                targets_V += np.bincount(batch.target_ids_N.numpy(), minlength=len(targets_V))
                ends = np.cumsum(lengths_E[ids])
                places.append(ids[np.searchsorted(ends, batch.target_index_N.numpy(), side="right")])
                np.add.at(targets_E, places[-1], 1)
                np.add.at(bytes_E, places[-1], self._find_target_bytes(ids, batch))
                nats.append(target_losses(model, batch.to(accelerator.device)))
        # The sums are taken on the CPU, since not every device has float64. They travel between processes as int64.
        nats = [part.cpu().double() for part in nats]
        sums = np.array([float(part.sum()) for part in nats])
        for place_N, part in zip(places, nats, strict=True):
            np.add.at(loss_E, place_N, part.numpy())
        sums_of_all = _gather(accelerator, sums.view(np.int64)).view(np.float64)
        targets_V = _gather(accelerator, targets_V).sum(0)
        loss_E, targets_E, bytes_E = join_shares(accelerator, loss_E, targets_E, bytes_E)
        return EvaluationTotals(
            nats=math.fsum(sums_of_all.flat),
            targets=int(targets_V.sum()),
            utf8_bytes=int(bytes_E.sum()),
            unigram_nats=float((targets_V * self.unigram_nats_V).sum()),
            per_example={"loss": loss_E, "targets": targets_E, "utf8_bytes": bytes_E},
        )

    def _find_target_bytes(self, ids: NDArray[np.int64], batch: MicroBatch) -> NDArray[np.int64]:
        """Return the UTF-8 bytes of the text that each target of the batch stands for, int64[N]."""
        if not batch.target_count:
            return np.zeros(0, np.int64)
        bytes_T = np.concatenate([self.examples.token_bytes(int(i)) for i in ids])
        bytes_N: NDArray[np.int64] = bytes_T[batch.target_index_N.numpy() + self.collator.target_offset]
        return bytes_N


def iterate_local_batches(
    accelerator: Accelerator, examples: Examples, collator: Collator, micro_tokens: int
) -> Iterator[tuple[NDArray[np.int64], MicroBatch]]:
    """Yield this process's share of the examples as micro-batches, each with the ids of its examples.

    Each example belongs to one process. All processes get the same number of micro-batches. The micro-batches do not
    depend on the number of processes.
    """
    padded, multiple = collator.padded, collator.multiple
    shares = deal_micro_batches(
        examples.lengths, micro_tokens, accelerator.num_processes, padded=padded, multiple=multiple
    )
    own = shares[accelerator.process_index]
    for ids in show_progress(own, desc="evaluating", leave=False, disable=not accelerator.is_main_process):
        yield ids, collator([examples[int(i)] for i in ids], ids, epoch=0)


def join_shares(accelerator: Accelerator, *arrays_E: NDArray[Any]) -> list[NDArray[Any]]:
    """Return the arrays of all processes joined; float64 or int64, with an element for each evaluation example.

    One process has the element of an example and all others have zero, so that a sum of the bits is exact.
    """
    bits = torch.from_numpy(np.stack([array.view(np.int64) for array in arrays_E])).to(accelerator.device)
    joined = accelerator.reduce(bits).cpu().numpy()
    return [row.view(array.dtype) for row, array in zip(joined, arrays_E, strict=True)]


def _gather(accelerator: Accelerator, array: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the arrays of all processes, one in each row: int64[P, len(array)]."""
    tensor = torch.from_numpy(array[None]).to(accelerator.device)
    gathered: NDArray[np.int64] = accelerator.gather(tensor).cpu().numpy()
    return gathered
