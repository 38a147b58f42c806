"""Exact evaluation: every evaluation example is evaluated once, and the processes share the work.

Axes: T tokens and N targets of the micro-batch, V ids of the vocabulary, P processes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

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
        utf8_bytes = 0
        targets_V = np.zeros(len(self.unigram_nats_V), np.int64)
        with evaluation_mode(model):
            for ids, batch in iterate_local_batches(accelerator, self.examples, self.collator, self.micro_tokens):
                utf8_bytes += self._count_target_bytes(ids, batch)
                targets_V += np.bincount(batch.target_ids_N.numpy(), minlength=len(targets_V))
                nats.append(target_losses(model, batch.to(accelerator.device)))
        # The sums are taken on the CPU, since not every device has float64. They travel between processes as int64.
        sums = np.array([float(part.cpu().double().sum()) for part in nats])
        sums_of_all = _gather(accelerator, sums.view(np.int64)).view(np.float64)
        counts = _gather(accelerator, np.append(targets_V, utf8_bytes)).sum(0)
        targets_V = counts[:-1]
        return EvaluationTotals(
            nats=math.fsum(sums_of_all.flat),
            targets=int(targets_V.sum()),
            utf8_bytes=int(counts[-1]),
            unigram_nats=float((targets_V * self.unigram_nats_V).sum()),
        )

    def _count_target_bytes(self, ids: NDArray[np.int64], batch: MicroBatch) -> int:
        """Return the UTF-8 bytes of the text that the targets of the batch stand for."""
        if not batch.target_count:
            return 0
        bytes_T = np.concatenate([self.examples.token_bytes(int(i)) for i in ids])
        return int(bytes_T[batch.target_index_N.numpy() + self.collator.target_offset].sum())


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


def _gather(accelerator: Accelerator, array: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the arrays of all processes, one in each row: int64[P, len(array)]."""
    tensor = torch.from_numpy(array[None]).to(accelerator.device)
    gathered: NDArray[np.int64] = accelerator.gather(tensor).cpu().numpy()
    return gathered
