"""Data files as they lie on the disk: their endings and encodings, and where one is damaged, by line or row group."""

import codecs
import gzip
import json
import logging
import zlib
from pathlib import Path
from typing import IO, cast

import pyarrow
from pyarrow import parquet

log = logging.getLogger("minilm")

_BLOCK = 2**22  # bytes that are decoded at a time


def ending(path: str) -> str:
    """The ending that tells what a file is, in small letters: `.csv` of `data.CSV.gz`."""
    return Path(path.removesuffix(".gz")).suffix.lower()


def text_encoding(files: list[str]) -> str:
    """`utf-8`; or, with a warning, `cp1252` (Windows-1252, Latin-1's letters) where that is what the files are in.

    Raises ValueError that names the file and the line where they are in neither, or not all in the same.
    """
    others = {name: line for name in files if (line := _line_that_is_not(name, "utf-8"))}
    for name, line in others.items():
        if len(others) < len(files) or _line_that_is_not(name, "cp1252"):
            raise ValueError(
                f"{name}, line {line}: not UTF-8, or with NUL characters, which are no text; convert the file"
            )
        log.warning(f"{name}, line {line}: not UTF-8, so the file is read as Windows-1252")
    return "cp1252" if others else "utf-8"


def refuse_null_rows(files: list[str]) -> None:
    """Raise ValueError for a row `null`: pyarrow's reader of JSON crashes where one comes first in what it reads."""
    for name in files:
        number = 0
        try:
            with _opened(name) as file:
                for number, line in enumerate(file, start=1):
                    start = line.lstrip(b"\xef\xbb\xbf \t\r")
                    if start.startswith(b"null") or (start.startswith(b"[") and None in json.loads(line + file.read())):
                        raise ValueError(f"{name}, line {number}: null where an object with the text is expected")
        except (OSError, EOFError, zlib.error, RecursionError, json.JSONDecodeError, UnicodeDecodeError):
            return  # the reader will say what is wrong


def _opened(name: str) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(name)) if name.endswith(".gz") else open(name, "rb")


def _line_that_is_not(name: str, encoding: str) -> int:
    """The number of the first line, from 1, that cannot be decoded or holds a NUL; 0 when there is none."""
    number = 0
    try:
        with _opened(name) as file:
            if _is_text(file, encoding):
                return 0
            file.seek(0)
            for line in file:
                number += 1
                if "\0" in line.decode(encoding):
                    return number
    except UnicodeDecodeError:
        return number
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name}, after line {number}: cannot be read; copy the file again ({error})") from error
    return 0


def _is_text(file: IO[bytes], encoding: str) -> bool:
    """Whether all of it can be read and decoded, and holds no NUL; by the block, as lines take longer."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        while block := file.read(_BLOCK):
            if "\0" in decoder.decode(block):
                return False
        decoder.decode(b"", final=True)
    except (UnicodeDecodeError, OSError, EOFError, zlib.error):
        return False
    return True


def where_damaged(files: list[str]) -> str:
    """Where the first of these files is damaged: line or row group; nothing where that cannot be told."""
    for name in files:
        if ending(name) in _DAMAGED:
            if found := _DAMAGED[ending(name)](name):
                return found
        elif line := _line_that_is_not(name, "utf-8"):
            return f"{name}, line {line}: not UTF-8"
        elif ending(name) in (".json", ".jsonl") and (found := _damaged_json(name)):
            return found
    return ""


def _damaged_json(name: str) -> str:
    with _opened(name) as file:
        first = file.readline()
        file.seek(0)
        lines = [file.read()] if first.lstrip().startswith(b"[") else file
        for number, line in enumerate(lines, start=1):
            try:
                json.loads(line or b"0")
            except (ValueError, RecursionError) as error:
                at = number + (error.lineno - 1 if isinstance(error, json.JSONDecodeError) else 0)
                return f"{name}, line {at}: no JSON, or cut off ({str(error).split(':')[0]})"
    return ""


def _damaged_parquet(name: str) -> str:
    group = None
    try:
        with parquet.ParquetFile(name) as file:
            for group in range(file.num_row_groups):
                file.read_row_group(group)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        where = "no Parquet, or cut off" if group is None else f"row group {group} of {file.num_row_groups} is damaged"
        return f"{name}: {where} ({' '.join(str(error).split())})"
    return ""


def _damaged_arrow(name: str) -> str:
    """Whether it is neither a stream nor a file of Arrow that can be read to its end."""
    with pyarrow.memory_map(name) as file:
        try:
            try:
                for _ in pyarrow.ipc.open_stream(file):
                    pass
            except pyarrow.ArrowInvalid:
                reader = pyarrow.ipc.open_file(file)
                for batch in range(reader.num_record_batches):
                    reader.get_batch(batch)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            return f"{name}: no Arrow, or cut off ({' '.join(str(error).split())})"
    return ""


_DAMAGED = {".parquet": _damaged_parquet, ".arrow": _damaged_arrow}
