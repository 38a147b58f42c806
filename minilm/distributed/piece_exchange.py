"""Hosts that have different pieces of tokenised shards (`minilm.data.stream_pieces`): what they exchange at the start.

Each process tells the others which pieces it has. Where a host lacks pieces, the others send it the tokens of the
examples with which a run begins: the sample of a stream, or all documents if they fill one window. So the checks before
the first step see the same examples on each host. The processes do not exchange tokens after that.

Axes: P processes, N pieces.
"""

import logging
import socket
from dataclasses import replace
from itertools import pairwise

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray

from minilm.data.corpus import Examples, PreparedData
from minilm.data.stream_windows import StreamWindows

log = logging.getLogger("minilm")


def exchange_pieces(prepared: PreparedData) -> PreparedData:
    """Return the data with `holders_PxN`, and with examples that each process can read. Every process must call this.

    All processes read the same documents. Raises ValueError for a piece that no host has, and where blocks of documents
    would need pieces of several hosts.
    """
    runs = prepared.train.pieces
    if runs is None:
        return prepared
    own_N = runs.present
    bits = gather_object([np.packbits(own_N)])
    holders_PxN = np.stack([np.unpackbits(each, count=len(own_N)) for each in bits]).astype(np.bool_)
    if holders_PxN.all():
        return prepared
    lost = np.flatnonzero(~holders_PxN.any(0))
    if len(lost):
        raise ValueError(f"{runs.pieces[int(lost[0])].path}: no host of the run has it: copy it to one of them")
    if prepared.stream is not None:
        _check_blocks(prepared.stream, holders_PxN)
    log.info(f"host {socket.gethostname()} has {own_N.sum():,} of the {len(own_N):,} pieces of the source")
    complete = {id(examples): _complete(examples, holders_PxN) for examples in prepared.all_train}
    return replace(
        prepared,
        train=complete[id(prepared.train)],
        periods=tuple(complete[id(examples)] for examples in prepared.periods),
        holders_PxN=None if prepared.stream is None else holders_PxN,
    )


def _check_blocks(windows: StreamWindows, holders_PxN: NDArray[np.bool_]) -> None:
    """Raise ValueError if no process has all documents that a block may join."""
    if windows.form.layout != "blocks":
        return
    bounds = [*windows.first_pieces, len(windows.pieces)]
    for first, stop in pairwise(bounds):
        if not holders_PxN[:, first:stop].all(1).any():
            raise ValueError(
                "batch.layout blocks joins documents of different files, and no host has all files of a source: name "
                "the files of each host as a source of their own, with data.weights, or take batch.layout packed"
            )


def _complete(examples: Examples, holders_PxN: NDArray[np.bool_]) -> Examples:
    """Return the examples with the ids of all pieces, in memory. The first process that has a piece sends its ids."""
    runs, words = examples.pieces, examples.is_word_start
    assert runs is not None
    ids = np.zeros(len(examples.ids), examples.ids.dtype)
    starts = None if words is None else np.ones(len(ids), np.bool_)
    sender_K = holders_PxN.argmax(0)[runs.piece_K]
    for sender in np.unique(sender_K).tolist():
        parts = [slice(*run) for run in np.stack([runs.starts, runs.stop_K], 1)[sender_K == sender].tolist()]
        sent = None
        if PartialState().process_index == sender:
            sent = [(examples.ids[part], None if words is None else words[part]) for part in parts]
        (sent,) = broadcast_object_list([sent], from_process=sender)
        for part, (own_ids, own_starts) in zip(parts, sent, strict=True):
            ids[part] = own_ids
            if starts is not None:
                starts[part] = own_starts
    return replace(examples, ids=ids, is_word_start=starts, pieces=None)
