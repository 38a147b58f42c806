"""Objectives: rows of token ids in, one flat batch with its targets out, and the loss as a sum over targets.

What one objective has that another has not is in its class here, and nowhere else: see `Objective`.

Axes: T tokens of the micro-batch, N targets of the micro-batch, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import CausalLM, MaskedLM
from minilm.infer import check_beginnings, check_masks, fill_mask, generate
from minilm.model import check_causal
from minilm.packing import Packing, pack

_Hashes = NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch on its way to the model: its rows one after the other, without padding."""

    input_ids_T: Tensor
    """int64, the rows' token ids, concatenated."""
    packing: Packing
    """Where the rows lie."""
    target_index_N: Tensor
    """int64, where the targets are among the T tokens."""
    target_ids_N: Tensor
    """int64, the ids to predict there."""

    @property
    def targets(self) -> int:
        """Number of targets; read from the shape, so that asking never waits for a device."""
        return self.target_ids_N.shape[0]

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; the copy from pinned memory does not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory (called by DataLoader)."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(
            input_ids_T=change(self.input_ids_T),
            packing=self.packing.map(change),
            target_index_N=change(self.target_index_N),
            target_ids_N=change(self.target_ids_N),
        )


class MaskedCollator:
    """Masks rows of token ids and joins them.

    Whether a token is chosen, and what becomes of it, is a hash of (seed, epoch, example, position): it does not depend
    on the batch, the process or the order in which anything is drawn. Special tokens are never chosen and never drawn
    as replacements. `padded` and `multiple` are those of `minilm.plan.Plan`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rate: float,
        seed: int,
        padded: bool = False,
        multiple: int = 1,
    ) -> None:
        if tokenizer.mask_token_id is None:
            name = tokenizer.name_or_path or "this one"
            raise ValueError(f"the tokenizer {name} has no mask token; masked LM needs one: pass --tokens.name")
        vocabulary = len(tokenizer)
        self.possible = np.ones(vocabulary, bool)
        self.possible[tokenizer.all_special_ids] = False
        self.replacements = np.flatnonzero(self.possible)
        self.mask_id = tokenizer.mask_token_id
        self.rate, self.seed, self.padded, self.multiple = rate, seed, padded, multiple

    def __call__(self, rows: Sequence[NDArray[np.int64]], examples: NDArray[np.int64], epoch: int) -> Batch:
        """`rows[i]`: the ids of example `examples[i]`."""
        ids_T, packing = _join(rows, padded=self.padded, multiple=self.multiple)
        index_N = new_N = np.zeros(0, np.int64)
        if rows:
            example_T = np.repeat(examples, [len(row) for row in rows])
            index_N, new_N = self._choose(ids_T, packing.position_T.numpy(), example_T, epoch)
        targets_N = ids_T[index_N]
        ids_T[index_N] = new_N
        return Batch(
            input_ids_T=torch.from_numpy(ids_T),
            packing=packing,
            target_index_N=torch.from_numpy(index_N),
            target_ids_N=torch.from_numpy(targets_N),
        )

    def _choose(
        self, ids_T: NDArray[np.int64], position_T: NDArray[np.int64], example_T: NDArray[np.int64], epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of the T tokens are targets, and the ids that take their place in the input."""
        key = _mix(_mix(np.array([self.seed], np.uint64)) + np.uint64(epoch))
        hash_T = _mix(_mix(_mix(key + example_T.astype(np.uint64)) ^ key) + position_T.astype(np.uint64))
        index_N = np.flatnonzero((_uniform(hash_T) < self.rate) & self.possible[ids_T])
        fate_N = _mix(hash_T[index_N])
        uniform_N = _uniform(fate_N)
        # Multiply and shift maps 32 hash bits to a range without the bias of a modulus that matters (Lemire 2019).
        draw_N = (_mix(fate_N) >> np.uint64(32)) * np.uint64(len(self.replacements)) >> np.uint64(32)
        new_N = np.where(uniform_N < 0.8, self.mask_id, self.replacements[draw_N.astype(np.int64)])
        return index_N, np.where(uniform_N < 0.9, new_N, ids_T[index_N])


def _mix(x: _Hashes) -> _Hashes:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014, figure 17), on a stepped counter."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform(x: _Hashes) -> NDArray[np.float64]:
    """The top 53 bits as a float64 in [0, 1)."""
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


class CausalCollator:
    """Joins rows of token ids; each token but a row's first is the target of the one before it.

    `padded` and `multiple` are those of `minilm.plan.Plan`.
    """

    rate = 1.0  # the share of tokens that are targets, as good as

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, padded: bool = False, multiple: int = 1) -> None:
        self.possible = np.ones(len(tokenizer), bool)
        self.padded, self.multiple = padded, multiple

    def __call__(self, rows: Sequence[NDArray[np.int64]], examples: NDArray[np.int64], epoch: int) -> Batch:
        """As `MaskedCollator`; of examples and epoch nothing depends on."""
        ids_T, packing = _join(rows, padded=self.padded, multiple=self.multiple)
        index_N = np.delete(np.arange(len(ids_T)), np.cumsum([len(row) for row in rows] or [1]) - 1)
        return Batch(
            input_ids_T=torch.from_numpy(ids_T),
            packing=packing,
            target_index_N=torch.from_numpy(index_N),
            target_ids_N=torch.from_numpy(ids_T[index_N + 1]),
        )


def _join(rows: Sequence[NDArray[np.int64]], *, padded: bool, multiple: int) -> tuple[NDArray[np.int64], Packing]:
    """The rows one after the other, and where they lie. No rows give one token without a target, so that a process that
    has nothing to do in a step can still join its collectives."""
    ids_T = np.concatenate(rows) if rows else np.zeros(1, np.int64)
    return ids_T, pack([len(row) for row in rows] or [1], grouped=not padded, multiple=multiple)


def target_nats(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of each target in nats, float32[N], by a model like `SparseHead`."""
    nats_N: Tensor = model(batch.input_ids_T, batch.packing, batch.target_index_N, batch.target_ids_N)
    return nats_N


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """The cross entropy of the batch summed over its targets, nats, float32 scalar."""
    return target_nats(model, batch).sum()


class Collator(Protocol):
    """Rows of token ids to a batch."""

    rate: float
    """Share of the tokens that are targets."""
    possible: NDArray[np.bool_]
    """bool[vocabulary], the ids that can be targets."""
    padded: bool
    multiple: int

    def __call__(self, rows: Sequence[NDArray[np.int64]], examples: NDArray[np.int64], epoch: int) -> Batch: ...


class Objective(Protocol):
    """All that differs from one objective to the next."""

    auto: Any
    """The class of transformers that builds and loads its models."""
    causal: bool
    """Special tokens begin and end each document, and not each example."""
    pipeline: str
    """Its name on the hub and in `transformers.pipeline`."""
    title: str
    """What its models are called."""
    predicted: str
    """What evaluation predicts."""

    def collator(
        self, tokenizer: PreTrainedTokenizerBase, *, seed: int | None, padded: bool = False, multiple: int = 1
    ) -> Collator:
        """The collator of training, or with `seed=None` that of evaluation, which is the same in every run."""

    def check(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        """Raise ValueError for a model that it cannot train, and for a text that `sample` cannot take."""

    def sample(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        """What the model makes of a text, for people to read."""

    def command(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
        """A command that tries the model in `folder`."""


class Masked:
    """Masked LM."""

    auto, causal, pipeline, title = AutoModelForMaskedLM, False, "fill-mask", "masked language model"

    def __init__(self, settings: MaskedLM) -> None:
        self.settings = settings
        self.predicted = f"{settings.eval_rate:.0%} of the tokens"

    def collator(
        self, tokenizer: PreTrainedTokenizerBase, *, seed: int | None, padded: bool = False, multiple: int = 1
    ) -> MaskedCollator:
        rate, key = (self.settings.eval_rate, 2**63) if seed is None else (self.settings.rate, seed)
        return MaskedCollator(tokenizer, rate=rate, seed=key, padded=padded, multiple=multiple)

    def check(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        check_masks(network, tokenizer, texts)

    def sample(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        best = fill_mask(network, tokenizer, [text], top_k=3)[0][0]
        return ", ".join(f"{fill.token} ({fill.probability:.0%})" for fill in best)

    def command(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
        return f'minilm fill-mask {folder} "… {tokenizer.mask_token} …"'


class Causal:
    """Causal LM."""

    auto, causal, pipeline, title = AutoModelForCausalLM, True, "text-generation", "causal language model"
    predicted = "every token but the first"

    def __init__(self, settings: CausalLM) -> None:
        self.settings = settings

    def collator(
        self, tokenizer: PreTrainedTokenizerBase, *, seed: int | None, padded: bool = False, multiple: int = 1
    ) -> CausalCollator:
        return CausalCollator(tokenizer, padded=padded, multiple=multiple)

    def check(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        check_causal(network)
        check_beginnings(network, tokenizer, texts)

    def sample(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        return generate(network, tokenizer, [text])[0].removeprefix(text)

    def command(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
        return f'minilm generate {folder} "…"'


_OBJECTIVES: dict[type, Callable[[Any], Objective]] = {MaskedLM: Masked, CausalLM: Causal}


def objective_of(settings: MaskedLM | CausalLM) -> Objective:
    """The objective that `config.objective` asks for."""
    return _OBJECTIVES[type(settings)](settings)
