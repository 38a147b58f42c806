"""Documents that a run reads without learning from them: `data.exclude_loss`.

Their tokens stay in the input, so that order, masks, dropout and batches are those of the run without the setting. Only
their targets do not count: the loss of a step is the mean over the other targets, and 0 if there are none.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from minilm.config import Config
from minilm.data.corpus import Examples, PreparedData
from minilm.data.micro_batch import Collator, MicroBatch
from minilm.data.phased_batches import RunPlan
from minilm.utils.number_ranges import parse_ranges


class ExcludingCollator:
    """A collator whose micro-batches do not count the targets of some documents.

    collator: makes the micro-batches. examples: those that it reads, with `document_bounds`. documents: their numbers.
    """

    def __init__(self, collator: Collator, examples: Examples, documents: Sequence[range]) -> None:
        self._collator, self._examples = collator, examples
        self._starts, self._stops = _find_ids(examples, documents)
        self.padded, self.multiple = collator.padded, collator.multiple

    def rate(self, progress: float = 0.0) -> float:
        """Return the rate of the collator."""
        return self._collator.rate(progress)

    def __call__(
        self, rows: Sequence[NDArray[np.int64]], examples: NDArray[np.int64], epoch: int, progress: float = 0.0
    ) -> MicroBatch:
        """Return the collator's micro-batch without the targets of the documents."""
        batch = self._collator(rows, examples, epoch, progress)
        first_E = self._examples.start[examples]
        if batch.example_ids_N is not None:
            # Each example has one target, and belongs to one document.
            counted_N = ~self._contain(first_E)
            if counted_N.all():
                return batch
            return replace(batch, counted_N=torch.from_numpy(counted_N), uncounted=int((~counted_N).sum()))
        # The target of a causal LM is the token after the place at which it is predicted.
        place_N = batch.target_index_N.numpy() + getattr(self._collator, "target_offset", 0)
        begin_E = np.cumsum([0, *map(len, rows)])[:-1]
        row_N = np.searchsorted(begin_E, place_N, side="right") - 1
        id_N = first_E[row_N] + place_N - begin_E[row_N] - len(self._examples.prefix)
        kept_N = torch.from_numpy(~self._contain(id_N))
        return replace(batch, target_index_N=batch.target_index_N[kept_N], target_ids_N=batch.target_ids_N[kept_N])

    def _contain(self, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return whether the documents contain the ids at these places of the corpus."""
        last = np.searchsorted(self._starts, places, side="right") - 1
        contained: NDArray[np.bool_] = (last >= 0) & (places < self._stops[last])
        return contained


def _find_ids(examples: Examples, documents: Sequence[range]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each range of documents begins and ends in `Examples.ids`."""
    bounds = examples.document_bounds
    assert bounds is not None
    return bounds[[part.start for part in documents]], bounds[[part.stop for part in documents]]


def check_excluded_documents(config: Config, prepared: PreparedData) -> None:
    """Raise ValueError if the run has no training documents with the numbers of `data.exclude_loss`."""
    if config.data.exclude_loss is None:
        return
    documents = parse_ranges(config.data.exclude_loss)
    for examples in prepared.all_train:
        assert examples.document_bounds is not None
        count = len(examples.document_bounds) - 1
        if documents[-1].stop > count:
            raise ValueError(
                f"data.exclude_loss: there is no training document {documents[-1].stop - 1}: their numbers are 0 to "
                f"{count - 1}"
            )


def find_first_use(
    plan: RunPlan, prepared: PreparedData, documents: Sequence[range], steps: range
) -> tuple[int, int] | None:
    """Return the first of some steps that reads one of the documents, and the number of that document, or None."""
    used_E = np.concatenate([_mark_examples(examples, documents) for examples in prepared.all_train])
    for step in steps:
        ids = plan.examples_of(step)
        if used_E[ids].any():
            return step, _find_document(prepared, documents, int(ids[used_E[ids]].min()))
    return None


def _mark_examples(examples: Examples, documents: Sequence[range]) -> NDArray[np.bool_]:
    """Return which examples have a token of one of the documents, bool[E]."""
    starts, stops = _find_ids(examples, documents)
    # The first range that ends after the beginning of the example.
    at = np.searchsorted(stops, examples.start, side="right")
    begin_E = np.append(starts, np.iinfo(np.int64).max)[at]
    marked: NDArray[np.bool_] = begin_E < examples.stop
    return marked


def _find_document(prepared: PreparedData, documents: Sequence[range], number: int) -> int:
    """Return the first of the documents that an example reads. number: that of the example in `JoinedExamples`."""
    for examples in prepared.all_train:
        if number < len(examples):
            assert examples.document_bounds is not None
            bounds, start = examples.document_bounds, examples.start[number]
            first = int(np.searchsorted(bounds, start, side="right") - 1)
            return next(max(first, part.start) for part in documents if part.stop > first)
        number -= len(examples)
    raise AssertionError
