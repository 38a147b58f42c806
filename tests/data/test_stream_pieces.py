"""Pieces that a host may lack: who can read which example, and no id of a missing piece is read."""

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from minilm.data.array_file import ArrayFile
from minilm.data.corpus import Examples
from minilm.data.stream_pieces import Piece, PieceRuns, PresentIds, find_readers, split_present

thorough = settings(deadline=None, max_examples=150)
runs_of_ids = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), min_size=1, max_size=12)


def _make_runs(runs: list[tuple[int, int]], present: list[bool]) -> tuple[PieceRuns, NDArray[np.int64]]:
    """Return the runs, each of which is a piece and a number of ids, and the piece of each id, int64[I]."""
    pieces, sizes = np.array(runs, np.int64).T
    named = [Piece(f"piece-{number}", each) for number, each in enumerate(present)]
    return PieceRuns(pieces=named, stop_K=np.cumsum(sizes), piece_K=pieces), np.repeat(pieces, sizes)


def _make_examples(runs: PieceRuns, bounds: NDArray[np.int64]) -> Examples:
    nothing = np.zeros(0, np.int64)
    return Examples(
        ids=nothing, start=bounds[:-1], stop=bounds[1:], prefix=nothing, suffix=nothing, fingerprint="", pieces=runs
    )


@thorough
@given(runs_of_ids, st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=3), st.data())
def test_a_process_can_read_an_example_if_it_has_the_piece_of_each_id(
    runs: list[tuple[int, int]], holders: list[list[bool]], data: st.DataObject
) -> None:
    made, piece_I = _make_runs(runs, holders[0])
    cuts = data.draw(st.sets(st.integers(1, len(piece_I)))) | {len(piece_I)}
    bounds = np.array([0, *sorted(cuts)])
    examples = _make_examples(made, bounds)
    expected = [[all(host[piece] for piece in piece_I[a:b]) for a, b in pairwise(bounds)] for host in holders]
    assert find_readers(examples, np.array(holders)).tolist() == expected
    parts = split_present(examples)
    kept = [(int(a), int(b)) for part in parts for a, b in zip(part.start, part.stop, strict=True)]
    assert kept == [bound for bound, own in zip(pairwise(bounds.tolist()), expected[0], strict=True) if own]
    for part in parts:
        assert all(holders[0][piece] for piece in piece_I[part.start[0] : part.stop[-1]])


@thorough
@given(runs_of_ids, st.lists(st.booleans(), min_size=5, max_size=5), st.integers(0, 70), st.integers(0, 70))
def test_an_id_of_a_missing_piece_is_not_read(
    tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[int, int]], present: list[bool], start: int, stop: int
) -> None:
    made, piece_I = _make_runs(runs, present)
    path = tmp_path_factory.getbasetemp() / "ids.npy"
    np.save(path, np.arange(len(piece_I)))
    ids = PresentIds(ArrayFile(path), made)
    lacking = [piece for piece in piece_I[start:stop] if not present[piece]]
    if lacking:
        with pytest.raises(ValueError, match=rf"^piece-{lacking[0]}: this host does not have it"):
            ids[start:stop]
    else:
        assert np.array_equal(ids[start:stop], np.arange(len(piece_I))[start:stop])


def test_the_ids_can_be_read_in_another_process(tmp_path: Path) -> None:
    made, _ = _make_runs([(0, 3), (1, 2)], [True, False])
    np.save(tmp_path / "ids.npy", np.arange(5))
    ids = pickle.loads(pickle.dumps(PresentIds(ArrayFile(tmp_path / "ids.npy"), made)))
    assert ids[1:3].tolist() == [1, 2]
    with pytest.raises(ValueError, match="piece-1"):
        ids[2:4]
