"""The training examples of a run by their losses in each epoch: the hardest, near-duplicates, and what is still learnt.

Axes: P epochs, E examples, S shingles of an example, M hash functions.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minilm.commands.hard_examples import HIGHEST_SHARE
from minilm.config.serialization import read_run_config
from minilm.data.corpus import PreparedData
from minilm.data.phased_batches import JoinedExamples
from minilm.data.sources import pin_revisions
from minilm.objectives.factory import prepare_run
from minilm.runs.run_facts import read_revisions
from minilm.runs.train_ledger import find_train_losses, identify_train_examples, read_train_losses

# Near-duplicates are sought among this share of the examples, those with the lowest last losses.
_LOWEST_SHARE = 0.1
# MinHash (Broder 1997): 16 bands of 4 hashes find pairs of which most shingles are equal.
_SHINGLE_TOKENS = 5
_BANDS, _HASHES_PER_BAND = 16, 4
_LEAST_SIMILARITY = 0.8


@dataclass(frozen=True, kw_only=True)
class TrainExample:
    """A training example with a high loss, or one of a pair of near-duplicates."""

    example: int
    """Its number among the training examples, from 0."""
    loss: float
    """The mean loss of its targets in the last epoch that read it, in nats."""
    high: int
    """The number of epochs in which it is among the tenth with the highest mean losses."""
    epochs: int
    """The number of epochs in the ledger that read it."""
    duplicate_of: int | None
    """The number of an earlier example with nearly the same tokens, if such pairs were asked for."""
    similarity: float | None
    """The share of the shingles that both examples have, estimated by MinHash."""
    text: str
    """The text as the tokenizer gives it back."""


@dataclass(frozen=True, kw_only=True)
class TrainLosses:
    """The mean losses of the training examples of a run."""

    mean_PxE: NDArray[np.float64]
    """NaN where an epoch has not read an example."""
    prepared: PreparedData

    @property
    def last(self) -> NDArray[np.float64]:
        """The mean loss in the last epoch that read the example; NaN if none did."""
        last_E: NDArray[np.float64] = self.mean_PxE[0]
        for mean_E in self.mean_PxE[1:]:
            last_E = np.where(np.isnan(mean_E), last_E, mean_E)
        return last_E


def read_losses(run: str | Path) -> TrainLosses:
    """Return the training losses in the ledger of a run. Raise ValueError if it has none, or the data have changed."""
    folder = Path(run)
    files = [read_train_losses(path) for path in find_train_losses(folder)]
    if not files:
        raise ValueError(f"{folder} has no training losses in its ledger: train with --run.train-ledger")
    with pin_revisions(read_revisions(folder)):
        prepared = prepare_run(read_run_config(str(folder / "run.json")))
    if {identity for _, identity in files} != {identify_train_examples(prepared)}:
        raise ValueError(f"{folder}: its training examples have changed since the run, so that they cannot be shown")
    return TrainLosses(mean_PxE=np.stack([mean_E for mean_E, _ in files]), prepared=prepared)


def find_hardest(losses: TrainLosses, count: int, *, always_high: bool = False) -> list[TrainExample]:
    """Return the examples with the highest last loss, at most `count`, highest first.

    always_high: only those that are among the highest tenth in each epoch that read them.
    """
    high_E = _count_high(losses)
    epochs_E = (~np.isnan(losses.mean_PxE)).sum(0)
    order = np.argsort(-np.nan_to_num(losses.last, nan=-np.inf), kind="stable")
    chosen = [int(i) for i in order if epochs_E[i] and (not always_high or high_E[i] == epochs_E[i])][:count]
    return [_describe(losses, high_E, i) for i in chosen]


def find_duplicates(losses: TrainLosses, count: int) -> list[TrainExample]:
    """Return near-duplicates of earlier examples, at most `count`, those with the lowest last losses first.

    They are sought among the tenth of the examples with the lowest last losses, since a copy is easy to predict.
    """
    last_E = losses.last
    read = np.flatnonzero(~np.isnan(last_E))
    size = max(2, round(_LOWEST_SHARE * len(read)))
    lowest = np.sort(read[np.argsort(last_E[read], kind="stable")[:size]])
    examples = JoinedExamples(losses.prepared)
    signatures = np.stack([_hash_shingles(examples[int(i)]) for i in lowest])
    first_of: dict[tuple[int, bytes], int] = {}
    pairs: dict[int, tuple[int, float]] = {}
    for at, signature in enumerate(signatures):
        for band in range(_BANDS):
            key = (band, signature[band * _HASHES_PER_BAND : (band + 1) * _HASHES_PER_BAND].tobytes())
            first = first_of.setdefault(key, at)
            similarity = float((signatures[first] == signature).mean())
            if first != at and similarity >= _LEAST_SIMILARITY and at not in pairs:
                pairs[at] = (int(lowest[first]), similarity)
    high_E = _count_high(losses)
    order = sorted(pairs, key=lambda at: float(last_E[lowest[at]]))[:count]
    return [_describe(losses, high_E, int(lowest[at]), pairs[at]) for at in order]


def measure_learning(losses: TrainLosses) -> float | None:
    """Return the share of the examples whose loss fell between the last two epochs by more than noise.

    Other masks and dropout move a loss up as often as down. So as many falls as there are rises count as noise. The
    result is None without two epochs, or if they have no example in common.
    """
    if len(losses.mean_PxE) < 2:
        return None
    change_E = losses.mean_PxE[-1] - losses.mean_PxE[-2]
    change_E = change_E[~np.isnan(change_E)]
    if not len(change_E):
        return None
    return max(0.0, float(((change_E < 0).sum() - (change_E > 0).sum()) / len(change_E)))


def _count_high(losses: TrainLosses) -> NDArray[np.int64]:
    """Return in how many epochs each example is among the highest tenth, int64[E]."""
    high_E = np.zeros(losses.mean_PxE.shape[1], np.int64)
    for mean_E in losses.mean_PxE:
        read = np.flatnonzero(~np.isnan(mean_E))
        size = max(1, round(HIGHEST_SHARE * len(read)))
        high_E[read[np.argsort(-mean_E[read], kind="stable")[:size]]] += 1
    return high_E


def _describe(
    losses: TrainLosses, high_E: NDArray[np.int64], example: int, pair: tuple[int, float] | None = None
) -> TrainExample:
    ids: list[int] = JoinedExamples(losses.prepared)[example].tolist()
    return TrainExample(
        example=example,
        loss=float(losses.last[example]),
        high=int(high_E[example]),
        epochs=int((~np.isnan(losses.mean_PxE[:, example])).sum()),
        duplicate_of=None if pair is None else pair[0],
        similarity=None if pair is None else pair[1],
        text=str(losses.prepared.tokenizer.decode(ids, skip_special_tokens=True)),
    )


def _hash_shingles(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the smallest value of each hash function over the shingles of some tokens, uint64[M]."""
    draw = np.random.default_rng(0)
    hashes = _BANDS * _HASHES_PER_BAND
    sizes = hashes, hashes, _SHINGLE_TOKENS
    factor_M, offset_M, weight_K = (draw.integers(2**63, size=size, dtype=np.uint64) for size in sizes)
    size = min(_SHINGLE_TOKENS, len(ids))
    shingles_SxK = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), size)
    # Arithmetic modulo 2**64; the low bits of such products are not random, so that the high ones count.
    shingle_S = (shingles_SxK * (weight_K[:size] | np.uint64(1))).sum(1)
    shingle_S = (shingle_S ^ (shingle_S >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    minima_M: NDArray[np.uint64] = ((shingle_S[:, None] * (factor_M | np.uint64(1)) + offset_M) >> np.uint64(16)).min(0)
    return minima_M
