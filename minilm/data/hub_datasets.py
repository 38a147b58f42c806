"""Datasets on the hub, loaded with the datasets library so that each cell keeps its type."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
from datasets import DatasetInfo
from datasets.builder import Key
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from datasets.utils.json import get_json_field_paths_from_feature

from minilm.data.columns import Column
from minilm.utils.cache import get_cache_folder

# Part of the name of a cache. Another rule for how the files of `_REWRITTEN` are read needs another number.
_RULES = 2
# The kinds of files whose cells the datasets library may change.
_REWRITTEN = ("json", "csv")
# What a cell of CSV without a value holds, if its column has another type than text.
_MISSING = ("", "NA", "N/A", "n/a", "<NA>", "nan", "NaN", "NULL", "null", "None")
_NOT_TEXT = "values that are not text, of which the datasets library would make text; write them as text"
# JSON has no type for dates, so that they are texts in the files.
_DATES = (
    "texts that look like dates, which the datasets library would rewrite; download the files and give them as the "
    "source"
)


def load_from_hub(
    path: str, columns: Sequence[Column], *, name: str | None, split: str, revision: str | None, streaming: bool
) -> Any:
    """Return the rows of a split, a `Dataset`, or an `IterableDataset` if `streaming`.

    columns: the columns to read. name: the configuration. revision: a commit; None for the newest.

    If the hub fails, the library takes the newest copy in its cache, whatever its commit. Without a `revision`, its log
    is the only sign. A stream never reads such a copy, whose files and groups of rows are others than those of the hub.
    Raise ValueError for a copy of another commit than `revision`, and the errors of the library, which are of many
    types.
    """

    def open_builder(cache: Path | None) -> Any:
        folder = None if cache is None else str(cache)
        builder = datasets.load_dataset_builder(path, name=name, revision=revision, cache_dir=folder)
        if isinstance(builder, Json):
            builder._cast_table = _ExactCast(builder, tuple(columns), streaming)
        if isinstance(builder, Csv):
            builder._generate_tables = _ExactRead(builder)
        return builder

    if streaming:
        # A cache of its own, in which no dataset is ever stored, leaves the library no copy to fall back on.
        return open_builder(get_cache_folder() / "streams").as_streaming_dataset(split=split)
    builder = None
    # If this fails, the other cache may have a copy. If it has none, opening it raises the same error.
    with suppress(Exception):
        builder = open_builder(None)
    # The library's cache may have a copy in which cells were changed.
    if builder is None or builder.info.builder_name in _REWRITTEN:
        builder = open_builder(_get_exact_cache(columns))
    if revision is not None and builder.hash != revision:
        raise ValueError(
            f"the hub did not give the commit {revision} of this run, and the newest copy in the cache is of "
            f"{builder.hash}; try again later"
        )
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def is_text(info: DatasetInfo, name: str) -> bool:
    """Return whether a column of a CSV dataset holds the text of its files: its types may say otherwise."""
    feature = (info.features or {}).get(name)
    return feature is None or getattr(feature, "dtype", "") in ("string", "large_string")


def _get_exact_cache(columns: Sequence[Column]) -> Path:
    """Return the cache of datasets of the kinds `_REWRITTEN` in which the cells of these columns were not changed."""
    names = json.dumps([_RULES, *sorted(column.name for column in columns)])
    return get_cache_folder() / f"exact-{hashlib.sha256(names.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class _ExactRead:
    """Stands in for `_generate_tables` of the library's CSV builder, which lets pandas guess the types of cells.

    That made 1 of `01`, and left out `NA`. Here a cell is its text, unless the dataset's card says the type of its
    column. ValueError is raised for rows that have more cells than the header, which would be read shifted by one.
    """

    builder: Csv

    def __call__(
        self, base_files: Sequence[str], files_iterables: Sequence[Sequence[str]]
    ) -> Iterator[tuple[Key, pyarrow.Table]]:
        info = self.builder.info
        typed = [name for name in info.features or () if not is_text(info, name)]
        settings = {
            **self.builder.config.pd_read_csv_kwargs,
            "dtype": {name: object for name in info.features if name not in typed} if typed else object,
            "keep_default_na": False,
            "na_values": dict.fromkeys(typed, _MISSING),
        }
        for shard, files in enumerate(files_iterables):
            for file in files:
                for number, frame in enumerate(pandas.read_csv(file, iterator=True, **settings)):
                    if not isinstance(frame.index, pandas.RangeIndex):
                        raise ValueError("a row has more cells than the header")
                    yield Key(shard, number), self.builder._cast_table(pyarrow.Table.from_pandas(frame))


@dataclass(frozen=True)
class _ExactCast:
    """Stands in for `_cast_table` of the library's JSON builder, which gives a chunk of a file the dataset's types.

    The dataset's card or the first chunk decides the types. Where a type is text, the builder makes text of numbers,
    dates and objects. If a column of a chunk has cells of several types, the builder makes JSON text of all of them, so
    that the text `a` becomes `"a"`. This class raises ValueError for both in the columns that are read.
    """

    builder: Json
    columns: tuple[Column, ...]
    streaming: bool

    def __call__(self, table: pyarrow.Table, json_field_paths: Sequence[Sequence[Any]] = ()) -> pyarrow.Table:
        for column in self.columns:
            problem = self._find_problem(column, table, json_field_paths)
            if problem is not None:
                raise ValueError(f"column {column.name!r} holds {problem}")
        options = {"json_field_paths": json_field_paths} if json_field_paths else {}
        return type(self.builder)._cast_table(self.builder, table, **options)

    def _find_problem(
        self, column: Column, table: pyarrow.Table, json_field_paths: Sequence[Sequence[Any]]
    ) -> str | None:
        """Return which cells of a column the builder would rewrite, and what to do; None if it rewrites none."""
        name, features = column.find_outer(table.column_names), self.builder.info.features
        # Without a type from the first chunk, each chunk of a dataset on disk keeps its own.
        if name is None or (features is None and not self.streaming):
            return None
        # The library reads the values at these paths back from their JSON text.
        parsed = [] if features is None else get_json_field_paths_from_feature(features)
        keys = [name, *column.name.removeprefix(name).split(".")[1:]]
        for path in json_field_paths:
            # 0 stands for the items of a list.
            outer = [key for key in path if key != 0]
            if outer == keys[: len(outer)] and path not in parsed:
                return _NOT_TEXT
        if features is None or name not in features:
            return None
        return _compare_types(table.schema.field(name).type, features.arrow_schema.field(name).type)


def _compare_types(before: Any, after: Any) -> str | None:
    """Return which cells a cast from one type of Arrow to another makes text of, and what to do; None if of none."""
    types = pyarrow.types
    if types.is_string(after) or types.is_large_string(after):
        if types.is_string(before) or types.is_large_string(before) or types.is_null(before):
            return None
        return _DATES if types.is_temporal(before) else _NOT_TEXT
    if types.is_list(after) and types.is_list(before):
        return _compare_types(before.value_type, after.value_type)
    if types.is_struct(after) and types.is_struct(before):
        common = {field.name for field in before} & {field.name for field in after}
        problems = [_compare_types(before.field(name).type, after.field(name).type) for name in sorted(common)]
        return next(filter(None, problems), None)
    return None
