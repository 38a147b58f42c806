"""From a name to documents: `load_documents` returns training and evaluation texts, one document a row."""

import glob
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset

from minilm.cache import cache_folder
from minilm.columns import take_columns
from minilm.config import Data, closest
from minilm.files import ending, refuse_null_rows, text_encoding, where_damaged
from minilm.glue import with_glue_columns
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
    ".arrow": "arrow",
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
def load_documents(data: Data, seed: int, *, labels: bool = False) -> tuple[Dataset, dict[str, Dataset]]:
    """(training documents, evaluation documents by name), memory-mapped where large.

    Each is a dataset with the string column `text`; with `pair`, a second text, where `data.pair_column` is set; with
    `label`, of the type it has in the source (a ClassLabel stays one), where `labels` are asked for. Documents without
    a visible character are left out, but with `labels` refused.

    Evaluation documents come from `data.eval_source`, `data.eval_split` or a fraction of each source drawn by `seed`,
    in this order. There is one set of them, named "", or where `data.eval_split` joins several by `+`, one for each of
    their names. Raises ValueError in one line that names the file, the row, the column or the split at fault.
    """
    data = with_glue_columns(data)
    if "pydocs" in data.sources and data.eval_split:
        raise ValueError("data.eval_split: pydocs has no splits; give data.eval_fraction or data.eval_source")
    if data.eval_source is None and data.eval_split is None:
        parts = [_held_out(data, source, seed, labels) for source in data.sources]
        train, held_out = [part[0] for part in parts], {"": _joined([part[1] for part in parts], data)}
    else:
        train = [_read(data, source, data.split, labels) for source in data.sources]
        splits = (data.eval_split or "train").split("+")
        sources = (data.eval_source,) if data.eval_source else data.sources
        held_out = {
            split if len(splits) > 1 else "": _joined([_read(data, source, split, labels) for source in sources], data)
            for split in splits
        }
    if data.weights:
        weighted = zip(train, data.weights, data.sources, strict=True)
        train = [_repeated(part, weight, seed, source) for part, weight, source in weighted]
    return _joined(train, data), held_out


def _held_out(data: Data, source: str, seed: int, labels: bool) -> tuple[Dataset, Dataset]:
    """The documents of a source without those that are held out, and those."""
    if source == "pydocs" and not labels:
        train_texts, eval_texts = pydocs(data.eval_fraction)
        return Dataset.from_dict({"text": train_texts}), Dataset.from_dict({"text": eval_texts})
    documents = _read(data, source, data.split, labels)
    if data.document == "file" and _is_text(source):
        return _cut_ends(documents, data.eval_fraction)
    count = round(len(documents) * data.eval_fraction)
    if not 0 < count < len(documents):
        part = "training" if count else "evaluation"
        raise ValueError(
            f"{source}: the {part} part is empty when data.eval_fraction={data.eval_fraction} of "
            f"{len(documents)} documents is held out; change data.eval_fraction or give data.eval_source"
        )
    parts = documents.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def _repeated(documents: Dataset, weight: float, seed: int, source: str) -> Dataset:
    """The documents as often as `weight` says; of its fraction, that share of them in their order, drawn by `seed`."""
    whole, share = divmod(weight, 1)
    drawn = np.random.default_rng(seed).permutation(len(documents))[: round(share * len(documents))]
    if len(indices := [*range(len(documents))] * int(whole) + sorted(drawn.tolist())) == 0:
        raise ValueError(f"{source}: data.weights {weight} of {len(documents)} documents is none; give a larger weight")
    return documents.select(indices)


def _joined(parts: list[Dataset], data: Data) -> Dataset:
    """Documents of several sources, one source after the other."""
    try:
        return datasets.concatenate_datasets(parts)
    except ValueError as error:
        kinds = ", ".join(f"{part.features['label']} in {s}" for part, s in zip(parts, data.sources, strict=True))
        raise ValueError(f"data.label_column: the labels of the sources differ in type: {kinds}") from error


def _is_text(source: str) -> bool:
    files = _local_files(source)
    return bool(files) and ending(files[0]) == ".txt"


def _cut_ends(documents: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Each document without its end, and the ends, which are `fraction` of its characters."""
    texts = documents["text"]
    cuts = [int(len(text) * (1 - fraction)) for text in texts]
    train = Dataset.from_dict({"text": [text[:cut] for text, cut in zip(texts, cuts, strict=True)]})
    return train, Dataset.from_dict({"text": [text[cut:] for text, cut in zip(texts, cuts, strict=True)]})


def _read(data: Data, source: str, split: str, labels: bool) -> Dataset:
    """One source as a dataset with the columns that are asked for; without labels, no blank document."""
    files: list[str] = []
    column, kept = data.column, None
    if source == "pydocs":
        if labels:
            raise ValueError("pydocs has no labels; give --data.source")
        rows = Dataset.from_dict({"text": pydocs()[0]})
    elif files := _local_files(source):
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
            if labels:
                raise ValueError(
                    f"data source {source}: a .txt file has no labels; give .jsonl, .csv, .tsv or .parquet"
                )
            column = "text"  # a .txt file has no other
            options["sample_by"] = "document" if data.document == "file" else data.document
        rows = _load(source, builder, files, split=split, **options)
    else:
        cached = expect(source, "dataset")
        rows = _load(source, os.path.expanduser(source), [], name=data.config, split=split)
        if is_path(source):
            kept = cache_folder()  # the folder of a saved dataset stays as it is
        if cached:
            log.warning(f"the hub does not answer: {source} comes from the cache")
    try:
        rows = take_columns(rows, source, column, data.pair_column, data.label_column if labels else None, kept)
    except UnicodeDecodeError as error:  # a file of JSON is decoded here, row by row
        raise ValueError(where_damaged(files) or f"data source {source}: {error}") from error
    if not labels:
        rows = rows.filter(lambda texts: [bool(text.strip()) for text in texts], input_columns="text", batched=True)
    if len(rows) == 0:
        raise ValueError(f"{source}: there is no document with text in it (split {split!r}, column {column!r})")
    return rows


def _is_saved(path: str) -> bool:
    """Whether it is a folder that `save_to_disk` of the datasets library wrote."""
    names = (datasets.config.DATASET_STATE_JSON_FILENAME, datasets.config.DATASETDICT_JSON_FILENAME)
    return any(os.path.exists(os.path.join(path, name)) for name in names)


def _local_files(source: str) -> list[str]:
    """The files that a path, folder or glob stands for; none where it can only be a hub id or a saved dataset."""
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        found = sorted(str(p) for p in Path(path).rglob("*") if p.is_file() and not p.name.startswith("."))
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


def _load(source: str, builder: str, files: list[str], **options: object) -> Dataset:
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
