"""Long arrays in files, read one slice at a time, so that they do not stay in memory."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray


class ArrayFile:
    """A one-dimensional array in a file that `np.save` or `create_array_file` wrote.

    A slice is a copy, and must not have a step. A memory map could be sliced too, but each page that was read would
    count as memory of the process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb", buffering=0)
        np.lib.format.read_magic(self._file)
        (self._length,), _, self.dtype = np.lib.format.read_array_header_1_0(self._file)
        self._data_start = self._file.tell()

    def __len__(self) -> int:
        return int(self._length)

    def __getitem__(self, part: slice) -> NDArray[Any]:
        start, stop, _ = part.indices(len(self))
        size = self.dtype.itemsize
        count = max(0, stop - start) * size
        # The processes that load batches share the position of the file. pread does not move it.
        content = os.pread(self._file.fileno(), count, self._data_start + start * size)
        if len(content) < count:
            raise OSError(f"{self._path} was truncated while the run read it. Start the run again, or resume it.")
        return np.frombuffer(content, self.dtype)

    def __reduce__(self) -> tuple[type["ArrayFile"], tuple[Path]]:
        return ArrayFile, (self._path,)


@contextmanager
def create_array_file(path: Path, dtype: np.dtype[Any]) -> Iterator[BinaryIO]:
    """Write an array whose length is not known yet, as `np.save` does.

    The block gets an open binary file, to which it writes the bytes of the elements. `path` exists after the block.
    """
    raw = path.with_suffix(".raw")
    with raw.open("wb") as file:
        yield file
    with path.open("wb") as target, raw.open("rb") as source:
        shape = (raw.stat().st_size // dtype.itemsize,)
        np.lib.format.write_array_header_1_0(target, {"descr": dtype.str, "fortran_order": False, "shape": shape})
        shutil.copyfileobj(source, target)
    raw.unlink()
