"""The local files that a data source stands for, and the kind of each. This file does not import a large library."""

import glob
import os
from pathlib import Path

# The end of an error message that begins with the name of a file.
PERMISSION_DENIED = "cannot be read (Permission denied)"

# The endings of files that minilm reads, and the kind of each. All files of a source must be of one kind.
FILE_KINDS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "delimited",
    ".tsv": "delimited",
    ".parquet": "parquet",
    ".arrow": "arrow",
}


def get_ending(path: str) -> str:
    """Return the ending of a file name in lower case, without `.gz`: `.csv` for `data.CSV.gz`."""
    return Path(path.removesuffix(".gz")).suffix.lower()


def get_file_kind(path: str) -> str:
    """Return the kind of a file that minilm reads, one of the values of `FILE_KINDS`."""
    return FILE_KINDS[get_ending(path)]


def get_full_ending(path: str) -> str:
    """Return the ending of a file name in lower case, with `.gz` if it has that: `.csv.gz` for `data.CSV.gz`."""
    return get_ending(path) + (".gz" if path.endswith(".gz") else "")


def is_local_path(name: str) -> bool:
    """Return whether a name means a local file or folder: it exists, or it cannot be a hub id."""
    return os.path.exists(name) or name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1


def is_plain_text(source: str) -> bool:
    """Return whether a source consists of files of plain text."""
    return find_file_kind(source) == "text"


def find_file_kind(source: str) -> str:
    """Return the kind of a source's files; empty for pydocs, a saved dataset and a dataset on the hub."""
    files = [] if source == "pydocs" else find_local_files(source)
    return get_file_kind(files[0]) if files else ""


def is_saved_dataset(path: str) -> bool:
    """Return whether `save_to_disk` of the datasets library wrote this folder."""
    return any(os.path.exists(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def find_local_files(source: str) -> list[str]:
    """Return the files that a path, folder or glob stands for; empty for a saved dataset and a name on the hub.

    The files of a folder include those of its subfolders. Hidden files and folders are left out, as in a glob. Raise
    ValueError if the files are of several kinds, or if the source must be local and minilm can read none of its files.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        below = ((file, file.relative_to(path).parts) for file in Path(path).rglob("*") if file.is_file())
        names = sorted(str(file) for file, parts in below if not any(part.startswith(".") for part in parts))
    else:
        matches = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        names = [path] if os.path.exists(path) else matches
    if is_saved_dataset(path):
        return []
    files = [name for name in names if get_ending(name) in FILE_KINDS]
    endings = sorted({get_ending(name) for name in files})
    if len({*map(get_file_kind, files)}) > 1:
        raise ValueError(
            f"{source}: holds files of several kinds ({', '.join(endings)}); give a glob such as *{endings[0]}"
        )
    looks_like_a_path = os.path.isdir(path) or any(c in source for c in "*?[") or get_ending(path) in FILE_KINDS
    if not files and (names or looks_like_a_path or is_local_path(source)):
        missing = not names and not os.path.isdir(path)
        why = "no such file or folder" if missing else f"no file ending in {' '.join(FILE_KINDS)}"
        raise ValueError(f"data source {source}: {why}")
    return files
