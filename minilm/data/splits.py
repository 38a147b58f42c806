"""Choose the training and evaluation documents: the sources, the split of each, and how often to repeat it.

`assemble_splits` decides this once for documents that are stored and for documents that are streamed. A `SplitReader`
does the reading.
"""

from collections.abc import Mapping
from typing import Protocol, TypeVar

from minilm.config import Data

T = TypeVar("T")


class SplitReader(Protocol[T]):
    """Reads documents. T is the type of the result, a dataset or a stream. Raises ValueError without documents."""

    def read(self, source: str, split: str) -> T:
        """Return the documents of a split of a source."""

    def hold_out(self, source: str) -> tuple[T, T]:
        """Divide `data.split` of a source into (training documents, evaluation documents).

        `data.eval_fraction` is the share of the evaluation documents.
        """

    def repeat(self, documents: T, source: str, weight: float) -> T:
        """Return the training documents of a source `weight` times, such as once and a half for 1.5."""

    def join(self, parts: list[T]) -> T:
        """Return all documents of several parts, one part after the other."""


def assemble_splits(data: Data, reader: SplitReader[T]) -> tuple[T, dict[str, T]]:
    """Return (training documents, evaluation documents by name).

    Training documents come from `data.split` of each source, in the order of the sources. `data.weights` repeats them.

    Evaluation documents come from `data.eval_source` if it is set, else from `data.eval_split`, else from a fraction of
    each source. They are one set with the name "". If `data.eval_split` joins several splits by `+`, each split is a
    set with its own name. If the evaluation documents are the training documents, the result has the same object twice.
    """
    if data.eval_source is None and data.eval_split is None:
        halves = [reader.hold_out(source) for source in data.sources]
        train = [half[0] for half in halves]
        evaluation = {"": reader.join([half[1] for half in halves])}
    else:
        train = [reader.read(source, data.split) for source in data.sources]
        splits = (data.eval_split or "train").split("+")
        sources = (data.eval_source,) if data.eval_source else data.sources
        if not data.weights and (sources, splits) == (data.sources, [data.split]):
            documents = reader.join(train)
            return documents, {"": documents}
        evaluation = {
            split if len(splits) > 1 else "": reader.join([reader.read(source, split) for source in sources])
            for split in splits
        }
    if data.weights:
        weighted = zip(train, data.sources, data.weights, strict=True)
        train = [reader.repeat(documents, source, weight) for documents, source, weight in weighted]
    return reader.join(train), evaluation


def is_one_dataset(train: object, parts: Mapping[str, object]) -> bool:
    """Return whether training and evaluation have the same documents, as they do for a model that is only evaluated."""
    return all(part is train for part in parts.values())
