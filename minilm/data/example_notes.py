"""The notes of examples on disk: one JSON value for each example, read when it is needed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minilm.data.array_file import ArrayFile


class Notes(Sequence[Any]):
    """The notes of examples. `notes[i]` reads one from the file, so that they never all have to fit into memory.

    text: uint8, the JSON text of all notes in UTF-8.
    bounds: int64[E + 1], where each of E notes begins in `text`, and the end of the last one.
    """

    def __init__(self, text: ArrayFile, bounds: NDArray[np.int64]) -> None:
        self._text, self._bounds = text, bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: Any) -> Any:
        """Return the note of an example, or the notes of consecutive examples."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return Notes(self._text, self._bounds[start : max(start, stop) + 1])
        if not 0 <= index < len(self):
            raise IndexError(index)
        return json.loads(self._text[int(self._bounds[index]) : int(self._bounds[index + 1])].tobytes())


def open_notes(folder: Path) -> Notes:
    """Return the notes in `notes.npy` of a folder, with their bounds in `note_bounds.npy`."""
    return Notes(ArrayFile(folder / "notes.npy"), np.load(folder / "note_bounds.npy"))
