"""Masking: the tokens that a masked LM predicts, and the ids that replace them in the input.

Axes: T tokens of the micro-batch, W words of the micro-batch, N targets of the micro-batch.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from minilm.data.micro_batch import MicroBatch, concatenate_rows
from minilm.data.special_ids import mark_used_ids

_Hashes = NDArray[np.uint64]

# The lengths of spans in words: a geometric distribution, cut off at the longest (Joshi et al. 2020, section 3.1).
_STOP_PROBABILITY = 0.2
_MAX_SPAN_WORDS = 10
_span_words = np.arange(1, _MAX_SPAN_WORDS + 1)
_length_probability = (
    _STOP_PROBABILITY * (1 - _STOP_PROBABILITY) ** (_span_words - 1) / (1 - (1 - _STOP_PROBABILITY) ** _MAX_SPAN_WORDS)
)
_MEAN_SPAN_WORDS = float(_length_probability @ _span_words)  # 3.8
_LENGTH_CDF = np.cumsum(_length_probability) / _length_probability.sum()
# The number of words from a random word inside a span to the end of the span, both included. The probability of j
# words is proportional to the share of spans that have j or more words.
_REST_CDF = np.cumsum(np.cumsum(_length_probability[::-1])[::-1]) / _MEAN_SPAN_WORDS


class MaskedLMCollator:
    """A collator that chooses targets, replaces them in the input, and joins the rows.

    A hash of (seed, epoch, example, position) decides whether a token is chosen and what replaces it. The result does
    not depend on the other rows of the micro-batch, the process, or the order of the calls. Special tokens are never
    chosen, and never used as replacements.

    rate: share of the tokens, special ones excluded, that are chosen on average. It may be a function of the progress,
        which is the share of the run's steps that are done (Ankner et al. 2023).
    unit: what is chosen at random. `token`: each token by itself. `word`: all tokens of a word or none of them, each
        replaced by itself, as in BERT's whole-word masking (Devlin et al. 2019, released code, May 2019). `span`: spans
        of whole words with the lengths of SpanBERT (Joshi et al. 2020, section 3.1). All tokens of a span are replaced
        in the same way, and no span crosses a special token.
    masked: share of the targets that are replaced with the mask token.
    replaced: share of the targets that are replaced with a random token. The remaining targets stay visible.
    word_starts: a function that takes the id of an example and returns which of its tokens begin a word, bool[tokens].
        The units `word` and `span` need it.
    padded, multiple: as in `minilm.data.batch_plan.Plan`.

    Raises ValueError if the tokenizer has no mask token.
    """

    target_offset = 0

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rate: float | Callable[[float], float],
        seed: int,
        unit: str = "token",
        masked: float = 0.8,
        replaced: float = 0.1,
        word_starts: Callable[[int], NDArray[np.bool_]] | None = None,
        padded: bool,
        multiple: int,
    ) -> None:
        if tokenizer.mask_token_id is None:
            name = f" {tokenizer.name_or_path}" if tokenizer.name_or_path else ""
            raise ValueError(
                f"the tokenizer{name} has no mask token, which masked LM needs: name one as mask_token in its "
                "tokenizer_config.json; a run can take another tokenizer with --tokens.name"
            )
        self.can_be_target = mark_used_ids(tokenizer)
        self.can_be_target[tokenizer.all_special_ids] = False
        self.replacements = np.flatnonzero(self.can_be_target)
        self.mask_id = tokenizer.mask_token_id
        self._rate = rate
        self.unit, self.masked, self.replaced, self.word_starts = unit, masked, replaced, word_starts
        self.seed, self.padded, self.multiple = seed, padded, multiple

    def rate(self, progress: float = 0.0) -> float:
        """Return the rate when the share `progress` of the run's steps is done."""
        return self._rate(progress) if callable(self._rate) else self._rate

    def __call__(
        self, rows: Sequence[NDArray[np.int64]], examples: NDArray[np.int64], epoch: int, progress: float = 0.0
    ) -> MicroBatch:
        """Return a micro-batch of the rows, with targets and their replacements.

        `rows[i]` holds the token ids of example `examples[i]`. `progress`, the share of the run's steps that are done,
        decides the rate.
        """
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
        """Return a hash of (seed, epoch, example, position) for each token, uint64[T]."""
        key = _mix(_mix(np.array([self.seed], np.uint64)) + np.uint64(epoch))
        return _mix(_mix(_mix(key + example_T.astype(np.uint64)) ^ key) + position_T.astype(np.uint64))

    def _choose(
        self, ids_T: NDArray[np.int64], hash_T: _Hashes, examples: NDArray[np.int64], rate: float
    ) -> tuple[NDArray[np.bool_], _Hashes]:
        """Return which tokens are chosen, bool[T], and a hash that decides how each is replaced, uint64[T].

        Special tokens may be among the chosen ones.
        """
        if self.word_starts is None:
            return _to_uniform(hash_T) < rate, hash_T
        starts = [self.word_starts(int(example)) for example in examples]
        special_T = ~self.can_be_target[ids_T]
        # A run of words begins at a special token, after a special token, and at the start of a row.
        run_starts_T = special_T | np.concatenate(([True], special_T[:-1]))
        run_starts_T[np.cumsum([len(row) for row in starts[:-1]], dtype=np.int64)] = True
        word_starts_T = np.concatenate(starts) | run_starts_T
        word_T = np.cumsum(word_starts_T) - 1
        first_W = np.flatnonzero(word_starts_T)
        if self.unit == "word":
            return (_to_uniform(hash_T[first_W]) < rate)[word_T], hash_T
        chosen_W, fate_W = _draw_spans(hash_T[first_W], run_starts_T[first_W], rate)
        return chosen_W[word_T], fate_W[word_T]

    def _replace(self, ids_N: NDArray[np.int64], hash_N: _Hashes, fate_N: _Hashes) -> NDArray[np.int64]:
        """Return the ids that replace the targets in the input, int64[N]."""
        uniform_N = _to_uniform(_mix(fate_N))
        # Multiply and shift maps 32 bits of the hash to a range of n numbers (Lemire 2019). The probability of each
        # number differs from 1 / n by less than 2^-32.
        draw_N = (_mix(_mix(hash_N)) >> np.uint64(32)) * np.uint64(len(self.replacements)) >> np.uint64(32)
        new_N = np.where(uniform_N < self.masked, self.mask_id, self.replacements[draw_N.astype(np.int64)])
        return np.where(uniform_N < self.masked + self.replaced, new_N, ids_N)


def _draw_spans(hash_W: _Hashes, run_starts_W: NDArray[np.bool_], rate: float) -> tuple[NDArray[np.bool_], _Hashes]:
    """Return which words are in spans, bool[W], and a hash that all words of a span share, uint64[W].

    `run_starts_W` marks the first word of each run of words. No span leaves its run.

    Gaps and spans alternate. A gap has g >= 0 words with probability q (1 - q)^g. The value of q makes spans cover the
    share `rate` of the words. A run begins inside a span or a gap, as if both had alternated before it. Therefore every
    word is in a span with probability `rate`, also at both ends of a run. The hash of the k-th word of a run draws the
    k-th gap and the k-th span; the last ones drawn lie beyond the end of the run and are not used.
    """
    words_W, starts = np.arange(len(hash_W)), np.flatnonzero(run_starts_W)
    run_W = np.cumsum(run_starts_W) - 1
    start_W, stop_W = starts[run_W], np.append(starts[1:], len(hash_W))[run_W]
    q = rate / (rate + (1 - rate) * _MEAN_SPAN_WORDS)
    # A gap is cut to the number of words in the micro-batch. This changes nothing, since a gap that long fills any run.
    gap_cdf = 1 - np.cumprod(np.full(len(hash_W), 1 - q))
    gap_W = np.searchsorted(gap_cdf, _to_uniform(hash_W), side="right")
    length = _to_uniform(_mix(hash_W ^ np.uint64(1 << 63)))
    span_W = 1 + np.searchsorted(_LENGTH_CDF, length, side="right").clip(max=_MAX_SPAN_WORDS - 1)
    # Whether a run begins inside a span. If so, its first span is the rest of a span from a random word on.
    inside_W = run_starts_W & (_to_uniform(_mix(hash_W ^ np.uint64(1 << 62))) < rate)
    # Otherwise it begins inside a gap, which has at least the word at which it begins.
    gap_W = np.where(inside_W, 0, gap_W + run_starts_W)
    rest_W = 1 + np.searchsorted(_REST_CDF, length, side="right").clip(max=_MAX_SPAN_WORDS - 1)
    span_W = np.where(inside_W, rest_W, span_W)
    total_W = np.cumsum(gap_W + span_W)
    end_W = start_W + total_W - (total_W - gap_W - span_W)[start_W]
    # The index of the first span that ends after each word.
    owner_W = np.searchsorted(np.minimum(end_W, stop_W), words_W, side="right")
    return words_W >= (end_W - span_W)[owner_W], hash_W[owner_W]


def _mix(x: _Hashes) -> _Hashes:
    """Return output number x + 1 of SplitMix64 with the seed 0 (Steele, Lea and Flood 2014, figure 17)."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _to_uniform(x: _Hashes) -> NDArray[np.float64]:
    """Return the top 53 bits of each hash as a float64 in [0, 1)."""
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
