"""Words are those of BERT with every tokenizer, also after documents are cut."""

import itertools

import numpy as np
import pytest
from datasets import Dataset
from numpy.typing import NDArray
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from minilm.data.corpus import Examples, encode
from minilm.data.tokenizer_training import train_tokenizer
from minilm.data.word_boundaries import find_word_starts
from tests.languages import EVERYTHING, LANGUAGES

DOCUMENTS = Dataset.from_dict({"text": EVERYTHING})
SIZES = {"bpe": 400, "wordpiece": 300, "unigram": 300, "characters": 300}


@pytest.fixture(scope="module", params=SIZES)
def trained(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return train_tokenizer(DOCUMENTS, request.param, SIZES[request.param])


def _found(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[tuple[int, int]], NDArray[np.bool_]]:
    """The offsets of the tokens in the text, and which of them begin a word."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["offset_mapping"], find_word_starts(text, [start for start, _ in encoded["offset_mapping"]])


def _words_of_bert(text: str) -> list[str]:
    spaced = normalizers.BertNormalizer(lowercase=False, strip_accents=False, clean_text=False).normalize_str(text)
    return [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(spaced)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_word_starts_of_wordpiece_agree_with_its_own_word_ids(language: str) -> None:
    tokenizer = train_tokenizer(DOCUMENTS, "wordpiece", 300)
    for text in LANGUAGES[language]:
        ids = tokenizer(text, add_special_tokens=False).word_ids()
        assert _found(tokenizer, text)[1].tolist() == [now != before for before, now in itertools.pairwise([-1, *ids])]


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_token_begins_a_word_if_the_token_before_starts_in_another_word(
    language: str, trained: PreTrainedTokenizerBase
) -> None:
    for text in LANGUAGES[language]:
        word_of, at = np.zeros(len(text), int), 0
        for number, word in enumerate(_words_of_bert(text)):
            stop = text.index(word, at) + len(word)
            word_of[at:stop] = number  # with the space before it
            at = stop
        assert at == len(text)
        offsets, begins = _found(trained, text)
        own = [word_of[start] for start, _ in offsets]
        assert begins.tolist() == [now != before for before, now in itertools.pairwise([-1, *own])]


def test_the_bytes_of_a_character_and_the_space_before_a_word_belong_to_it() -> None:
    tokenizer = train_tokenizer(Dataset.from_dict({"text": ["a b"]}), "bpe", 300)
    text = "犬は  a-bc 犬"
    assert len(_found(tokenizer, text)[1]) == len(text.encode())
    begins = dict.fromkeys([0, 3, 6, 9, 10, 12], True)  # 犬, は, "  a", "-", "bc", " 犬"
    assert _found(tokenizer, text)[1].tolist() == [begins.get(at, False) for at in range(len(text.encode()))]


@pytest.mark.parametrize("text", ["", " ", "\ud800a", "a\x00b"])
def test_empty_and_unusual_texts_have_word_starts(text: str) -> None:
    assert find_word_starts(text, range(len(text))).tolist() == [True, False][: len(text)] + [False] * (len(text) - 2)


@pytest.mark.parametrize("layout", ["documents", "blocks"])
@pytest.mark.parametrize("max_length", [8, 17, 512])
def test_each_example_begins_a_word_and_keeps_the_word_starts_of_its_documents(
    trained: PreTrainedTokenizerBase, layout: str, max_length: int
) -> None:
    examples = encode(DOCUMENTS, trained, max_length=max_length, layout=layout, words=True)
    plain = encode(DOCUMENTS, trained, max_length=max_length, layout=layout)
    expected = np.concatenate([[*_found(trained, text)[1], *[True] * (layout == "blocks")] for text in EVERYTHING])
    at = 0
    for index in range(len(examples)):
        assert examples[index].tolist() == plain[index].tolist()
        starts = examples.word_starts(index)
        assert starts.shape == examples[index].shape
        own = expected[at : at + len(starts) - 2].tolist()
        assert starts.tolist() == [True, True, *own[1:], True]
        at += len(own)
    assert at == len(expected)
    assert examples.fingerprint == plain.fingerprint


def test_the_word_starts_of_one_example_do_not_need_all_lengths(
    trained: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = encode(DOCUMENTS, trained, max_length=17, words=True)
    first = int(examples.lengths[0])
    monkeypatch.setattr(Examples, "lengths", property(lambda self: pytest.fail("the lengths of all rows are computed")))
    assert len(examples.word_starts(0)) == first
