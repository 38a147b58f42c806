"""From a name to rows: files, folders, globs, saved datasets and the hub, read or streamed by the datasets library."""

import glob
import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from huggingface_hub import HfApi

from minilm.checks import closest
from minilm.config import Data
from minilm.files import ending, refuse_null_rows, text_encoding, where_damaged
from minilm.hub import expect, is_path, reason

log = logging.getLogger("minilm")

# The file endings that are read, and the builder of the datasets library that reads each.
_BUILDERS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """The datasets library without its log, whose errors are raised too; with its bars only at a terminal, once."""
    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def is_text(source: str) -> bool:
    """Whether a source is files of plain text."""
    files = local_files(source)
    return bool(files) and ending(files[0]) == ".txt"


def read_rows(data: Data, source: str, split: str) -> tuple[Dataset, list[str]]:
    """The rows of a split of a source, and the files that they come from if it is files."""
    files = local_files(source)
    if files:
        rows = _load(source, _BUILDERS[ending(files[0])], files, split=split, **_options(data, source, split, files))
        return rows, files
    cached = expect(source, "dataset")
    rows = _load(source, os.path.expanduser(source), [], name=data.config, split=split)
    if cached:
        log.warning(f"the hub does not answer: {source} comes from the cache")
    return rows, files


def stream_rows(data: Data, source: str, split: str, revision: str | None = None) -> tuple[IterableDataset, list[str]]:
    """As `read_rows`, but row by row, with nothing stored. A slice of a split is of numbers of rows."""
    whole = re.fullmatch(r"([^\[]+)(?:\[(\d*):(\d*)\])?", split)
    if whole is None:
        raise ValueError(f"{source}: a stream takes no part such as {split}, only numbers of rows such as train[:5000]")
    name, start, stop = whole[1], int(whole[2] or 0), whole[3]
    files = local_files(source)
    if files:
        options = _options(data, source, split, files)
        rows = _load(source, _BUILDERS[ending(files[0])], files, split=name, streaming=True, **options)
    elif is_path(source):
        rows = _load(source, os.path.expanduser(source), [], split=name).to_iterable_dataset()
    else:
        rows = _load(source, source, [], name=data.config, split=name, revision=revision, streaming=True)
    rows = rows.skip(start) if start else rows
    return (rows.take(max(0, int(stop) - start)) if stop else rows), files


def source_facts(data: Data) -> dict[str, Any]:
    """What tells the content of each source: the size and SHA-256 of its files, or the hub's revision, as JSON types.

    Files of more than 1 GB in all are told by their sizes alone.
    """
    facts: dict[str, Any] = {}
    for source in dict.fromkeys((*data.sources, data.eval_source)):
        if source in ("pydocs", None):
            continue
        with suppress(ValueError, OSError):  # a dataset from the cache, when the hub does not answer
            if not (files := files_of(source)):
                facts[source] = {"revision": revision(source)}
                continue
            sizes = {name: os.path.getsize(name) for name in files}
            hashed = sum(sizes.values()) <= 10**9
            facts[source] = [
                {"file": name, "bytes": size, "sha256": _sha256(name) if hashed else None}
                for name, size in sizes.items()
            ]
    return facts


def _sha256(name: str) -> str:
    with open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _options(data: Data, source: str, split: str, files: list[str]) -> dict[str, object]:
    """How the reader of these files is to read them. Raises ValueError where they cannot be read, by file and line."""
    builder = _BUILDERS[ending(files[0])]
    if split.partition("[")[0] != "train":
        raise ValueError(
            f"data source {source}: files have no split {split!r}, only train and parts of it such as train[:90%]"
        )
    if not any(map(os.path.getsize, files)):
        raise ValueError(f"data source {source}: is empty")
    options: dict[str, object] = {}
    if builder in ("text", "csv"):
        options["encoding"] = text_encoding(files)
    if builder == "json":
        refuse_null_rows(files)
    if builder == "csv":  # of all cells only an empty one is missing, and not NA or None
        options |= {"sep": "\t" if ending(files[0]) == ".tsv" else ",", "keep_default_na": False, "na_values": [""]}
    if builder == "text":
        options["sample_by"] = "document" if data.document == "file" else data.document
    return options


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
        found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if _is_saved(path):
        return []
    files = [name for name in found if ending(name) in _BUILDERS]
    endings = sorted({ending(name) for name in files})
    if len({_BUILDERS[ending] for ending in endings}) > 1:
        raise ValueError(
            f"{source}: holds files of several kinds ({', '.join(endings)}); give a glob such as *{endings[0]}"
        )
    looks_like_a_path = os.path.isdir(path) or any(c in source for c in "*?[") or ending(path) in _BUILDERS
    if not files and (found or looks_like_a_path or is_path(source)):
        what = (
            "no such file or folder"
            if not found and not os.path.isdir(path)
            else f"no file ending in {' '.join(_BUILDERS)}"
        )
        raise ValueError(f"data source {source}: {what}")
    return files


def _load(source: str, builder: str, files: list[str], **options: object) -> Any:
    """The rows of `files`, or of a saved dataset or one on the hub, as the datasets library reads them."""
    if files:
        options["data_files"] = [glob.escape(file) for file in files]
    split = str(options["split"])
    try:
        if not files and os.path.isdir(builder):
            return _split_of(datasets.load_from_disk(builder), split)
        return datasets.load_dataset(builder, **options)
    except StopIteration:  # the reader of JSON met no line
        raise ValueError(f"data source {source}: is empty") from None
    except Exception as error:  # the readers of files raise what they like
        generating = isinstance(error, datasets.exceptions.DatasetGenerationError)
        why = reason(error.__cause__ if generating and error.__cause__ else error, "dataset")
        if why.startswith("Unrecognized instruction"):
            why = f"the split {split!r} is not written like train, train[:5000] or train[10%:90%]"
        looked_at = files or sorted(glob.glob(os.path.join(glob.escape(builder), "**", "*.arrow"), recursive=True))
        raise ValueError(where_damaged(looked_at) or f"data source {source}: {why}") from error


def _split_of(saved: Dataset | datasets.DatasetDict, split: str) -> Dataset:
    """A part of a saved dataset, or a slice of one."""
    parts = {"train": saved} if isinstance(saved, Dataset) else saved
    if (name := split.partition("[")[0]) not in parts:
        raise ValueError(f"no split {closest(name, list(parts))}")
    (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(parts[name])})
    return parts[name].select(range(part.from_ or 0, len(parts[name]) if part.to is None else part.to))
