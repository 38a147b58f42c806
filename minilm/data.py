"""From a name to documents: `load_documents` returns training and evaluation texts, one document a row."""

import glob
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from datasets import Dataset

from minilm.config import Data, closest
from minilm.files import ending, refuse_null_rows, text_encoding, where_damaged
from minilm.hub import expect, is_path, reason
from minilm.pydocs import pydocs

log = logging.getLogger("minilm")

# The file endings that are read, and the builder of the datasets library that reads each.
_BUILDERS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}


@contextmanager
def _quiet_datasets() -> Iterator[None]:
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


@_quiet_datasets()
def load_documents(data: Data, seed: int) -> tuple[Dataset, Dataset]:
    """(training, evaluation) documents as datasets with the single string column `text`, memory-mapped where large.

    Evaluation documents come from `data.eval_source`, `data.eval_split` or a fraction of the source drawn by `seed`, in
    this order. Raises ValueError in one line that names the file, the column or the split at fault.
    """
    if data.source == "pydocs" and data.eval_split:
        raise ValueError("data.eval_split: pydocs has no splits; give data.eval_fraction or data.eval_source")
    if data.source == "pydocs" and not data.eval_source:
        train_texts, eval_texts = pydocs(data.eval_fraction)
        return Dataset.from_dict({"text": train_texts}), Dataset.from_dict({"text": eval_texts})
    train = _read(data.source, data.config, data.split, data.column, data.document)
    if data.eval_source is not None:
        held_out = _read(data.eval_source, data.config, data.eval_split or "train", data.column, data.document)
    elif data.eval_split is not None:
        held_out = _read(data.source, data.config, data.eval_split, data.column, data.document)
    elif data.document == "file" and _is_text(data.source):
        train, held_out = _cut_ends(train, data.eval_fraction)
    else:
        count = round(len(train) * data.eval_fraction)
        if not 0 < count < len(train):
            part = "training" if count else "evaluation"
            raise ValueError(
                f"{data.source}: the {part} part is empty when data.eval_fraction={data.eval_fraction} of "
                f"{len(train)} documents is held out; change data.eval_fraction or give data.eval_source"
            )
        parts = train.train_test_split(test_size=count, seed=seed)
        train, held_out = parts["train"], parts["test"]
    return train, held_out


def _is_text(source: str) -> bool:
    files = _local_files(source)
    return bool(files) and ending(files[0]) == ".txt"


def _cut_ends(documents: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Each document without its end, and the ends, which are `fraction` of its characters."""
    texts = documents["text"]
    cuts = [int(len(text) * (1 - fraction)) for text in texts]
    train = Dataset.from_dict({"text": [text[:cut] for text, cut in zip(texts, cuts, strict=True)]})
    return train, Dataset.from_dict({"text": [text[cut:] for text, cut in zip(texts, cuts, strict=True)]})


def _read(source: str, config: str | None, split: str, column: str, document: str) -> Dataset:
    """One source as a dataset with the column `text`, documents without any visible character left out."""
    files: list[str] = []
    if source == "pydocs":
        rows = Dataset.from_dict({"text": pydocs()[0]})
    elif files := _local_files(source):
        builder = _BUILDERS[ending(files[0])]
        if split.partition("[")[0] != "train":
            raise ValueError(
                f"data source {source}: files have no split {split!r}, only train and parts of it such as train[:90%]"
            )
        if not any(map(os.path.getsize, files)):
            raise ValueError(f"data source {source}: is empty")
        options: dict[str, str] = {}
        if builder in ("text", "csv"):
            options["encoding"] = text_encoding(files)
        if builder == "json":
            refuse_null_rows(files)
        if builder == "text":
            column = "text"  # a .txt file has no other
            options["sample_by"] = "document" if document == "file" else document
        elif ending(files[0]) == ".tsv":
            options["sep"] = "\t"
        rows = _load(source, builder, files, split=split, **options)
    else:
        cached = expect(source, "dataset")
        rows = _load(source, source, [], name=config, split=split)
        if cached:
            log.warning(f"the hub does not answer: {source} comes from the cache")
    try:
        rows = _text_column(rows, column, source)
    except UnicodeDecodeError as error:  # a file of JSON is decoded here, row by row
        raise ValueError(where_damaged(files) or f"data source {source}: {error}") from error
    rows = rows.filter(lambda texts: [bool(text.strip()) for text in texts], input_columns="text", batched=True)
    if len(rows) == 0:
        raise ValueError(f"{source}: there is no document with text in it (split {split!r}, column {column!r})")
    return rows


def _local_files(source: str) -> list[str]:
    """The files that a path, folder or glob stands for; none where it can only be a hub id or a saved dataset."""
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        found = sorted(str(p) for p in Path(path).rglob("*") if p.is_file() and not p.name.startswith("."))
    else:
        found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    files = [name for name in found if ending(name) in _BUILDERS]
    if any(ending(name) == ".arrow" for name in found):
        return []  # written by Dataset.save_to_disk
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


def _load(source: str, builder: str, files: list[str], **options: object) -> Dataset:
    """The rows of `files`, or of a saved dataset or one on the hub, as the datasets library reads them."""
    if files:
        options["data_files"] = [glob.escape(file) for file in files]
    try:
        if os.path.isdir(builder):
            return _split_of(datasets.load_from_disk(builder), str(options["split"]), source)
        return datasets.load_dataset(builder, **options)
    except StopIteration:  # the reader of JSON met no line
        raise ValueError(f"data source {source}: is empty") from None
    except Exception as error:  # the readers of files raise what they like
        generating = isinstance(error, datasets.exceptions.DatasetGenerationError)
        why = reason(error.__cause__ if generating and error.__cause__ else error, "dataset")
        if why.startswith("Unrecognized instruction"):
            why = f"the split {options['split']!r} is not written like train, train[:5000] or train[10%:90%]"
        raise ValueError(where_damaged(files) or f"data source {source}: {why}") from error


def _split_of(saved: Dataset | datasets.DatasetDict, split: str, source: str) -> Dataset:
    parts = {"train": saved} if isinstance(saved, Dataset) else saved
    name, bracket, _ = split.partition("[")
    if name not in parts:
        raise ValueError(f"{source}: no split {closest(name, list(parts))}")
    if bracket:
        raise ValueError(f"{source}: a saved dataset takes no slice such as {split}; give {name}")
    return parts[name]


def _text_column(rows: Dataset, column: str, source: str) -> Dataset:
    """`rows` reduced to one string column `text`, read from a dotted path; a list of strings is joined with a space."""
    name, *path = column.split(".")
    if name not in rows.column_names:
        raise ValueError(f"{source}: no column {closest(name, rows.column_names)} Pass --data.column")

    def extract(values: list[object], indices: list[int]) -> dict[str, list[str]]:
        texts = []
        for value, index in zip(values, indices, strict=True):
            for key in path:
                if isinstance(value, dict) and key not in value:
                    known = closest(key, list(value))
                    raise ValueError(f"{source}: column {column!r} has no field {known} Pass --data.column")
                value = value[key] if isinstance(value, dict) else None
            if isinstance(value, list) and path and all(isinstance(item, str) for item in value):
                value = " ".join(value)
            if not isinstance(value, str):
                kind = type(value).__name__
                raise ValueError(
                    f"{source}: row {index} of column {column!r} holds {kind} where text is expected; change the row, "
                    "or pass another --data.column"
                )
            texts.append(value)
        return {"text": texts}

    return rows.map(
        extract, input_columns=name, batched=True, with_indices=True, remove_columns=rows.column_names, desc="text"
    )
