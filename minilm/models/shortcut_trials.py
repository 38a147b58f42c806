"""Trials of a head on a few random rows: does a shortcut change the logits?

Axes: T tokens of a batch, L length of a row, N targets, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minilm.models.embeddings import find_embedding, vocabulary_size
from minilm.models.input_length import longest_input
from minilm.models.temporary_changes import ShiftedArange, perturb_padding

_LONGEST = 160  # tokens: more than the usual window of local attention
_TOLERANCE = 1e-4  # relative to the largest logit; rounding errors are less than a tenth of it
# Before training, the influence of one row on another may be tiny, so that only rounding is allowed here.
_TOLERANCE_BETWEEN_ROWS = 1e-6


class ShortcutTrials:
    """Two small batches of random rows, and questions about the logits that a head computes for them.

    logits_of: returns the logits, N x V, of rows that are given by their ids, int64[T], and their lengths. It chooses
    the targets. The last three targets must belong to the last three rows.
    """

    def __init__(self, model: PreTrainedModel, logits_of: Callable[[Tensor, Sequence[int]], Tensor]) -> None:
        config = model.config.get_text_config()
        ends = getattr(config, "eos_token_id", None)
        self.model = model
        self.padding = max(0, getattr(config, "pad_token_id", None) or 0)
        """The id that fills padded places."""
        self._logits_of = logits_of
        self._end: int | None = ends[0] if isinstance(ends, list) else ends
        self._size = vocabulary_size(model)
        self._embedding = find_embedding(model)
        untrained = getattr(self._embedding, "padding_idx", None)
        special = (self.padding, self._end, getattr(config, "pad_index", None), untrained)
        self.special = sorted({id for id in special if id is not None and id < self._size})
        """The ids that a model may treat differently from words: those of padding and of the end of a text."""
        self._inside: int | None = None

    @property
    def longest(self) -> int:
        """The number of tokens in the longest row."""
        return min(_LONGEST, longest_input(self.model) or _LONGEST)

    def draw_ids(self, lengths: Sequence[int]) -> Tensor:
        """Return random ids, int64[T], of rows of these lengths. They end as texts do and do not contain padding."""
        input_ids_T = torch.randint(0, self._size, (sum(lengths),), generator=torch.Generator().manual_seed(0))
        for id in self.special:
            input_ids_T[input_ids_T == id] = min({*range(9)} - {*self.special})
        if self._end is not None and self._end != self.padding and self._end < self._size:
            # BART reads the class of a row at this token.
            input_ids_T[torch.tensor(lengths).cumsum(0) - 1] = self._end
        if self._inside is not None:
            starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
            input_ids_T[starts[::2] + torch.tensor(lengths)[::2] // 2] = self._inside
        return input_ids_T.to(next(self.model.parameters()).device)

    @contextmanager
    def insert_id(self, id: int) -> Iterator[None]:
        """Put this id into the middle of every other row until the block ends."""
        self._inside = id
        try:
            yield
        finally:
            self._inside = None

    def logits(self) -> Tensor:
        """Return the logits, N x V, that the head computes now."""
        return torch.cat([self._logits_of(*batch) for batch in self._batches()])

    def explain_difference(self, expected_NxV: Tensor) -> str:
        """Return why the logits are not the expected ones, or an empty string if they are."""
        try:
            logits_NxV = self.logits()
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"its head does not take single positions ({type(error).__name__}: {error})"
        return "" if _are_near(logits_NxV, expected_NxV) else "its head mixes positions"

    def rows_leak(self) -> bool:
        """Return whether the tokens of the first row change the logits of other rows, as in LFM2's convolutions."""
        for input_ids_T, lengths in self._batches():
            first = lengths[0]
            flipped_T = torch.cat([input_ids_T[:first].flip(0), input_ids_T[first:]])
            before_3xV, after_3xV = (self._logits_of(ids_T, lengths)[-3:] for ids_T in (input_ids_T, flipped_T))
            if not _are_near(after_3xV, before_3xV, _TOLERANCE_BETWEEN_ROWS):
                return True
        return False

    def padding_leaks(self) -> bool:
        """Return whether the embedding of padding changes the logits, even by a tiny amount.

        The convolutions of ConvBERT pass on very little of it before training. In MobileBERT each token sees the
        embedding of the next one, and the embedding of padding is zero before training.
        """
        if self._embedding is None:
            return False
        before_NxV = self.logits()
        with perturb_padding(self.model, self._embedding, self.padding):
            after_NxV = self.logits()
        return not _are_near(after_NxV, before_NxV, _TOLERANCE_BETWEEN_ROWS)

    def places_matter(self, expected_NxV: Tensor) -> bool:
        """Return whether a row's place in the batch changes its logits. Llama 4's attention numbers all tokens."""
        with ShiftedArange({len(input_ids_T) for input_ids_T, _ in self._batches()}):
            return self.explain_difference(expected_NxV) != ""

    def guesses_mask(self, run_row: Callable[[Tensor, Tensor | None], Tensor]) -> bool:
        """Return whether the model takes a special id for padding if it gets no mask, as XLM does.

        run_row: returns the logits of one row from its ids, int64[1, L], and its mask, or None for no mask.
        """
        for id in self.special:
            with self.insert_id(id):
                row_1xL = self.draw_ids([7])[None]
            try:
                guessed, masked = (run_row(row_1xL, mask) for mask in (None, torch.ones_like(row_1xL)))
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                continue
            if not _are_near(guessed, masked):
                return True
        return False

    def _batches(self) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield the ids and lengths of two batches, because some models pad rows to a multiple.

        The longest row has an odd length in the first batch, and a power of two as its length in the second.
        """
        for first in (self.longest - 1 + self.longest % 2, 1 << (max(1, self.longest // 2).bit_length() - 1)):
            lengths = [first, first - first // 8, first - first // 8, min(first, 6)]
            yield self.draw_ids(lengths), lengths


def _are_near(logits: Tensor, expected: Tensor, tolerance: float = _TOLERANCE) -> bool:
    """Return whether these have the same shape and differ little. NaN is not near anything."""
    return logits.shape == expected.shape and bool((logits - expected).abs().max() <= tolerance * expected.abs().max())
