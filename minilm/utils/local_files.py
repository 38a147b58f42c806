"""The local files that a data source stands for, and the kind of each. This file does not import a large library."""

import glob
import os
import re
from pathlib import Path

# The end of an error message that begins with the name of a file.
PERMISSION_DENIED = "cannot be read (Permission denied)"

# What `data.source` and `data.eval_source` hold if a program gives the documents from Python.
IN_MEMORY_SOURCE, IN_MEMORY_EVAL_SOURCE = "<documents>", "<eval_documents>"
# The sources that are neither files nor datasets on the hub.
SPECIAL_SOURCES = ("pydocs", IN_MEMORY_SOURCE, IN_MEMORY_EVAL_SOURCE)
# The name of a repository on the hub. Other names are never sent to the hub.
_HUB_ID = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")

# The endings of files that minilm reads, and the kind of each. All files of a source must be of one kind.
FILE_KINDS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "delimited",
    ".tsv": "delimited",
    ".conll": "conll",
    ".iob": "conll",
    ".bio": "conll",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".mds": "mds",
    ".tar": "tar",
}

# The endings of compressed files: .gz, and others of shards of MDS.
_COMPRESSION = re.compile(r"(\.gz|(?<=\.mds)\.(br|bz2|snappy|zstd))\Z", re.IGNORECASE)
# The file beside the shards of MDS that lists them.
SHARD_INDEX = "index.json"


def get_ending(path: str) -> str:
    """Return the ending of a file name in lower case, without that of its compression.

    It is `.csv` for `data.CSV.gz`, and `.mds` for `shard.00000.mds.zstd`.
    """
    return Path(_remove_compression(path)).suffix.lower()


def _remove_compression(path: str) -> str:
    return _COMPRESSION.sub("", path)


def is_gzip(path: str) -> bool:
    """Return whether the name of a file says that gzip has compressed it."""
    return path.lower().endswith(".gz")


def get_file_kind(path: str) -> str:
    """Return the kind of a file that minilm reads, one of the values of `FILE_KINDS`."""
    return FILE_KINDS[get_ending(path)]


def get_full_ending(path: str) -> str:
    """Return the ending of a file name in lower case, with that of its compression: `.csv.gz` for `data.CSV.gz`."""
    return get_ending(path) + path[len(_remove_compression(path)) :].lower()


def is_local_path(name: str) -> bool:
    """Return whether a name means a local file or folder: it exists, or it cannot be a hub id."""
    return os.path.exists(name) or name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1


def is_plain_text(source: str) -> bool:
    """Return whether a source consists of files of plain text."""
    return find_file_kind(source) == "text"


def find_file_kind(source: str) -> str:
    """Return the kind of a source's files; empty for a special source, a saved dataset and a dataset on the hub."""
    files = find_local_files(source)
    return get_file_kind(files[0]) if files else ""


def is_saved_dataset(path: str) -> bool:
    """Return whether `save_to_disk` of the datasets library wrote this folder."""
    return any(os.path.exists(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def find_local_files(source: str) -> list[str]:
    """Return the files that a path, folder or glob stands for; empty for other sources and a saved dataset.

    The files of a folder include those of its subfolders. Hidden files and folders are left out, as in a glob. Raise
    ValueError if the files are of several kinds, if the source must be local and minilm can read none of its files, or
    if the source cannot be the name of a dataset on the hub, as a sentence cannot.
    """
    if source in SPECIAL_SOURCES:
        return []
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        below = ((file, file.relative_to(path).parts) for file in Path(path).rglob("*") if file.is_file())
        names = sorted(str(file) for file, parts in below if not any(part.startswith(".") for part in parts))
    else:
        matches = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        names = [path] if os.path.exists(path) else matches
    if is_saved_dataset(path):
        return []
    files = _drop_beside_shards([name for name in names if get_ending(name) in FILE_KINDS])
    endings = sorted({get_ending(name) for name in files})
    if len({*map(get_file_kind, files)}) > 1:
        raise ValueError(
            f"{source}: holds files of several kinds ({', '.join(endings)}); give a glob such as *{endings[0]}"
        )
    is_sentence = re.search(r"\s", source) and not names and get_ending(path) not in FILE_KINDS
    if is_sentence and not os.path.isdir(path) and not source.startswith(("/", ".", "~")):
        raise _no_source_error(source)
    looks_like_a_path = os.path.isdir(path) or any(c in source for c in "*?[") or get_ending(path) in FILE_KINDS
    if not files and (names or looks_like_a_path or is_local_path(source)):
        missing = not names and not os.path.isdir(path)
        why = "no such file or folder" if missing else f"no file ending in {' '.join(FILE_KINDS)}"
        raise ValueError(f"data source {source}: {why}")
    if not files and not _HUB_ID.fullmatch(source):
        raise _no_source_error(source)
    return files


def _drop_beside_shards(files: list[str]) -> list[str]:
    """Return the files without those that hold no rows of their own, if some are shards of MDS.

    These are the index of the shards, and the compressed form of a shard that is there without compression too.
    """
    shards = {name for name in files if get_ending(name) == ".mds"}
    if not shards:
        return files
    copies = {name for name in shards if _remove_compression(name) in shards - {name}}
    return [name for name in files if name not in copies and os.path.basename(name) != SHARD_INDEX]


def _no_source_error(source: str) -> ValueError:
    """Return the error for a source that is neither a file nor the name of a dataset on the hub."""
    shown = source if len(source) <= 60 else source[:60] + "…"
    return ValueError(
        f"data source {shown!r} does not exist as a file or folder, and a dataset on the hub cannot have this name; to "
        "train on texts from Python, pass documents=[...]"
    )
