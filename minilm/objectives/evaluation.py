"""Exact evaluation: nats summed in float64 over every target on every process, divided once."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn

from minilm.data.batch_plan import deal_micro_batches
from minilm.data.corpus import Examples
from minilm.data.micro_batch import Collator, LanguageCollator, MicroBatch, target_losses
from minilm.models.temporary_changes import evaluation_mode
from minilm.utils.progress import show_progress


@dataclass(frozen=True, kw_only=True)
class EvaluationTotals:
    """Totals over the evaluation's targets, from which every figure follows."""

    nats: float
    """-ln p of the targets, summed."""
    targets: int
    """How many there are."""
    utf8_bytes: int
    """UTF-8 bytes of the documents' text that they stand for (`minilm.data.text_bytes`)."""
    unigram_nats: float
    """-ln p of the same targets under the unigram model of the training tokens."""

    def figures(self) -> dict[str, float]:
        """eval_loss (nats a target), perplexity, bits_per_byte, and the unigram model's bits_per_byte."""
        loss = self.nats / self.targets
        bits = math.log(2) * max(1, self.utf8_bytes)
        return {
            "eval_loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": self.nats / bits,
            "unigram_bits_per_byte": self.unigram_nats / bits,
        }


def unigram_nats(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """-ln p of each id under the add-one-smoothed counts of the training tokens, float64[vocabulary]."""
    smoothed: NDArray[np.float64] = np.log((counts + 1.0).sum()) - np.log(counts + 1.0)
    return smoothed


@dataclass(frozen=True, kw_only=True)
class LanguageEvaluator:
    """The evaluation of a language model on held-out examples; call it with the accelerator and the prepared model.

    Raises ValueError when the examples hold no target.
    """

    examples: Examples
    """With `text_bytes`."""
    collator: LanguageCollator
    micro_tokens: int
    """Most tokens of a forward pass, padding included; the figures do not depend on it."""
    unigram: NDArray[np.float64]
    """-ln p of each id under the unigram model, float64[vocabulary]."""

    def __post_init__(self) -> None:
        ids = np.arange(len(self.examples))
        if not any(self.collator([self.examples[int(i)]], ids[i : i + 1], epoch=0).target_count for i in ids):
            raise ValueError("the evaluation documents hold no target: give more of them, or longer ones")

    names = ("eval_loss", "perplexity", "bits_per_byte", "unigram_bits_per_byte")

    def __call__(self, accelerator: Accelerator, model: nn.Module) -> EvaluationTotals:
        """Evaluate every example once, shared among the processes, all of which return the same totals.

        The masks are those of the collator's epoch 0, and each forward pass is the same, whatever the number of
        processes. So the totals are the same to the bit where the model and a process's hardware and threads are.
        """
        nats, utf8_bytes, targets_V = [], 0, np.zeros(len(self.unigram), np.int64)
        with evaluation_mode(model):
            for ids, batch in own_batches(accelerator, self.examples, self.collator, self.micro_tokens):
                utf8_bytes += self._bytes_of_targets(ids, batch)
                targets_V += np.bincount(batch.target_ids_N.numpy(), minlength=len(targets_V))
                nats.append(target_losses(model, batch.to(accelerator.device)))
        # On the host: not every device has float64. So its bits travel as int64.
        sums = np.array([float(part.cpu().double().sum()) for part in nats])
        everyones = _gathered(accelerator, sums.view(np.int64)).view(np.float64)
        *targets, utf8_bytes = _gathered(accelerator, np.append(targets_V, utf8_bytes)).sum(0)
        targets_V = np.array(targets)
        return EvaluationTotals(
            nats=math.fsum(everyones.flat),
            targets=int(targets_V.sum()),
            utf8_bytes=int(utf8_bytes),
            unigram_nats=float((targets_V * self.unigram).sum()),
        )

    def _bytes_of_targets(self, ids: NDArray[np.int64], batch: MicroBatch) -> int:
        if not batch.target_count:
            return 0
        bytes_T = np.concatenate([self.examples.token_bytes(int(i)) for i in ids])
        return int(bytes_T[batch.target_index_N.numpy() + self.collator.target_offset].sum())


def own_batches(
    accelerator: Accelerator, examples: Examples, collator: Collator, micro_tokens: int
) -> Iterator[tuple[NDArray[np.int64], MicroBatch]]:
    """This process's share of the examples in batches, each with the ids of its examples: every one is one process's.

    All processes have the same number of batches, which are those that one process would have.
    """
    padded, multiple = collator.padded, collator.multiple
    parts = deal_micro_batches(
        examples.lengths, micro_tokens, accelerator.num_processes, padded=padded, multiple=multiple
    )
    mine = parts[accelerator.process_index]
    for ids in show_progress(mine, desc="evaluating", leave=False, disable=not accelerator.is_main_process):
        yield ids, collator([examples[int(i)] for i in ids], ids, epoch=0)


def _gathered(accelerator: Accelerator, ours: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each process's array, a row each."""
    gathered: NDArray[np.int64] = accelerator.gather(torch.from_numpy(ours[None]).to(accelerator.device)).cpu().numpy()
    return gathered
