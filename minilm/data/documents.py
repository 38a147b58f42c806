"""Stored documents: `load_documents` and `load_row_tables` read the sources, with one document per row."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from minilm.config import Data
from minilm.data.columns import Column
from minilm.data.glue import apply_glue_task
from minilm.data.memory import MemoryDocuments
from minilm.data.pydocs import load_pydocs
from minilm.data.rows import BlankPolicy, RowTable
from minilm.data.sources import build_columns, check_data_settings, load_rows, no_documents_error, quiet_datasets
from minilm.data.splits import assemble_splits
from minilm.data.tables import check_is_text
from minilm.utils.local_files import is_plain_text


def load_documents(
    data: Data, seed: int, *, labels: bool = False, memory: MemoryDocuments | None = None
) -> tuple[Dataset, dict[str, Dataset]]:
    """Return (training documents, evaluation documents by name).

    Each is a dataset with the string column `text`. If `data.pair_column` is set, the column `pair` holds a second
    text. With `labels`, the column `label` has the type that it has in the source, such as a ClassLabel.
    The rows and the errors are those of `load_row_tables`.
    """
    data = apply_glue_task(data)
    train, parts = load_row_tables(data, seed, build_columns(data, labels=labels), memory)
    return train.dataset, {name: part.dataset for name, part in parts.items()}


@quiet_datasets()
def load_row_tables(
    data: Data, seed: int, columns: Sequence[Column], memory: MemoryDocuments | None = None
) -> tuple[RowTable, dict[str, RowTable]]:
    """Return (training rows, evaluation rows by name).

    A row without a visible character in its columns of texts is dropped. If a column of labels is read, or one with the
    role `label`, a row with a blank text raises ValueError. The rows are memory-mapped, except those of pydocs and
    those of a single-document file that is cut in two. `memory` holds documents from Python, which are read in place of
    `data.source`.

    `minilm.data.splits.assemble_splits` says which rows are for evaluation. If a fraction is held out, `seed` decides
    which rows it holds. Raise ValueError in one line that names the file, row, column or split.
    """
    if memory is not None:
        data = memory.update_settings(data)
    check_data_settings(data, columns, in_memory=memory is not None)
    data = apply_glue_task(data)
    if data.streaming:
        raise ValueError("data.streaming: only language models can read a stream; leave it out")
    return assemble_splits(data, _RowReader(data, seed, tuple(columns), memory))


@quiet_datasets()
def load_all_documents(data: Data) -> Dataset:
    """Return the documents of `data.split` of all sources, one source after the other. Blank documents are kept."""
    columns = build_columns(data)
    check_data_settings(data, columns)
    first, *others = [_read(data, source, data.split, columns, "keep") for source in data.sources]
    return first.join(others).dataset


@dataclass(frozen=True)
class _RowReader:
    """Reads documents as tables of rows (a `minilm.data.splits.SplitReader`)."""

    data: Data
    seed: int
    columns: tuple[Column, ...]
    memory: MemoryDocuments | None

    def read(self, source: str, split: str) -> RowTable:
        has_labels = any(column.kind == "label" or column.role == "label" for column in self.columns)
        return _read(self.data, source, split, self.columns, "refuse" if has_labels else "drop", self.memory)

    def hold_out(self, source: str) -> tuple[RowTable, RowTable]:
        """Hold out random documents. For pydocs, these are whole modules; for a file that is one document, its end."""
        fraction = self.data.eval_fraction
        if source == "pydocs":
            _check_has_columns(source, self.columns)
            train_texts, eval_texts = load_pydocs(fraction)
            return (
                RowTable.from_texts(self.columns, train_texts, source),
                RowTable.from_texts(self.columns, eval_texts, f"{source}, held out"),
            )
        documents = self.read(source, self.data.split)
        if self.data.document == "file" and is_plain_text(source):
            return _cut_ends(documents, source, fraction)
        count = round(len(documents) * fraction)
        if not 0 < count < len(documents):
            part = "training" if count else "evaluation"
            raise ValueError(
                f"{source}: data.eval_fraction={fraction} of {len(documents)} documents leaves no {part} document; "
                "change data.eval_fraction or give data.eval_source"
            )
        return documents.hold_out(count, self.seed)

    def repeat(self, documents: RowTable, source: str, weight: float) -> RowTable:
        """Repeat all documents. For the fraction of `weight`, add a random share of them, in their order."""
        whole, share = divmod(weight, 1)
        drawn = np.random.default_rng(self.seed).permutation(len(documents))[: round(share * len(documents))]
        indices = [*range(len(documents))] * int(whole) + sorted(drawn.tolist())
        if not indices:
            raise ValueError(
                f"{source}: data.weights {weight} selects none of {len(documents)} documents; give a larger weight"
            )
        return documents.select(indices)

    def join(self, parts: list[RowTable]) -> RowTable:
        return parts[0].join(parts[1:]) if len(parts) > 1 else parts[0]


def _cut_ends(documents: RowTable, source: str, fraction: float) -> tuple[RowTable, RowTable]:
    """Return the beginnings of the documents, and their ends, which have `fraction` of the characters."""
    texts = documents.dataset[documents.columns[0].role]
    cuts = [int(len(text) * (1 - fraction)) for text in texts]
    beginnings = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    ends = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
    return (
        RowTable.from_texts(documents.columns, beginnings, f"{source}, beginnings"),
        RowTable.from_texts(documents.columns, ends, f"{source}, ends"),
    )


def _read(
    data: Data,
    source: str,
    split: str,
    columns: Sequence[Column],
    blank: BlankPolicy,
    memory: MemoryDocuments | None = None,
) -> RowTable:
    """Return the rows of a split."""
    _check_has_columns(source, columns)
    if source == "pydocs":
        return RowTable.from_texts(columns, load_pydocs()[0], source)
    rows = load_rows(data, source, split, columns, blank=blank, memory=memory)
    if len(rows) == 0:
        raise no_documents_error(source, split, columns)
    return rows


def _check_has_columns(source: str, columns: Sequence[Column]) -> None:
    """Raise ValueError for a column that a source of plain text does not have."""
    if source != "pydocs" and not is_plain_text(source):
        return
    if any(column.kind == "label" for column in columns):
        owner = "pydocs has" if source == "pydocs" else f"data source {source}: a .txt file has"
        raise ValueError(f"{owner} no labels; give .jsonl, .csv, .tsv or .parquet")
    check_is_text(columns, source)
