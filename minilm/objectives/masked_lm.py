"""Masked LM: which tokens are chosen, what takes their place, and what a model of this kind is for.

Axes: T tokens of the micro-batch, W words of it, N its targets.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import MaskedLM
from minilm.data.corpus import Examples, PreparedData
from minilm.data.micro_batch import MicroBatch, concatenate_rows
from minilm.data.special_ids import mark_used_ids
from minilm.models.inference import check_masks, fill_mask
from minilm.models.sparse_head import SparseHead
from minilm.objectives.language_modeling import LanguageModel
from minilm.utils.shell import format_command

_Hashes = NDArray[np.uint64]
_P, _LONGEST = 0.2, 10  # of the lengths of spans, in words (Joshi et al. 2020, section 3.1)
_lengths = np.arange(1, _LONGEST + 1)
_share_of_length = _P * (1 - _P) ** (_lengths - 1) / (1 - (1 - _P) ** _LONGEST)
_MEAN = float(_share_of_length @ _lengths)  # 3.8
_LENGTH_CDF = np.cumsum(_share_of_length) / _share_of_length.sum()
# What is left of a span at a word that is known to be in one: at least j words with the share of lengths from j on.
_REST_CDF = np.cumsum(np.cumsum(_share_of_length[::-1])[::-1]) / _MEAN


class MaskedCollator:
    """Masks rows of token ids and joins them.

    Whether a token is chosen, and what becomes of it, is a hash of (seed, epoch, example, position): it does not depend
    on the batch, the process or the order in which anything is drawn. Special tokens are never chosen and never drawn
    as replacements. `padded` and `multiple` are those of `minilm.data.batch_plan.Plan`, the others the settings of
    `MaskedLM`.

    unit: what is chosen with probability `rate`, so that this share of the tokens is expected to be chosen. `word`: all
    tokens of a word or none; what becomes of them is decided token by token, as in BERT's whole-word masking (Devlin et
    al. 2019, released code, May 2019). `span`: spans of whole words with the lengths of SpanBERT (Joshi et al. 2020,
    section 3.1), which share one fate; none goes over a special token. `word_starts` gives the tokens of an example
    that begin a word, bool. rate: at the start of the run; it changes linearly to `final_rate` (Ankner et al. 2023).
    """

    target_offset = 0

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rate: float,
        seed: int,
        final_rate: float | None = None,
        unit: str = "token",
        masked: float = 0.8,
        replaced: float = 0.1,
        word_starts: Callable[[int], NDArray[np.bool_]] | None = None,
        padded: bool,
        multiple: int,
    ) -> None:
        if tokenizer.mask_token_id is None:
            name = tokenizer.name_or_path or "this one"
            raise ValueError(
                f"the tokenizer {name} has no mask token, which masked LM needs: name one as mask_token in its "
                "tokenizer_config.json; a run can take another tokenizer with --tokens.name"
            )
        self.can_be_target = mark_used_ids(tokenizer)
        self.can_be_target[tokenizer.all_special_ids] = False
        self.replacements = np.flatnonzero(self.can_be_target)
        self.mask_id = tokenizer.mask_token_id
        self.first_rate, self.final_rate = rate, rate if final_rate is None else final_rate
        self.unit, self.masked, self.replaced, self.word_starts = unit, masked, replaced, word_starts
        self.seed, self.padded, self.multiple = seed, padded, multiple

    def rate(self, progress: float = 0.0) -> float:
        """Share of the tokens that are targets; `progress` is the share of the run's steps that are done."""
        return self.first_rate + (self.final_rate - self.first_rate) * progress

    def __call__(
        self, rows: Sequence[NDArray[np.int64]], examples: NDArray[np.int64], epoch: int, progress: float = 0.0
    ) -> MicroBatch:
        """`rows[i]`: the ids of example `examples[i]`. `progress` decides the rate."""
        ids_T, packing = concatenate_rows(rows, padded=self.padded, multiple=self.multiple)
        index_N = new_N = np.zeros(0, np.int64)
        if rows:
            hash_T = self._hash(packing.position_T.numpy(), np.repeat(examples, [len(row) for row in rows]), epoch)
            chosen_T, fate_T = self._choose(ids_T, hash_T, examples, self.rate(progress))
            index_N = np.flatnonzero(chosen_T & self.can_be_target[ids_T])
            new_N = self._replace(ids_T[index_N], hash_T[index_N], fate_T[index_N])
        targets_N = ids_T[index_N]
        ids_T[index_N] = new_N
        return MicroBatch(
            input_ids_T=torch.from_numpy(ids_T),
            packing=packing,
            target_index_N=torch.from_numpy(index_N),
            target_ids_N=torch.from_numpy(targets_N),
        )

    def _hash(self, position_T: NDArray[np.int64], example_T: NDArray[np.int64], epoch: int) -> _Hashes:
        key = _mix(_mix(np.array([self.seed], np.uint64)) + np.uint64(epoch))
        return _mix(_mix(_mix(key + example_T.astype(np.uint64)) ^ key) + position_T.astype(np.uint64))

    def _choose(
        self, ids_T: NDArray[np.int64], hash_T: _Hashes, examples: NDArray[np.int64], rate: float
    ) -> tuple[NDArray[np.bool_], _Hashes]:
        """Which of the T tokens are chosen, special ones among them, and the hash that decides what becomes of each."""
        if self.word_starts is None:
            return _uniform(hash_T) < rate, hash_T
        starts = [self.word_starts(int(example)) for example in examples]
        special_T = ~self.can_be_target[ids_T]
        breaks_T = special_T | np.concatenate(([True], special_T[:-1]))
        breaks_T[np.cumsum([len(row) for row in starts[:-1]], dtype=np.int64)] = True
        begins_T = np.concatenate(starts) | breaks_T
        word_T, first_W = np.cumsum(begins_T) - 1, np.flatnonzero(begins_T)
        if self.unit == "word":
            return (_uniform(hash_T[first_W]) < rate)[word_T], hash_T
        chosen_W, fate_W = _spans(hash_T[first_W], breaks_T[first_W], rate)
        return chosen_W[word_T], fate_W[word_T]

    def _replace(self, ids_N: NDArray[np.int64], hash_N: _Hashes, fate_N: _Hashes) -> NDArray[np.int64]:
        """The ids that take the place of the targets in the input."""
        uniform_N = _uniform(_mix(fate_N))
        # Multiply and shift maps 32 hash bits to a range without the bias of a modulus that matters (Lemire 2019).
        draw_N = (_mix(_mix(hash_N)) >> np.uint64(32)) * np.uint64(len(self.replacements)) >> np.uint64(32)
        new_N = np.where(uniform_N < self.masked, self.mask_id, self.replacements[draw_N.astype(np.int64)])
        return np.where(uniform_N < self.masked + self.replaced, new_N, ids_N)


def _spans(hash_W: _Hashes, breaks_W: NDArray[np.bool_], rate: float) -> tuple[NDArray[np.bool_], _Hashes]:
    """Which of W words are in spans, and a hash that the words of a span share. Runs of words begin at `breaks_W`.

    Gaps and spans take turns. A gap has g >= 0 words with probability q (1 - q)^g, where q gives the spans the share
    `rate` of the words. A run begins in the middle of a span or gap, as if both had been taking turns before it: so
    every word is chosen with probability `rate`, at the ends of a run too. The hash of a run's k-th word draws its k-th
    gap and span, more of them than the run has room for.
    """
    words_W, starts = np.arange(len(hash_W)), np.flatnonzero(breaks_W)
    run_W = np.cumsum(breaks_W) - 1
    start_W, stop_W = starts[run_W], np.append(starts[1:], len(hash_W))[run_W]
    q = rate / (rate + (1 - rate) * _MEAN)
    gap_cdf = 1 - np.cumprod(np.full(len(hash_W), 1 - q))  # longer gaps than the batch are cut: nobody can tell
    gap_W = np.searchsorted(gap_cdf, _uniform(hash_W), side="right")
    length = _uniform(_mix(hash_W ^ np.uint64(1 << 63)))
    span_W = 1 + np.searchsorted(_LENGTH_CDF, length, side="right").clip(max=_LONGEST - 1)
    inside = breaks_W & (_uniform(_mix(hash_W ^ np.uint64(1 << 62))) < rate)
    gap_W = np.where(inside, 0, gap_W + breaks_W)
    rest_W = 1 + np.searchsorted(_REST_CDF, length, side="right").clip(max=_LONGEST - 1)
    span_W = np.where(inside, rest_W, span_W)
    total_W = np.cumsum(gap_W + span_W)
    end_W = start_W + total_W - (total_W - gap_W - span_W)[start_W]
    owner_W = np.searchsorted(np.minimum(end_W, stop_W), words_W, side="right")  # the first span that ends after a word
    return words_W >= (end_W - span_W)[owner_W], hash_W[owner_W]


def _mix(x: _Hashes) -> _Hashes:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014, figure 17), on a stepped counter."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform(x: _Hashes) -> NDArray[np.float64]:
    """The top 53 bits as a float64 in [0, 1)."""
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


_NEVER = 1e-12  # chance of what will not happen in a run
_ELSEWHERE = ("eval_rate", "label_smoothing")  # settings that are not the collator's


class Masked(LanguageModel):
    """Masked LM."""

    auto, causal, pipeline, title = AutoModelForMaskedLM, False, "fill-mask", "masked language model"

    def __init__(self, settings: MaskedLM) -> None:
        self.settings = settings
        self.words = settings.unit != "token"
        self.predicted = f"{settings.eval_rate:.0%} of the tokens"

    def collator(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        seed: int | None,
        padded: bool,
        multiple: int,
    ) -> MaskedCollator:
        layout: dict[str, Any] = {"padded": padded, "multiple": multiple}
        if seed is None:
            return MaskedCollator(tokenizer, rate=self.settings.eval_rate, seed=2**63, **layout)
        chosen = {name: value for name, value in vars(self.settings).items() if name not in _ELSEWHERE}
        starts = examples.word_starts if self.words else None
        return MaskedCollator(tokenizer, seed=seed, word_starts=starts, **chosen, **layout)

    def head(self, network: PreTrainedModel, prepared: PreparedData) -> SparseHead:
        for examples in (prepared.train, prepared.eval):
            self._check_rest(network, prepared.tokenizer, examples)
        return super().head(network, prepared)

    def _check_rest(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples) -> None:
        """Raise ValueError where a row may become nothing but masks, and the model divides by what is left of it."""
        divides = any(getattr(module, "token_dropout", False) is True for module in network.modules())
        around = {*examples.prefix.tolist(), *examples.suffix.tolist()}
        if not divides or not len(examples) or around & {*tokenizer.all_special_ids}:
            return
        settings, shortest = self.settings, int(examples.lengths.min())
        rate = max(settings.rate, settings.final_rate or 0.0, settings.eval_rate)
        if rate ** (1 if self.words else shortest) > _NEVER:  # words and spans may be as long as the row
            raise ValueError(
                f"{type(network).__name__} divides by the share of a row that is not masked (token_dropout), and the "
                f"tokenizer puts no special token around a text: all of a row of {shortest} tokens may be masked. Pass "
                "--model.config.token-dropout False, or longer rows"
            )

    def check(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        check_masks(network, tokenizer, texts)

    def sample(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        best = fill_mask(network, tokenizer, [text], top_k=3)[0][0]
        return ", ".join(f"{fill.token} ({fill.probability:.0%})" for fill in best)

    def command(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
        return format_command("fill-mask", folder, f"… {tokenizer.mask_token} …")
