"""Near-copies of documents, by MinHash (Broder 1997) and banding (Leskovec et al., Mining of Massive Datasets, 3.4).

The similarity s of two documents is the Jaccard similarity of their sets of n-grams of words: the n-grams that both
have, divided by those that one of them has. MinHash turns a document into `bands * rows` values, each of which is the
same in both documents with probability s. They are near-copies if all `rows` values of a band are the same, in at least
one of the `bands`. The probability of this is `1 - (1 - s**rows)**bands`.

Axes: N documents, B bands.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

# To miss a pair of near-copies counts as much as to find three that are less similar than the threshold. At a
# threshold of 0.75 and 112 permutations this gives the 14 bands of 8 rows with which FineWeb was made (Penedo et al.
# 2024), which find 77% of the pairs at the threshold.
_WEIGHTS = (0.25, 0.75)
# The n-grams that are hashed at a time. It limits the memory of a long document.
_HASHED_NGRAMS = 2**12
_WORD = re.compile(r"\w+")


@lru_cache
def choose_bands(threshold: float, num_perm: int) -> tuple[int, int]:
    """Return (bands, rows of a band) that separate the pairs at a Jaccard similarity best, with `num_perm` values.

    Raises ValueError if `num_perm` is too small for the threshold.
    """
    from datasketch import MinHashLSH

    try:
        index = MinHashLSH(threshold=threshold, num_perm=num_perm, weights=_WEIGHTS)
    except ValueError as error:
        raise ValueError(f"--num-perm {num_perm} is too small for --threshold {threshold}: raise it") from error
    return int(index.b), int(index.r)


def find_ngrams(text: str, size: int) -> list[str]:
    """Return the n-grams of `size` words of a text, in lower case and without punctuation; all words if it has less.

    Where no character belongs to a word, the parts between spaces are the words.
    """
    words = _WORD.findall(text.lower()) or text.split()
    return [" ".join(words[at : at + size]) for at in range(max(1, len(words) - size + 1))]


class BandHasher:
    """Computes the hashes of the bands of texts."""

    def __init__(self, *, bands: int, rows: int, ngram_size: int) -> None:
        from datasketch import MinHash

        self.bands, self.rows, self.ngram_size = bands, rows, ngram_size
        self._minhash = MinHash(num_perm=bands * rows, seed=1, hashfunc=xxhash.xxh32_intdigest)

    def describe(self) -> dict[str, Any]:
        """Return what decides the hashes, as JSON types, such as the library's functions by a hash that they give."""
        settings = {"ngram_size": self.ngram_size, "bands": self.bands, "rows": self.rows}
        return {**settings, "minhash": f"{self.hash(['minilm'])[0, 0]:016x}"}

    def hash(self, texts: Sequence[str]) -> NDArray[np.uint64]:
        """Return the hash of each band of each text, uint64[B, N]."""
        hashes_BxN = np.empty((self.bands, len(texts)), np.uint64)
        for number, text in enumerate(texts):
            ngrams = [ngram.encode("utf-8", "surrogatepass") for ngram in find_ngrams(text, self.ngram_size)]
            self._minhash.clear()
            for at in range(0, len(ngrams), _HASHED_NGRAMS):
                self._minhash.update_batch(ngrams[at : at + _HASHED_NGRAMS])
            values = self._minhash.digest().reshape(self.bands, self.rows)
            hashes_BxN[:, number] = [xxhash.xxh3_64_intdigest(band.tobytes()) for band in values]
        return hashes_BxN


def find_near_copies(bands_BxN: Iterable[NDArray[np.uint64]]) -> NDArray[np.bool_]:
    """Return for each document whether one before it that stays is a near-copy, bool[N].

    So each document that is removed has a near-copy that stays, and no two documents that stay are near-copies.

    bands_BxN: the hashes of a band of all documents, for each band. One band is in memory at a time.
    """
    members, groups, count, documents = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0, 0
    for band_N in bands_BxN:
        _, value_N, sizes = np.unique(band_N, return_inverse=True, return_counts=True)
        # A group is two or more documents with the same hash of a band.
        is_group = sizes > 1
        member = np.flatnonzero(is_group[value_N])
        members.append(member)
        groups.append((np.cumsum(is_group) - 1 + count)[value_N[member]])
        count += int(is_group.sum())
        documents = len(band_N)
    all_members, all_groups = np.concatenate(members), np.concatenate(groups)
    order = np.argsort(all_members, kind="stable")
    all_members, all_groups = all_members[order], all_groups[order]
    # The groups of a document are next to each other.
    starts = np.flatnonzero(np.diff(all_members, prepend=-1, append=-1))
    is_copy_N, has_kept = np.zeros(documents, np.bool_), np.zeros(count, np.bool_)
    for start, stop in itertools.pairwise(starts.tolist()):
        own = all_groups[start:stop]
        if has_kept[own].any():
            is_copy_N[all_members[start]] = True
        else:
            has_kept[own] = True
    return is_copy_N
