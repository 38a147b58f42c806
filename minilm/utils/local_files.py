"""The local files that a name stands for, and the kind of each by its ending. Imports no large library."""

import glob
import os
from pathlib import Path

# The end of an error message, after the name of a file.
DENIED = "cannot be read (Permission denied)"

# The kind of each ending that can be read. Files of one kind can make up a source together.
KINDS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "delimited",
    ".tsv": "delimited",
    ".parquet": "parquet",
    ".arrow": "arrow",
}


def ending(path: str) -> str:
    """Return the ending that tells the format of a file, in lower case: `.csv` for `data.CSV.gz`."""
    return Path(path.removesuffix(".gz")).suffix.lower()


def file_kind(path: str) -> str:
    """Return the kind of a file that can be read, one of the values of `KINDS`."""
    return KINDS[ending(path)]


def full_ending(path: str) -> str:
    """Return the ending with that of the compression: `.csv.gz` for `data.CSV.gz`."""
    return ending(path) + (".gz" if path.endswith(".gz") else "")


def is_path(name: str) -> bool:
    """Return whether a name means a local file or folder: it exists, or a hub id cannot have this form."""
    return os.path.exists(name) or name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1


def is_text(source: str) -> bool:
    """Return whether a source is files of plain text."""
    return kind_of_files(source) == "text"


def kind_of_files(source: str) -> str:
    """Return the kind of a source's files; empty for pydocs, saved datasets and datasets on the hub."""
    files = [] if source == "pydocs" else local_files(source)
    return file_kind(files[0]) if files else ""


def is_saved(path: str) -> bool:
    """Return whether a folder was written by `save_to_disk` of the datasets library."""
    return any(os.path.exists(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def local_files(source: str) -> list[str]:
    """Return the files that a path, folder or glob stands for; empty for a saved dataset or a name on the hub.

    Hidden files and folders in a folder are left out, as in a glob.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        below = ((file, file.relative_to(path).parts) for file in Path(path).rglob("*") if file.is_file())
        names = sorted(str(file) for file, parts in below if not any(part.startswith(".") for part in parts))
    else:
        matches = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        names = [path] if os.path.exists(path) else matches
    if is_saved(path):
        return []
    files = [name for name in names if ending(name) in KINDS]
    endings = sorted({ending(name) for name in files})
    if len({*map(file_kind, files)}) > 1:
        raise ValueError(
            f"{source}: holds files of several kinds ({', '.join(endings)}); give a glob such as *{endings[0]}"
        )
    looks_like_a_path = os.path.isdir(path) or any(c in source for c in "*?[") or ending(path) in KINDS
    if not files and (names or looks_like_a_path or is_path(source)):
        missing = not names and not os.path.isdir(path)
        why = "no such file or folder" if missing else f"no file ending in {' '.join(KINDS)}"
        raise ValueError(f"data source {source}: {why}")
    return files
