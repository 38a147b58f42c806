"""Near-copies: those that datasketch's index finds, at the rate that the bands predict, and the first of them stays."""

import random
from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings

from minilm.data.near_duplicates import BandHasher, choose_bands, find_near_copies, find_ngrams

datasketch = pytest.importorskip("datasketch", reason="pip install -e '.[dedup]'")

# Texts of one to twelve of five words: many pairs have some n-grams in common.
WORDS = st.sampled_from(["a", "b", "c", "d", "e"])
TEXTS = st.lists(st.lists(WORDS, min_size=1, max_size=12).map(" ".join), max_size=25)


def _find_by_index(texts: Sequence[str], bands: int, rows: int, size: int) -> list[bool]:
    """Return what `find_near_copies` does, by the library's own index, with a document after the other."""
    index, copies = datasketch.MinHashLSH(num_perm=bands * rows, params=(bands, rows)), list[bool]()
    for number, text in enumerate(texts):
        minhash = datasketch.MinHash(num_perm=bands * rows, seed=1, hashfunc=xxhash.xxh32_intdigest)
        minhash.update_batch([ngram.encode() for ngram in find_ngrams(text, size)])
        copies.append(bool(index.query(minhash)))
        if not copies[-1]:
            index.insert(number, minhash)
    return copies


@settings(deadline=None, max_examples=100)
@given(texts=TEXTS, bands=st.integers(2, 8), rows=st.integers(1, 6), size=st.integers(1, 3))
def test_the_copies_are_those_of_the_index_of_the_library(texts: list[str], bands: int, rows: int, size: int) -> None:
    hashes_BxN = BandHasher(bands=bands, rows=rows, ngram_size=size).hash(texts)
    is_copy_N = find_near_copies(hashes_BxN)
    assert is_copy_N.tolist() == _find_by_index(texts, bands, rows, size)
    # No two documents that stay are near-copies, so none of them is held out while the other is trained on.
    kept = hashes_BxN[:, ~is_copy_N]
    assert all(len(np.unique(band)) == kept.shape[1] for band in kept)


@pytest.mark.parametrize("similarity", [0.5, 0.65, 0.75, 0.85])
def test_near_copies_are_found_at_the_rate_that_the_bands_predict(similarity: float) -> None:
    pairs, drawn = 500, random.Random(round(similarity * 100))
    bands, rows = choose_bands(0.75, 112)
    hasher = BandHasher(bands=bands, rows=rows, ngram_size=1)
    # Two sets of 95 words with `common` words in common, in any order.
    common = round(190 * similarity / (1 + similarity))
    found = 0
    for pair in range(pairs):
        words = [f"{pair}x{number}" for number in range(190 - common)]
        texts = [words[:95], words[95 - common :]]
        for text in texts:
            drawn.shuffle(text)
        found += int(find_near_copies(hasher.hash([" ".join(text) for text in texts]))[1])
    expected = 1 - (1 - (common / (190 - common)) ** rows) ** bands
    deviation = (expected * (1 - expected) / pairs) ** 0.5
    assert abs(found / pairs - expected) <= 4 * deviation + 1 / pairs


def test_the_default_bands_are_those_of_fineweb_and_follow_the_threshold() -> None:
    bands, rows = choose_bands(0.75, 112)
    assert (bands, rows) == (14, 8)
    # docs/data.md has these rates.
    found = [round(1 - (1 - similarity**rows) ** bands, 2) for similarity in (0.5, 0.75, 0.8, 0.85)]
    assert found == [0.05, 0.77, 0.92, 0.99]
    for num_perm in (64, 112, 128, 256):
        rates = []
        for threshold in (0.5, 0.7, 0.75, 0.8, 0.9):
            bands, rows = choose_bands(threshold, num_perm)
            assert bands * rows <= num_perm
            assert 0.5 < 1 - (1 - threshold**rows) ** bands < 0.95
            rates.append(1 - (1 - 0.7**rows) ** bands)
        # A higher threshold finds fewer of the pairs of a given similarity.
        assert rates == sorted(rates, reverse=True)
    with pytest.raises(ValueError, match=r"--num-perm 1 is too small for --threshold 0\.9: raise it"):
        choose_bands(0.9, 1)


@pytest.mark.parametrize(
    ("text", "ngrams"),
    [
        ("One two, three - FOUR.", ["one two three", "two three four"]),
        ("One two", ["one two"]),
        ("?! ... !", ["?! ... !"]),
        ("naïve über 3.5", ["naïve über 3", "über 3 5"]),
    ],
)
def test_ngrams_have_neither_case_nor_punctuation(text: str, ngrams: list[str]) -> None:
    assert find_ngrams(text, 3) == ngrams


def test_a_long_document_is_hashed_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(str(number) for number in range(5000))
    whole = BandHasher(bands=4, rows=3, ngram_size=2).hash([text])
    monkeypatch.setattr("minilm.data.near_duplicates._HASHED_NGRAMS", 7)
    assert np.array_equal(BandHasher(bands=4, rows=3, ngram_size=2).hash([text]), whole)
