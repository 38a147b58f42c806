"""Long arrays in files, read one slice at a time, so that memory does not grow with what was read."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray


class ArrayFile:
    """A one-dimensional array in a file written by `np.save`. A slice is a copy, and must not have a step.

    A memory map would also read slices, but every page that was read would count as memory of the process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb", buffering=0)
        np.lib.format.read_magic(self._file)
        (self._length,), _, self.dtype = np.lib.format.read_array_header_1_0(self._file)
        self._begin = self._file.tell()

    def __len__(self) -> int:
        return int(self._length)

    def __getitem__(self, part: slice) -> NDArray[Any]:
        start, stop, _ = part.indices(len(self))
        size = self.dtype.itemsize
        wanted = max(0, stop - start) * size
        # pread does not move the position of the file, which the processes that load batches share.
        content = os.pread(self._file.fileno(), wanted, self._begin + start * size)
        if len(content) < wanted:
            raise OSError(f"{self._path} was cut while the run read it: start the run again, or resume it")
        return np.frombuffer(content, self.dtype)

    def __reduce__(self) -> tuple[type["ArrayFile"], tuple[Path]]:
        return ArrayFile, (self._path,)


@contextmanager
def create_array_file(path: Path, kind: np.dtype[Any]) -> Iterator[BinaryIO]:
    """Open a file for the raw elements of an array. At the end of the block, `path` holds the array as in `np.save`."""
    raw = path.with_suffix(".raw")
    with raw.open("wb") as file:
        yield file
    with path.open("wb") as target, raw.open("rb") as source:
        shape = (raw.stat().st_size // kind.itemsize,)
        np.lib.format.write_array_header_1_0(target, {"descr": kind.str, "fortran_order": False, "shape": shape})
        shutil.copyfileobj(source, target)
    raw.unlink()
