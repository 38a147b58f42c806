"""Documents that a program gives from Python, in place of a source: `MemoryDocuments`."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from datasets import Dataset

from minilm.config import IN_MEMORY_EVAL_SOURCE, IN_MEMORY_SOURCE, Data
from minilm.data.columns import Column
from minilm.data.tables import DatasetTable, NumberedRows, RowBatch, Table, group_into_batches

DocumentList: TypeAlias = Sequence[str] | Sequence[Mapping[str, Any]] | Dataset
"""Texts, rows with a cell for each column, or a dataset."""


class MemoryDocuments:
    """Documents from Python: those for training, and those for evaluation if they are not held out of the former.

    train, eval: a list of texts, a list of dictionaries, or a `datasets.Dataset`. Texts are the column `text`. Raise
    ValueError that names the item, as in `documents[7]`, if it is neither a text nor a dictionary like the items before
    it. Nothing is copied, so the items must not change while a run reads them.
    """

    def __init__(self, train: DocumentList, eval: DocumentList | None = None) -> None:
        self._lists = {IN_MEMORY_SOURCE: train} | ({} if eval is None else {IN_MEMORY_EVAL_SOURCE: eval})
        for source, documents in self._lists.items():
            _check_documents(documents, _name(source))

    def update_settings(self, data: Data) -> Data:
        """Return the settings of a run that reads these documents. They say that its sources are in memory.

        Raise ValueError for a setting that names other documents for the same purpose.
        """
        if data.source not in (Data.source, IN_MEMORY_SOURCE):
            raise ValueError(f"data.source {data.source}: documents were given from Python; leave one of them out")
        eval_source = data.eval_source
        if IN_MEMORY_EVAL_SOURCE in self._lists:
            for setting, value in (("eval_source", data.eval_source), ("eval_split", data.eval_split)):
                if value not in (None, IN_MEMORY_SOURCE, IN_MEMORY_EVAL_SOURCE):
                    raise ValueError(
                        f"data.{setting} {value}: eval_documents were given from Python; leave one of them out"
                    )
            # A model that is only evaluated has one set of documents.
            is_one = self._lists[IN_MEMORY_EVAL_SOURCE] is self._lists[IN_MEMORY_SOURCE]
            eval_source = IN_MEMORY_SOURCE if is_one else IN_MEMORY_EVAL_SOURCE
        elif eval_source == IN_MEMORY_EVAL_SOURCE:
            raise ValueError(
                "data.eval_source: the evaluation documents of this run were given from Python; pass eval_documents "
                "again, or another data.eval_source"
            )
        return replace(data, source=IN_MEMORY_SOURCE, eval_source=eval_source)

    def open_table(self, source: str, columns: Sequence[Column]) -> Table:
        """Return the rows of `IN_MEMORY_SOURCE` or `IN_MEMORY_EVAL_SOURCE`. Their identity is a hash of `columns`."""
        documents, name = self._lists[source], _name(source)
        table = _DatasetInMemory(documents, name) if isinstance(documents, Dataset) else _ListTable(documents, name)
        digest = hashlib.blake2b(digest_size=12)
        for batch in table.iter_batches(columns):
            digest.update(json.dumps(batch.cells, default=repr).encode())
        table.identity = [*map(table.read_class_names, columns), digest.hexdigest()]
        return table


def _name(source: str) -> str:
    """Return the name of documents in errors, which is that of the argument of `train`."""
    return source.strip("<>")


def _check_documents(documents: Any, name: str) -> None:
    """Raise ValueError unless the documents are a dataset, a list of texts or a list of dictionaries."""
    expected = "pass a list of strings, a list of dictionaries or a datasets.Dataset"
    if isinstance(documents, Dataset):
        if documents.format["type"] == "custom":
            raise ValueError(f"{name} has a transform, which minilm does not apply; pass the result of {name}.map(...)")
    elif isinstance(documents, str | Mapping) or not isinstance(documents, Sequence):
        raise ValueError(f"{name} is {type(documents).__name__}: {expected}")
    if not len(documents):
        raise ValueError(f"{name} is empty: {expected}")
    if isinstance(documents, Dataset):
        return
    kind = str if isinstance(documents[0], str) else Mapping
    for index, item in enumerate(documents):
        if not isinstance(item, kind):
            others = "" if index == 0 else f", but {name}[0] is {type(documents[0]).__name__}"
            raise ValueError(f"{name}[{index}] is {type(item).__name__}{others}: {expected}")


class _ListTable:
    """The rows of a list (a `minilm.data.tables.Table`). A text is the column `text` of its row."""

    identity: Any = None

    def __init__(self, documents: Sequence[str] | Sequence[Mapping[str, Any]], name: str) -> None:
        self.documents, self.name = documents, name

    def is_typed(self, column: Column) -> bool:
        return True

    def iter_batches(self, columns: Sequence[Column]) -> Iterator[RowBatch]:
        return group_into_batches(self._read(columns), partial(self.locate, 0))

    def _read(self, columns: Sequence[Column]) -> NumberedRows:
        for index in range(len(self.documents)):
            where, row = self.locate(0, index), self._get_row(index)
            try:
                yield index, [_to_plain(column.get_cell(row, where), where) for column in columns]
            except RecursionError:
                raise ValueError(f"{where}: the lists and dictionaries are nested too deeply") from None

    def _get_row(self, index: int) -> dict[str, Any]:
        document = self.documents[index]
        return {"text": document} if isinstance(document, str) else dict(document)

    def locate(self, file: int, place: int) -> str:
        return f"{self.name}[{place}]"

    def read_column_names(self, columns: Sequence[Column]) -> list[str]:
        return list(self._get_row(0))

    def read_class_names(self, column: Column) -> tuple[str, ...]:
        return ()


class _DatasetInMemory(DatasetTable):
    """The rows of a `datasets.Dataset`, which errors name by their index."""

    def __init__(self, rows: Dataset, name: str) -> None:
        super().__init__(rows, name, None)

    def locate(self, file: int, place: int) -> str:
        return f"{self.source}[{place}]"


def _to_plain(value: Any, where: str) -> Any:
    """Return a value in which numbers and arrays of numpy are those of Python, and tuples are lists.

    Raise ValueError for a dictionary with a key that is not a string.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_to_plain(item, where) for item in value]
    if isinstance(value, Mapping):
        if keys := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{where}: the key {keys[0]!r} of a dictionary is not a string; change the row")
        return {key: _to_plain(item, where) for key, item in value.items()}
    return value
