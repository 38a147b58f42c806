"""Trials of a model on a few random rows: does it give the logits that are expected?

Axes: T tokens of a batch, L length of a row, N targets, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm.models.loading import longest_input, vocabulary_size
from minilm.models.probes import CountingFromFar, disturbed_padding

_LONGEST = 160  # tokens: more than the usual window of local attention
_TOLERANCE = 1e-4  # relative to the largest logit; rounding makes less than a tenth of it
# What crosses from row to row may be next to nothing before training, so that only rounding is allowed here.
_TOLERANCE_BETWEEN_ROWS = 1e-6


class Trials:
    """Two small batches of random rows, and questions about the logits that a head gives on them.

    `logits_of` returns the logits, N x V, of rows that are given by their ids, int64[T], and their lengths. It may
    choose the targets, but the last three belong to the last three rows.
    """

    def __init__(self, model: PreTrainedModel, logits_of: Callable[[Tensor, Sequence[int]], Tensor]) -> None:
        config = model.config.get_text_config()
        ends = getattr(config, "eos_token_id", None)
        self.model = model
        self.padding = max(0, getattr(config, "pad_token_id", None) or 0)
        """The id that stands where a batch is padded."""
        self._logits_of = logits_of
        self._end: int | None = ends[0] if isinstance(ends, list) else ends
        self._size = vocabulary_size(model)
        self._embedding = _input_embedding(model)
        untrained = getattr(self._embedding, "padding_idx", None)
        special = (self.padding, self._end, getattr(config, "pad_index", None), untrained)
        self.special = sorted({id for id in special if id is not None and id < self._size})
        """The ids that a model may treat otherwise than a word's: those of padding and of a text's end."""
        self._inside: int | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return min(_LONGEST, longest_input(self.model) or _LONGEST)

    def draw_ids(self, lengths: Sequence[int]) -> Tensor:
        """Return random ids, int64[T], of rows of these lengths, which end as texts do and hold no padding."""
        input_ids_T = torch.randint(0, self._size, (sum(lengths),), generator=torch.Generator().manual_seed(0))
        for id in self.special:
            input_ids_T[input_ids_T == id] = min({*range(9)} - {*self.special})
        if self._end is not None and self._end != self.padding and self._end < self._size:
            input_ids_T[torch.tensor(lengths).cumsum(0) - 1] = self._end  # BART reads a row's class off this token
        if self._inside is not None:
            starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
            input_ids_T[starts[::2] + torch.tensor(lengths)[::2] // 2] = self._inside
        return input_ids_T.to(next(self.model.parameters()).device)

    @contextmanager
    def with_id_inside(self, id: int) -> Iterator[None]:
        """Put this id into the middle of every other row, for a moment."""
        self._inside = id
        try:
            yield
        finally:
            self._inside = None

    def logits(self) -> Tensor:
        """Return the logits, N x V, that the head gives now."""
        return torch.cat([self._logits_of(*batch) for batch in self._batches()])

    def explain_difference(self, expected_NxV: Tensor) -> str:
        """Return why the logits are not the expected ones, or an empty string if they are."""
        try:
            logits_NxV = self.logits()
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"its head does not take single positions ({type(error).__name__}: {error})"
        return "" if _are_near(logits_NxV, expected_NxV) else "its head mixes positions"

    def rows_leak(self) -> bool:
        """Return whether the tokens of the first row change the logits of other rows, as LFM2's convolutions do."""
        for input_ids_T, lengths in self._batches():
            first = lengths[0]
            turned_T = torch.cat([input_ids_T[:first].flip(0), input_ids_T[first:]])
            before_3xV, after_3xV = (self._logits_of(ids_T, lengths)[-3:] for ids_T in (input_ids_T, turned_T))
            if not _are_near(after_3xV, before_3xV, _TOLERANCE_BETWEEN_ROWS):
                return True
        return False

    def padding_leaks(self) -> bool:
        """Return whether the embedding of padding changes the logits, however little.

        ConvBERT's convolutions carry next to nothing from there before training. MobileBERT's tokens see the embedding
        of their right neighbour, which for padding begins as zeros and is trained.
        """
        if self._embedding is None:
            return False
        before_NxV = self.logits()
        with disturbed_padding(self.model, self._embedding, self.padding):
            after_NxV = self.logits()
        return not _are_near(after_NxV, before_NxV, _TOLERANCE_BETWEEN_ROWS)

    def places_matter(self, expected_NxV: Tensor) -> bool:
        """Return whether a row's place in the batch matters: attention in Llama 4 counts the tokens of the batch."""
        with CountingFromFar({len(input_ids_T) for input_ids_T, _ in self._batches()}):
            return self.explain_difference(expected_NxV) != ""

    def guesses_mask(self, options: Mapping[str, Any]) -> bool:
        """Return whether the model, as XLM, takes a special id for padding where a row comes without a mask.

        options: further arguments of the model's forward.
        """
        for id in self.special:
            with self.with_id_inside(id):
                row_1xL = self.draw_ids([7])[None]
            try:
                guessed, masked = (
                    self.model(input_ids=row_1xL, attention_mask=mask, **options).logits
                    for mask in (None, torch.ones_like(row_1xL))
                )
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                continue
            if not _are_near(guessed, masked):
                return True
        return False

    def _batches(self) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield the ids and lengths of two batches, of odd and of even lengths: some models pad rows to a multiple."""
        for first in (self.longest - 1 + self.longest % 2, 1 << (max(1, self.longest // 2).bit_length() - 1)):
            lengths = [first, first - first // 8, first - first // 8, min(first, 6)]
            yield self.draw_ids(lengths), lengths


def _are_near(logits: Tensor, expected: Tensor, tolerance: float = _TOLERANCE) -> bool:
    """Return whether these have the same shape and differ little; NaN is near nothing."""
    return logits.shape == expected.shape and bool((logits - expected).abs().max() <= tolerance * expected.abs().max())


def _input_embedding(model: PreTrainedModel) -> nn.Module | None:
    """Return the embedding of ids; None for a model that has none, or several, as CANINE has."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None
