"""Data sources: open a file, a folder, a glob, a saved dataset or a dataset on the hub by name, and read its rows."""

import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

import datasets
from datasets import Dataset
from huggingface_hub import HfApi

from minilm.config import Data
from minilm.data.columnar_files import describe_damage
from minilm.data.columns import Column
from minilm.data.fingerprints import fingerprint_files
from minilm.data.hub_datasets import load_from_hub
from minilm.data.memory import MemoryDocuments
from minilm.data.rows import BlankPolicy, RowTable, cache_rows, read_batches
from minilm.data.tables import DatasetTable, FileTable, Table
from minilm.data.text_decoding import warn_once
from minilm.utils.hub import describe_loading_error, use_cache_if_offline
from minilm.utils.launch_variables import is_main_process
from minilm.utils.local_files import (
    IN_MEMORY_EVAL_SOURCE,
    IN_MEMORY_SOURCE,
    SPECIAL_SOURCES,
    find_file_kind,
    find_local_files,
    get_ending,
    is_local_path,
    is_plain_text,
    is_saved_dataset,
)
from minilm.utils.validation import suggest_name

log = logging.getLogger("minilm")

_pinned: ContextVar[Mapping[str, str]] = ContextVar("pinned revisions", default=MappingProxyType({}))

# The settings that name a column which not every objective reads, and what the column holds.
_OPTIONAL_COLUMNS = {"pair_column": "second text", "negative_column": "negatives", "score_column": "scores"}


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silence the log of the datasets library. Show its progress bars only in a terminal, from the main process."""
    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty() or not is_main_process(os.environ):
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def build_columns(data: Data, *, labels: bool = False) -> list[Column]:
    """Return the columns that a run reads, the text first."""
    columns = [Column(role="text", name=data.column)]
    if data.pair_column is not None:
        columns.append(Column(role="pair", name=data.pair_column))
    if labels:
        lists_labels = data.label_separator is not None
        columns.append(Column(role="label", name=data.label_column, kind="label", lists_labels=lists_labels))
    return columns


def check_data_settings(data: Data, columns: Sequence[Column], *, in_memory: bool = False) -> None:
    """Raise ValueError for a setting that has no effect: no source has what it is about, or its column is not read.

    columns: the columns that the run reads. in_memory: whether a program gives the documents of the sources in memory.
    """
    if not in_memory:
        _refuse_memory(data)
    sources = [source for source in (*data.sources, data.eval_source) if source is not None]
    kinds = {source: find_file_kind(source) for source in sources}

    def refuse(setting: str, why: str) -> None:
        value = getattr(data, setting)
        raise ValueError(f"--data.{setting.replace('_', '-')} {value}: {why}; leave it out")

    if all(source == "pydocs" or kinds[source] == "text" for source in sources):
        why = "pydocs has no columns" if sources == ["pydocs"] else "a .txt file has no columns"
        if data.column != Data.column:
            refuse("column", why)
        for setting in _OPTIONAL_COLUMNS:
            if getattr(data, setting) is not None:
                refuse(setting, why)
    if data.delimiter is not None and "delimited" not in kinds.values():
        refuse("delimiter", "no source is .csv or .tsv")
    if data.document != Data.document and "text" not in kinds.values():
        refuse("document", "no source is .txt")
    if data.config is not None and not any(map(_is_on_hub, sources)):
        refuse("config", "no source is a dataset on the hub")
    for source in SPECIAL_SOURCES:
        owner = "pydocs has" if source == "pydocs" else "documents from Python have"
        if source in data.sources and data.split != Data.split:
            refuse("split", f"{owner} no splits")
        if data.eval_source == source and data.eval_split not in (None, "train"):
            refuse("eval_split", f"{owner} no splits")
        if source in data.sources and data.eval_source is None and data.eval_split:
            raise ValueError(f"data.eval_split: {owner} no splits; give data.eval_fraction or data.eval_source")
    names = [column.name for column in columns]
    if data.column != Data.column and data.column not in names:
        refuse("column", "the objective reads other columns")
    for setting, content in _OPTIONAL_COLUMNS.items():
        if getattr(data, setting) is not None and getattr(data, setting) not in names:
            refuse(setting, f"the objective reads no {content}")
    if data.label_column != Data.label_column and data.label_column not in names:
        refuse("label_column", "the objective reads no labels")
    if data.label_separator is not None and not any(column.lists_labels for column in columns):
        refuse("label_separator", "the objective reads no labels")


def _refuse_memory(data: Data) -> None:
    """Raise ValueError if the settings are those of a run whose documents came from Python."""
    for setting, value in (*(("source", source) for source in data.sources), ("eval_source", data.eval_source)):
        if value in (IN_MEMORY_SOURCE, IN_MEMORY_EVAL_SOURCE):
            raise ValueError(
                f"--data.{setting.replace('_', '-')} {value}: these documents were given from Python, and are not "
                f"stored; pass them to train again, or pass another --data.{setting.replace('_', '-')}"
            )


def _is_on_hub(source: str) -> bool:
    return source not in SPECIAL_SOURCES and not is_local_path(source) and not list_files(source)


def load_rows(
    data: Data,
    source: str,
    split: str,
    columns: Sequence[Column],
    *,
    blank: BlankPolicy = "keep",
    memory: MemoryDocuments | None = None,
) -> RowTable:
    """Return the rows of a split of a source, memory-mapped.

    Labels are integers, floats, strings, booleans, or lists of these, of the same type in all rows. If they are a
    ClassLabel in the source, they stay one. `blank` decides whether rows without a visible character are kept, dropped
    or refused. `memory` has the documents of the sources in memory. Raise ValueError that names the file and the line,
    row, column or split at fault.
    """
    if source in (IN_MEMORY_SOURCE, IN_MEMORY_EVAL_SOURCE):
        assert memory is not None
        table, part = memory.open_table(source, columns), "train"
    else:
        table, part = open_table(data, source, split, columns)
    _warn_about_second_text(table, columns)
    return cache_rows(table, columns, source=source, split=part, blank=blank)


def stream_rows(data: Data, source: str, split: str, revision: str | None = None) -> Iterator[list[str]]:
    """Yield the texts of a split that have a visible character, in batches. Nothing is stored.

    `split` may be a part such as `train[:5000]`, but not a part by percent.
    """
    columns = build_columns(data)[:1]
    table, part = open_table(data, source, split, columns, streaming=True, revision=revision)
    for batch in read_batches(table, columns, split=part):
        yield batch["text"]


def open_table(
    data: Data,
    source: str,
    split: str,
    columns: Sequence[Column],
    *,
    streaming: bool = False,
    revision: str | None = None,
) -> tuple[Table, str]:
    """Return a table of a source's rows, and the part of the table to read, such as `train` or `train[:5000]`.

    columns: the columns that will be read.
    """
    # The name of a split, and the row numbers of a part such as `train[5:100]`.
    sliced = re.fullmatch(r"([^\[]+)(?:\[(\d*):(\d*)\])?", split)
    if streaming and sliced is None:
        raise ValueError(f"{source}: a stream cannot read the part {split}; give row numbers, as in train[:5000]")
    if files := find_local_files(source):
        _check_files(source, split, files)
        return FileTable(files, data, streaming=streaming), split
    if streaming and not is_local_path(source):
        assert sliced is not None
        rows = _load(source, columns, name=data.config, split=sliced[1], revision=revision, streaming=True)
        start, stop = int(sliced[2] or 0), sliced[3]
        if start and not stop:
            raise ValueError(
                f"data source {source}: a stream of the hub cannot read {split} to its end before the first step: give "
                f"an end, as in {sliced[1]}[{start}:{start + 50000}], or the whole split"
            )
        rows = rows.skip(start) if start else rows
        rows = rows.take(max(0, int(stop) - start)) if stop else rows
        return DatasetTable(rows, source, revision, is_delimited=rows.info.builder_name == "csv"), "train"
    cached = use_cache_if_offline(source, "dataset")
    rows = _load(source, columns, name=data.config, split=split, revision=_pinned.get().get(source))
    if cached:
        log.warning(f"the hub does not answer: {source} comes from the cache")
    # The fingerprint of a saved dataset does not change when its files do.
    saved = fingerprint_files(list_files(source))
    if saved:
        return DatasetTable(rows, source, [saved, split]), "train"
    return DatasetTable(rows, source, rows._fingerprint, is_delimited=rows.info.builder_name == "csv"), "train"


def no_documents_error(source: str, split: str, columns: Sequence[Column]) -> ValueError:
    """Return the error for a source that has no rows, or no text with a visible character."""
    texts = [column.name for column in columns if column.kind == "text"]
    if source in (IN_MEMORY_SOURCE, IN_MEMORY_EVAL_SOURCE):
        return ValueError(f"{source.strip('<>')}: no document has text (column {texts[0]!r})")
    if not texts:
        return ValueError(f"{source}: it has no rows (split {split!r}); change the source or the split")
    at = "" if is_plain_text(source) else "".join(f", column {name!r}" for name in texts[:1])
    return ValueError(
        f"{source}: no document has text (split {split!r}{at}); change the source, the split or the column"
    )


def _warn_about_second_text(table: Table, columns: Sequence[Column]) -> None:
    """Warn if a table with labels has a second text that is not read, such as sentence2 beside sentence1."""
    text = columns[0].name
    second = text.removesuffix("1") + "2"
    if [column.role for column in columns] != ["text", "label"] or not text.endswith("1"):
        return
    if second in table.read_column_names(columns):
        warn_once(f"WARNING: the column {second} is not read; to read pairs of texts, pass --data.pair-column {second}")


def fingerprint_sources(data: Data) -> dict[str, Any]:
    """Return the content of each source, as JSON types: the fingerprints of its files, or a revision on the hub."""
    facts: dict[str, Any] = {}
    for source in dict.fromkeys((*data.sources, data.eval_source)):
        if source is None or source in SPECIAL_SOURCES:
            continue
        # If the hub does not answer, the dataset comes from the cache, and its revision is not recorded.
        with suppress(ValueError, OSError):
            if files := list_files(source):
                pairs = zip(files, fingerprint_files(files), strict=True)
                facts[source] = [{"file": name, **fingerprint} for name, fingerprint in pairs]
            else:
                facts[source] = {"revision": fetch_revision(source)}
    return facts


def list_files(source: str) -> list[str]:
    """Return the files of a source, including those of a saved dataset; empty for a dataset on the hub."""
    path = os.path.expanduser(source)
    if not is_saved_dataset(path):
        return find_local_files(source)
    return sorted(os.path.join(at, name) for at, _, names in os.walk(path) for name in names)


@contextmanager
def pin_revisions(revisions: Mapping[str, str]) -> Iterator[None]:
    """In the block, read these commits of datasets on the hub, by source, in place of the newest ones.

    A block inside another one keeps the commits of the other sources.
    """
    before = _pinned.set({**_pinned.get(), **revisions})
    try:
        yield
    finally:
        _pinned.reset(before)


def fetch_revisions(data: Data) -> dict[str, str]:
    """Return the commit of each source that is a dataset on the hub, as `fetch_revision` does.

    A source about which the hub does not answer is left out. Only the cache may have it, in which copies have no commit
    that could be chosen. A stream reads no copy, so that ValueError is raised for it.
    """
    revisions = dict[str, str]()
    for source in dict.fromkeys((*data.sources, data.eval_source)):
        # Reading a source that does not exist raises an error that says more.
        with suppress(OSError) if data.streaming else suppress(ValueError, OSError):
            if source is not None and _is_on_hub(source):
                revisions[source] = fetch_revision(source)
    return revisions


def fetch_revision(source: str) -> str:
    """Return the pinned commit of a dataset on the hub, or else its newest. Raise ValueError if the hub is silent."""
    if source in _pinned.get():
        return _pinned.get()[source]
    try:
        return str(HfApi().dataset_info(source, timeout=10).sha)
    except Exception as error:
        # The HTTP libraries raise errors of different types.
        raise ValueError(f"data source {source}: {describe_loading_error(error, 'dataset')}") from error


def _check_files(source: str, split: str, files: list[str]) -> None:
    """Raise ValueError if files cannot have this split, or if all files are empty."""
    if split.partition("[")[0] != "train":
        raise ValueError(
            f"data source {source}: files have no split {split!r}, only train and parts of it such as train[:90%]"
        )
    try:
        datasets.ReadInstruction.from_spec(split)
    except (ValueError, AssertionError) as error:
        unknown = str(error).startswith("Unrecognized instruction")
        why = _describe_bad_split(split) if unknown else f"the split {split!r}: {error}"
        raise ValueError(f"data source {source}: {why}") from error
    if not any(map(os.path.getsize, files)):
        raise ValueError(f"data source {source}: it is empty")


def _describe_bad_split(split: str) -> str:
    return f"the split {split!r} is not written like train, train[:5000] or train[10%:90%]"


def _load(
    source: str,
    columns: Sequence[Column],
    *,
    name: str | None,
    split: str,
    revision: str | None = None,
    streaming: bool = False,
) -> Any:
    """Load a saved dataset or a dataset on the hub with the datasets library. Raise ValueError in one line."""
    path = os.path.expanduser(source)
    try:
        if os.path.isdir(path):
            return _load_saved(path, split)
        return load_from_hub(path, columns, name=name, split=split, revision=revision, streaming=streaming)
    except Exception as error:
        # The library raises errors of many types.
        generating = isinstance(error, datasets.exceptions.DatasetGenerationError)
        why = describe_loading_error(error.__cause__ if generating and error.__cause__ else error, "dataset")
        if why.startswith("Unrecognized instruction"):
            why = _describe_bad_split(split)
        for file in list_files(source) if os.path.isdir(path) else ():
            if get_ending(file) == ".arrow" and (damage := describe_damage(file)):
                raise ValueError(f"{file}: {damage}") from error
        raise ValueError(f"data source {source}: {why}") from error


def _load_saved(path: str, split: str) -> Dataset:
    """Load a split of a saved dataset, or a part of a split, and read no other split."""
    name = split.partition("[")[0]
    listing = Path(path, datasets.config.DATASETDICT_JSON_FILENAME)
    names = json.loads(listing.read_text())["splits"] if listing.is_file() else ["train"]
    if name not in names:
        raise ValueError(f"no split {suggest_name(name, names)}")
    folder = Path(path, name) if listing.is_file() else Path(path)
    if not json.loads((folder / datasets.config.DATASET_STATE_JSON_FILENAME).read_text())["_data_files"]:
        raise ValueError("it is empty")
    rows = datasets.load_from_disk(str(folder))
    (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows)})
    return rows.select(range(part.from_ or 0, len(rows) if part.to is None else part.to))
