"""A slice of an array in a file is that of the array, and does not stay in memory."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from minilm.data.array_file import ArrayFile, create_array_file

NUMBERS = np.arange(1000, dtype=np.uint16)


@pytest.fixture
def file(tmp_path: Path) -> ArrayFile:
    """1,000 numbers, written in three parts."""
    with create_array_file(tmp_path / "numbers.npy", NUMBERS.dtype) as out:
        for part in np.split(NUMBERS, [10, 700]):
            part.tofile(out)
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.npy"]
    return ArrayFile(tmp_path / "numbers.npy")


@pytest.mark.parametrize(
    "part", [slice(None), slice(3, 9), slice(990, 2000), slice(-5, None), slice(7, 7), slice(9, 3)]
)
def test_a_slice_is_that_of_the_array(file: ArrayFile, part: slice) -> None:
    for one in (file, pickle.loads(pickle.dumps(file))):
        assert len(one) == 1000
        assert one.dtype == one[part].dtype == np.uint16
        assert np.array_equal(one[part], NUMBERS[part])


def test_numpy_reads_a_created_file(file: ArrayFile, tmp_path: Path) -> None:
    assert np.array_equal(np.load(tmp_path / "numbers.npy"), NUMBERS)


def test_what_was_read_does_not_stay_in_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "long.npy", np.zeros(2**26, np.uint8))
    file = ArrayFile(tmp_path / "long.npy")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    begin = resident()
    assert not any(file[at : at + 2**20].any() for at in range(0, 2**26, 2**20))
    assert resident() - begin < 2**24
