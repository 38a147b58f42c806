"""Tars of WebDataset, `.tar`. Consecutive files whose names agree up to the first dot make up a row.

The rest of a file's name is the column: `0001.txt` and `0001.json` are the columns `txt` and `json` of a row.
"""

import tarfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from typing import IO, Any

from minilm.data.columns import Column
from minilm.data.json_files import JsonParser
from minilm.data.text_decoding import open_bytes

# Number of bytes that are read at a time to check what follows the end of a tar.
_BLOCK = 2**20


def read_tar(path: str, columns: Sequence[Column]) -> Iterator[tuple[int, list[Any]]]:
    """Yield the number of each row, counted from 0, and its cells of `columns`. Other files are not read.

    A file is text, and JSON if its column is `json` or ends in `.json`.

    Raise ValueError that names the row and the file in the tar: for a missing column, a file that occurs twice in a
    row, a text that is not UTF-8 or not JSON, and a tar that is damaged or cut off.
    """
    parser = JsonParser(columns)
    for number, (key, row) in enumerate(_read_rows(path, columns, parser)):
        yield number, parser.get_cells(columns, row, f"{path}, row {number} ({key!r})")


def read_tar_column_names(path: str) -> list[str]:
    """Return the names of the first row's columns."""
    return [*next(_read_rows(path, (), JsonParser(())), ("", {}))[1]]


def _read_rows(path: str, columns: Sequence[Column], parser: JsonParser) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what the names of a row's files begin with, and the row. Cells that `columns` do not need are None."""
    wanted = {name for column in columns for name in column.outer_names()}
    number, key, row = 0, "", dict[str, Any]()
    for name, content in _read_files(path, wanted):
        beginning, column = _split_name(name)
        if row and beginning != key:
            yield key, row
            number, row = number + 1, {}
        key = beginning
        where = f"{path}, row {number}, file {name!r}"
        if not column:
            raise ValueError(f"{where}: the name has no ending, which would be its column; rename or remove the file")
        if column in row:
            raise ValueError(f"{where}: the tar holds this file twice; remove one")
        row[column] = None if content is None else _decode(content, column, parser, where)
    if row:
        yield key, row


def _split_name(name: str) -> tuple[str, str]:
    """Return the name of a file up to the first dot after its folder, and the column that follows the dot."""
    folder, slash, base = name.rpartition("/")
    stem, _, column = base.partition(".")
    return folder + slash + stem, column


def _decode(content: bytes, column: str, parser: JsonParser, where: str) -> Any:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8; convert the file") from error
    return parser.parse_text(text, where) if column.split(".")[-1] == "json" else text


def _read_files(path: str, wanted: Collection[str]) -> Iterator[tuple[str, bytes | None]]:
    """Yield the name of each file in a tar that is not hidden, and its content; None for columns not in `wanted`."""
    last = ""
    try:
        with open_bytes(path) as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
            while (member := tar.next()) is not None:
                # The library would keep all members in memory. Its types do not list this.
                tar.members.clear()  # type: ignore[attr-defined]
                last = member.name
                is_hidden = any(part.startswith(".") for part in member.name.split("/") if part not in (".", ".."))
                if member.isdir() or is_hidden:
                    continue
                reader = tar.extractfile(member) if member.isfile() else None
                if reader is None:
                    raise ValueError(f"{path}, file {last!r}: a link or a device; put the file itself into the tar")
                yield last, reader.read() if _split_name(last)[1] in wanted else None
            _check_end(path, file)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        where = f"{path}, at or after file {last!r}: the tar is" if last else f"{path}: not a tar, or"
        raise ValueError(f"{where} damaged or cut off; copy it again ({error})") from error


def _check_end(path: str, file: IO[bytes]) -> None:
    """Raise ValueError if something follows the end of a tar, such as another tar, which the library does not read."""
    while block := file.read(_BLOCK):
        if block.strip(b"\0"):
            raise ValueError(f"{path}: data follows the end of the tar, as if tars were joined; write one tar")


class _Header(tarfile.TarInfo):
    """The header of a file. Where it is damaged or missing, the library would take this for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_Header":
        try:
            header = super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            # The block of zeros at the end of a tar.
            raise
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            raise tarfile.ReadError(str(error)) from error
        if header.size < 0:
            raise tarfile.ReadError("a file of negative size")
        return header
