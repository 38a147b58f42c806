"""From a name to rows: files, folders, globs, saved datasets and the hub."""

import glob
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from huggingface_hub import HfApi

from minilm.checks import closest
from minilm.columnar import where_damaged
from minilm.columns import Column
from minilm.config import Data
from minilm.files import KINDS, ending, file_content, file_kind, warn_once
from minilm.hub import expect, is_path, reason
from minilm.job import is_main
from minilm.rows import Blank, map_rows, read_batches
from minilm.tables import DatasetTable, FileTable, Table

log = logging.getLogger("minilm")


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """The datasets library without its log, whose errors are raised too; with its bars only at a terminal, once."""
    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty() or not is_main(os.environ):
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def is_text(source: str) -> bool:
    """Whether a source is files of plain text."""
    return _kind_of_files(source) == "text"


def _kind_of_files(source: str) -> str:
    """The kind of a source's files; empty for pydocs, saved datasets and datasets on the hub."""
    files = [] if source == "pydocs" else local_files(source)
    return file_kind(files[0]) if files else ""


def columns_of(data: Data, *, labels: bool = False) -> list[Column]:
    """The columns that are asked for."""
    columns = [Column(role="text", name=data.column)]
    if data.pair_column is not None:
        columns.append(Column(role="pair", name=data.pair_column))
    if labels:
        lists_labels = data.label_separator is not None
        columns.append(Column(role="label", name=data.label_column, lists_labels=lists_labels))
    return columns


def check_data_settings(data: Data, *, labels: bool) -> None:
    """Raise ValueError for a setting that no source can follow, or that needs labels where none are read."""
    sources = [source for source in (*data.sources, data.eval_source) if source is not None]
    kinds = {source: _kind_of_files(source) for source in sources}

    def refuse(setting: str, why: str) -> None:
        value = getattr(data, setting)
        raise ValueError(f"--data.{setting.replace('_', '-')} {value}: {why}; leave it out")

    if all(source == "pydocs" or kinds[source] == "text" for source in sources):
        what = "pydocs has" if sources == ["pydocs"] else "a .txt file has"
        if data.column != Data.column:
            refuse("column", f"{what} no columns")
        if data.pair_column is not None:
            refuse("pair_column", f"{what} no columns")
    if data.delimiter is not None and "delimited" not in kinds.values():
        refuse("delimiter", "no source is .csv or .tsv")
    if data.document != Data.document and "text" not in kinds.values():
        refuse("document", "no source is .txt")
    if data.config is not None and not any(map(_is_on_hub, sources)):
        refuse("config", "no source is a dataset on the hub")
    if "pydocs" in data.sources and data.split != Data.split:
        refuse("split", "pydocs has no splits")
    if data.eval_source == "pydocs" and data.eval_split not in (None, "train"):
        refuse("eval_split", "pydocs has no splits")
    if not labels and data.label_column != Data.label_column:
        refuse("label_column", "the objective reads no labels")
    if not labels and data.label_separator is not None:
        refuse("label_separator", "the objective reads no labels")


def _is_on_hub(source: str) -> bool:
    return source != "pydocs" and not is_path(source) and not files_of(source)


def read_rows(data: Data, source: str, split: str, *, labels: bool = False, blank: Blank = "keep") -> Dataset:
    """The rows of a split of a source as a memory-mapped dataset with the columns `text`, `pair` and `label`.

    Texts are strings. A label is a whole number, a number, a string, a truth value or a list of these, the same in all
    rows, or a ClassLabel where the source has one. What happens to rows without a visible character, `blank` says.
    Raises ValueError that names the file and the line, the row, the column or the split at fault.
    """
    table, part = open_table(data, source, split)
    columns = columns_of(data, labels=labels)
    _look_for_second_text(table, columns)
    return map_rows(table, columns, split=part, blank=blank)


def stream_rows(data: Data, source: str, split: str, revision: str | None = None) -> Iterator[list[str]]:
    """The texts of `read_rows` that have a visible character, in batches, with nothing stored.

    A slice of a split is of numbers of rows.
    """
    table, part = open_table(data, source, split, streaming=True, revision=revision)
    for batch in read_batches(table, columns_of(data)[:1], split=part):
        yield batch["text"]


def open_table(
    data: Data, source: str, split: str, *, streaming: bool = False, revision: str | None = None
) -> tuple[Table, str]:
    """(the rows of a source, the part of them that `split` stands for)."""
    sliced = re.fullmatch(r"([^\[]+)(?:\[(\d*):(\d*)\])?", split)
    if streaming and sliced is None:
        raise ValueError(f"{source}: a stream takes no part such as {split}, only numbers of rows such as train[:5000]")
    if files := local_files(source):
        _check_files(source, split, files)
        return FileTable(files, data), split
    if streaming and not is_path(source):
        assert sliced is not None
        rows = _load(source, source, name=data.config, split=sliced[1], revision=revision, streaming=True)
        start, stop = int(sliced[2] or 0), sliced[3]
        rows = rows.skip(start) if start else rows
        return DatasetTable(rows.take(max(0, int(stop) - start)) if stop else rows, source, revision), "train"
    cached = expect(source, "dataset")
    rows = _load(source, os.path.expanduser(source), name=data.config, split=split)
    if cached:
        log.warning(f"the hub does not answer: {source} comes from the cache")
    # A saved dataset keeps its fingerprint whatever its files hold.
    saved = [file_content(file) for file in files_of(source)]
    return DatasetTable(rows, source, [saved, split] if saved else rows._fingerprint), "train"


def no_documents(data: Data, source: str, split: str) -> ValueError:
    """The error about a source whose rows all lack a visible character."""
    at = "" if is_text(source) else f", column {data.column!r}"
    return ValueError(f"{source}: there is no document with text in it (split {split!r}{at})")


def _look_for_second_text(table: Table, columns: list[Column]) -> None:
    """Warn where labels belong to pairs of texts and only the first text is read."""
    text = columns[0].name
    second = text.removesuffix("1") + "2"
    if [column.role for column in columns] != ["text", "label"] or not text.endswith("1"):
        return
    if second in table.names(columns):
        warn_once(f"WARNING: there is {second} too, which is not read; for pairs pass --data.pair-column {second}")


def source_facts(data: Data) -> dict[str, Any]:
    """What tells the content of each source, as JSON types: its files as `file_content` has them, or a revision."""
    facts: dict[str, Any] = {}
    for source in dict.fromkeys((*data.sources, data.eval_source)):
        if source in ("pydocs", None):
            continue
        with suppress(ValueError, OSError):  # a dataset from the cache, when the hub does not answer
            if files := files_of(source):
                facts[source] = [{"file": name, **file_content(name)} for name in files]
            else:
                facts[source] = {"revision": revision(source)}
    return facts


def files_of(source: str) -> list[str]:
    """The files of a source, those of a saved dataset among them; none where it is on the hub."""
    path = os.path.expanduser(source)
    if not _is_saved(path):
        return local_files(source)
    return sorted(os.path.join(at, name) for at, _, names in os.walk(path) for name in names)


def revision(source: str) -> str:
    """The commit of a dataset on the hub. Raises ValueError where the hub does not say."""
    try:
        return str(HfApi().dataset_info(source, timeout=10).sha)
    except Exception as error:  # of one of several libraries of HTTP
        raise ValueError(f"data source {source}: {reason(error, 'dataset')}") from error


def _check_files(source: str, split: str, files: list[str]) -> None:
    """Raise ValueError where files cannot have this split, or are empty."""
    if split.partition("[")[0] != "train":
        raise ValueError(
            f"data source {source}: files have no split {split!r}, only train and parts of it such as train[:90%]"
        )
    try:
        datasets.ReadInstruction.from_spec(split)
    except (ValueError, AssertionError) as error:
        unknown = str(error).startswith("Unrecognized instruction")
        why = _not_a_split(split) if unknown else f"the split {split!r}: {error}"
        raise ValueError(f"data source {source}: {why}") from error
    if not any(map(os.path.getsize, files)):
        raise ValueError(f"data source {source}: is empty")


def _not_a_split(split: str) -> str:
    return f"the split {split!r} is not written like train, train[:5000] or train[10%:90%]"


def _is_saved(path: str) -> bool:
    """Whether it is a folder that `save_to_disk` of the datasets library wrote."""
    names = (datasets.config.DATASET_STATE_JSON_FILENAME, datasets.config.DATASETDICT_JSON_FILENAME)
    return any(os.path.exists(os.path.join(path, name)) for name in names)


def local_files(source: str) -> list[str]:
    """The files that a path, folder or glob stands for; none where it can only be a hub id or a saved dataset.

    Of a folder, what is hidden or in a hidden folder below it is left out, as globs leave it out.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        below = ((file, file.relative_to(path).parts) for file in Path(path).rglob("*") if file.is_file())
        found = sorted(str(file) for file, parts in below if not any(part.startswith(".") for part in parts))
    else:
        matches = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        found = [path] if os.path.exists(path) else matches
    if _is_saved(path):
        return []
    files = [name for name in found if ending(name) in KINDS]
    endings = sorted({ending(name) for name in files})
    if len({*map(file_kind, files)}) > 1:
        raise ValueError(
            f"{source}: holds files of several kinds ({', '.join(endings)}); give a glob such as *{endings[0]}"
        )
    looks_like_a_path = os.path.isdir(path) or any(c in source for c in "*?[") or ending(path) in KINDS
    if not files and (found or looks_like_a_path or is_path(source)):
        what = (
            "no such file or folder"
            if not found and not os.path.isdir(path)
            else f"no file ending in {' '.join(KINDS)}"
        )
        raise ValueError(f"data source {source}: {what}")
    return files


def _load(source: str, path: str, **options: Any) -> Any:
    """The rows of a saved dataset or of one on the hub, as the datasets library reads them."""
    split = str(options["split"])
    try:
        if os.path.isdir(path):
            return _load_saved(path, split)
        return datasets.load_dataset(path, **options)
    except Exception as error:  # the library raises what it likes
        generating = isinstance(error, datasets.exceptions.DatasetGenerationError)
        why = reason(error.__cause__ if generating and error.__cause__ else error, "dataset")
        if why.startswith("Unrecognized instruction"):
            why = _not_a_split(split)
        for file in files_of(source) if os.path.isdir(path) else ():
            if ending(file) == ".arrow" and (damage := where_damaged(file)):
                raise ValueError(f"{file}: {damage}") from error
        raise ValueError(f"data source {source}: {why}") from error


def _load_saved(path: str, split: str) -> Dataset:
    """A part of a saved dataset, or a slice of one; other parts are not read."""
    name = split.partition("[")[0]
    listing = Path(path, datasets.config.DATASETDICT_JSON_FILENAME)
    names = json.loads(listing.read_text())["splits"] if listing.is_file() else ["train"]
    if name not in names:
        raise ValueError(f"no split {closest(name, names)}")
    folder = Path(path, name) if listing.is_file() else Path(path)
    if not json.loads((folder / datasets.config.DATASET_STATE_JSON_FILENAME).read_text())["_data_files"]:
        raise ValueError("is empty")
    rows = datasets.load_from_disk(str(folder))
    (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows)})
    return rows.select(range(part.from_ or 0, len(rows) if part.to is None else part.to))
