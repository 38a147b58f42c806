"""Exact evaluation: nats summed in float64 over every target on every process, divided once."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn

from minilm.batch import Collator, target_nats
from minilm.plan import cut
from minilm.progress import progress_bar
from minilm.tokens import Examples


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Totals over the evaluation's targets, from which every figure follows."""

    nats: float
    """-ln p of the targets, summed."""
    targets: int
    """How many there are."""
    utf8_bytes: int
    """UTF-8 bytes of the text that they stand for."""
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
class Evaluator:
    """The evaluation of a language model on held-out examples; call it with the accelerator and the prepared model.

    Raises ValueError when the examples hold no target.
    """

    examples: Examples
    collator: Collator
    micro_tokens: int
    """Most tokens of a forward pass, padding included; the figures do not depend on it."""
    bytes_per_token: NDArray[np.int64]
    """UTF-8 bytes of each id, int64[vocabulary]."""
    unigram: NDArray[np.float64]
    """-ln p of each id under the unigram model, float64[vocabulary]."""

    def __post_init__(self) -> None:
        ids = np.arange(len(self.examples))
        if not any(self.collator([self.examples[int(i)]], ids[i : i + 1], epoch=0).targets for i in ids):
            raise ValueError("the evaluation documents hold no target: give more of them, or longer ones")

    names = ("eval_loss", "perplexity", "bits_per_byte", "unigram_bits_per_byte")

    def __call__(self, accelerator: Accelerator, model: nn.Module) -> Evaluation:
        """Evaluate every example once, shared among the processes, all of which return the same totals.

        The masks are those of the collator's epoch 0, whatever the number of processes.
        """
        lengths, padded, multiple = self.examples.lengths, self.collator.padded, self.collator.multiple
        ids, processes = np.arange(len(lengths)), accelerator.num_processes
        parts = cut(ids, lengths, self.micro_tokens, processes, padded=padded, multiple=multiple)
        mine = parts[accelerator.process_index]
        nats, targets_V = [], np.zeros(len(self.unigram), np.int64)
        training = model.training
        model.eval()
        with torch.inference_mode():
            for ids in progress_bar(mine, desc="evaluating", leave=False, disable=not accelerator.is_main_process):
                batch = self.collator([self.examples[int(i)] for i in ids], ids, epoch=0)
                targets_V += np.bincount(batch.target_ids_N.numpy(), minlength=len(targets_V))
                nats.append(target_nats(model, batch.to(accelerator.device)))
        model.train(training)
        total = sum(float(part.cpu().double().sum()) for part in nats)  # on the host: not every device has float64
        ours = [total, targets_V.sum(), (targets_V * self.bytes_per_token).sum(), (targets_V * self.unigram).sum()]
        totals = _sum_over_processes(accelerator, np.array(ours, np.float64))
        return Evaluation(nats=totals[0], targets=round(totals[1]), utf8_bytes=round(totals[2]), unigram_nats=totals[3])


def _sum_over_processes(accelerator: Accelerator, ours: NDArray[np.float64]) -> list[float]:
    """Each entry summed over all processes, in the order of the ranks; the bits of float64 travel as int64."""
    if accelerator.num_processes == 1:
        return [float(x) for x in ours]
    bits = torch.from_numpy(ours.view(np.int64)).to(accelerator.device)
    gathered = accelerator.gather(bits[None]).cpu().numpy().view(np.float64)
    return [float(math.fsum(column)) for column in gathered.T]
