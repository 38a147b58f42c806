"""Shards of MDS, `.mds`, which mosaicml-streaming writes. Only the columns that a run needs are decoded.

A shard holds the number of its rows, the byte at which each row begins, the byte at which the last one ends, the names
and encodings of the columns as JSON, and the rows. A row holds the sizes of its cells, except of those whose column has
a fixed size, and then the cells. These numbers are uint32 in little-endian order.
"""

import io
import itertools
import json
import os
import struct
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow

from minilm.data.columns import Column
from minilm.data.json_files import JsonParser
from minilm.utils.local_files import SHARD_INDEX
from minilm.utils.unpacking import unpack

# Number of rows whose places are read at a time.
_BLOCK_ROWS = 1000
# The names that pyarrow has for compressions, by the ending of a compressed shard.
_CODECS = {".br": "brotli", ".bz2": "bz2", ".gz": "gzip", ".zstd": "zstd"}
# The encodings of numbers, and the dtype of each. The encodings `str` and `json` are text in UTF-8.
_NUMBERS = {"int": "<i8"} | {
    f"{kind}{bits}": f"<{kind[0]}{bits // 8}"
    for kind in ("int", "uint", "float")
    for bits in (8, 16, 32, 64)
    if (kind, bits) != ("float", 8)
}


def check_shards(files: Sequence[str], sources: Sequence[str]) -> None:
    """Raise ValueError unless each shard is as an `index.json` says, and all shards of that index are there.

    sources: the data sources, of which folders matter. The index of a shard is in its folder or in one above it, up to
    the folder that is the source. A shard without any index is not checked.
    """
    paths = [Path(file) for file in files]
    indices = _find_indices({path.parent for path in paths}, [Path(os.path.expanduser(source)) for source in sources])
    right_sizes: dict[Path, set[int]] = {}
    for index in indices:
        for sizes in _read_index(str(index)):
            if not any((index.parent / name).exists() for name in sizes):
                raise ValueError(f"{index}: the shard {min(sizes)} is not in the folder; copy it there")
            for name, size in sizes.items():
                right_sizes.setdefault(index.parent / name, set()).add(size)
    for path in paths:
        if path not in right_sizes and any(index.parent in path.parents for index in indices):
            raise ValueError(f"{path}: {SHARD_INDEX} does not list the shard; remove it, or write the index again")
        for size in right_sizes.get(path, ()):
            if path.stat().st_size != size:
                raise ValueError(
                    f"{path}: {path.stat().st_size} bytes where {SHARD_INDEX} says {size}; copy the shard again"
                )


def _find_indices(folders: Collection[Path], sources: Collection[Path]) -> list[Path]:
    """Return the indices in these folders, and in the folders above each, up to the source that holds it."""
    indices = set[Path]()
    for folder in folders:
        above = [folder, *folder.parents]
        count = max((above.index(source) + 1 for source in sources if source in above), default=1)
        indices.update(parent / SHARD_INDEX for parent in above[:count])
    return sorted(index for index in indices if index.exists())


def _read_index(path: str) -> list[dict[str, int]]:
    """Return for each shard the sizes of its forms in bytes, by file name. A compressed shard has two forms."""
    try:
        with open(path, encoding="utf-8") as file:
            shards = json.load(file)["shards"]
        forms = [[form for form in (shard["raw_data"], shard.get("zip_data")) if form] for shard in shards]
        return [{str(form["basename"]): int(form["bytes"]) for form in of_shard} for of_shard in forms]
    except (OSError, ArithmeticError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not an index of MDS shards, or cut off; copy it again") from error


def read_mds(path: str, columns: Sequence[Column], start: int = 0) -> Iterator[tuple[int, list[Any]]]:
    """Yield the number of each row, counted from 0, and its cells of `columns`. Other columns are not decoded.

    start: the first row to yield. The rows before it are not read.

    Raise ValueError that names the file for a shard that is damaged or compressed with snappy, for a missing column,
    and for an encoding that is not read, and that names the row for a text that is not UTF-8 or not JSON.
    """
    parser = JsonParser(columns)
    with _open_shard(path) as file:
        shard = _read_header(path, file)
        wanted = shard.find_wanted(path, columns)
        for row, cells in shard.read_rows(path, file, start):
            where = f"{path}, row {row}"
            decoded = {shard.names[at]: _decode(cells[at], shard.encodings[at], parser, where) for at in wanted}
            yield row, parser.get_cells(columns, decoded, where)


def read_mds_column_names(path: str) -> list[str]:
    """Return the names of a shard's columns."""
    with _open_shard(path) as file:
        return _read_header(path, file).names


@dataclass(frozen=True)
class _Shard:
    """What the beginning of a shard says about its rows."""

    rows: int
    first_byte: int
    """The place of the first row."""
    end_byte: int
    """The place after the last row."""
    names: list[str]
    encodings: list[str]
    sizes: list[int]
    """The number of bytes of a cell of each column; 0 if it differs from row to row."""

    def find_wanted(self, path: str, columns: Sequence[Column]) -> list[int]:
        """Return the positions of the columns that are or contain `columns`.

        Raise ValueError for a missing column, and for an encoding that is not read.
        """
        wanted = []
        for column in columns:
            name = column.find_outer(self.names)
            if name is None:
                raise column.missing_error(path, self.names)
            at = self.names.index(name)
            encoding = self.encodings[at]
            if column.kind == "text" and name == column.name and encoding != "str":
                raise column.not_text_error(path, f"the encoding {encoding}")
            if encoding not in ("str", "json", *_NUMBERS):
                raise ValueError(
                    f"{path}: column {name!r} has the encoding {encoding}, which minilm does not read; write it as "
                    "str, json, int or float64"
                )
            wanted.append(at)
        return list(dict.fromkeys(wanted))

    def read_rows(self, path: str, file: IO[bytes], start: int) -> Iterator[tuple[int, list[bytes]]]:
        """Yield the number of each row from `start` on, and the bytes of its cells."""
        for first in range(start, self.rows, _BLOCK_ROWS):
            places = self._read_places(file, first, min(self.rows, first + _BLOCK_ROWS))
            file.seek(places[0])
            for row, (begin, end) in enumerate(itertools.pairwise(places), start=first):
                content = file.read(end - begin) if self.first_byte <= begin <= end <= self.end_byte else b""
                cells = self._split(content)
                if cells is None:
                    raise ValueError(f"{path}, row {row}: the shard is damaged; copy it again")
                yield row, cells

    @staticmethod
    def _read_places(file: IO[bytes], start: int, stop: int) -> list[int]:
        """Return the byte at which each of the rows from `start` to `stop` begins, and the one after them."""
        file.seek(4 + 4 * start)
        places: list[int] = np.frombuffer(file.read(4 * (stop - start + 1)), "<u4").tolist()
        return places

    def _split(self, content: bytes) -> list[bytes] | None:
        """Return the bytes of each cell of a row, or None if the sizes of the cells do not add up to the row's."""
        count = self.sizes.count(0)
        if len(content) < 4 * count:
            return None
        cell_sizes = iter(struct.unpack_from(f"<{count}I", content))
        ends = [*itertools.accumulate((size or next(cell_sizes) for size in self.sizes), initial=4 * count)]
        return [content[a:b] for a, b in itertools.pairwise(ends)] if ends[-1] == len(content) else None


def _read_header(path: str, file: IO[bytes]) -> _Shard:
    """Read the beginning of a shard, and check it against the size of the file."""
    end_byte = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        (rows,) = struct.unpack("<I", file.read(4))
        first_byte, last_byte = (struct.unpack("<I", _read_at(file, 4 + 4 * row, 4))[0] for row in (0, rows))
        head = 4 + 4 * (rows + 1)
        form = json.loads(_read_at(file, head, max(0, min(first_byte, end_byte) - head)))
        names, encodings = ([str(value) for value in form[key]] for key in ("column_names", "column_encodings"))
        sizes = [int(size or 0) for size in form["column_sizes"]]
        right = form["format"] == "mds" and last_byte == end_byte and min(sizes, default=0) >= 0
        right = right and len(names) == len(encodings) == len(sizes)
        right = right and all(
            size == np.dtype(_NUMBERS[encoding]).itemsize
            for encoding, size in zip(encodings, sizes, strict=True)
            if encoding in _NUMBERS
        )
    except (struct.error, ArithmeticError, ValueError, LookupError, TypeError, RecursionError):
        right = False
    if not right:
        raise ValueError(f"{path}: not a shard of MDS, or cut off; copy it again")
    if form.get("version") != 2:
        raise ValueError(f"{path}: version {form.get('version')} of MDS, where minilm reads version 2; write it again")
    return _Shard(rows, first_byte, end_byte, names, encodings, sizes)


def _read_at(file: IO[bytes], place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)


def _decode(content: bytes, encoding: str, parser: JsonParser, where: str) -> Any:
    if encoding in _NUMBERS:
        return np.frombuffer(content, _NUMBERS[encoding])[0].item()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: the text is not UTF-8; write the file again") from error
    return text if encoding == "str" else parser.parse_text(text, where)


@contextmanager
def _open_shard(path: str) -> Iterator[IO[bytes]]:
    """Open a shard. If it is compressed, unpack it into a temporary file first."""
    ending = Path(path).suffix.lower()
    if ending == ".mds":
        with open(path, "rb") as file:
            yield file
        return
    if ending not in _CODECS:
        raise ValueError(f"{path}: minilm does not unpack {ending}; write the shards with zstd, or without compression")
    with ExitStack() as stack:
        try:
            with pyarrow.CompressedInputStream(pyarrow.OSFile(path), _CODECS[ending]) as packed:
                unpacked = stack.enter_context(unpack(packed, path))
        except (OSError, pyarrow.ArrowException) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"{path}: cannot be unpacked; copy the shard again ({why})") from error
        yield unpacked
