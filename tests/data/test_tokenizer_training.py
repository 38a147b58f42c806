"""A trained tokenizer is the same in each run, loses no text, and survives saving."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from minilm.data.tokenizer_training import train_tokenizer
from tests.languages import EVERYTHING

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
thorough = settings(deadline=None, max_examples=100)
# The pieces of a Unigram vocabulary that are not learnt.
BYTES = len(SPECIAL) + 256


@thorough
@given(text=st.text().filter(lambda text: not any(token in text for token in [*SPECIAL, "\u2581"])))
def test_unigram_gives_back_any_text(unigram: PreTrainedTokenizerBase, text: str) -> None:
    ids = unigram(text, add_special_tokens=False)["input_ids"]
    assert unigram.unk_token_id not in ids
    assert unigram.decode(ids) == text


@pytest.mark.parametrize("text", ["<0x0A> is a byte", "## a title", "the ##s"])
def test_a_text_that_looks_like_the_name_of_a_token_is_read_as_text(
    unigram: PreTrainedTokenizerBase, text: str
) -> None:
    titled = train_tokenizer(Dataset.from_dict({"text": ["## a title"] * 9}), "unigram", 300)
    for tokenizer in (unigram, titled):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_training_depends_only_on_the_documents_and_survives_saving(
    documents: Dataset, kind: str, causal: bool, tmp_path: Path
) -> None:
    """The order of the documents must not matter either: words are counted in hash tables, whose order varies."""
    tied = Dataset.from_dict({"text": EVERYTHING})
    for some, size in ((documents, 320), (tied, 330)):
        first = train_tokenizer(some, kind, size, causal=causal)
        for other in (some, some.select(range(len(some))[::-1])):
            again = train_tokenizer(other, kind, size, causal=causal)
            assert again.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
        first.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        text = "The quick [MASK] fox, 등대지기의 灯台守\n  jumps\t"
        assert loaded(text)["input_ids"] == first(text)["input_ids"]
        assert loaded.get_vocab() == first.get_vocab()
        assert loaded.all_special_ids == first.all_special_ids


def test_unigram_keeps_useful_pieces_and_the_most_frequent_characters() -> None:
    words = {"lowlands": 8, "low": 20, "lands": 20, "highlands": 9, "xyzzy": 1}
    documents = Dataset.from_dict({"text": [word for word, count in words.items() for _ in range(count)]})
    pieces = train_tokenizer(documents, "unigram", BYTES + 16).get_vocab()
    assert {"low", "lands", *"lowandshigxyz"} <= set(pieces)
    assert not any("zz" in piece for piece in pieces)
    few = train_tokenizer(documents, "unigram", BYTES + 3).get_vocab()
    assert {piece for piece, index in few.items() if index >= BYTES} == {
        "d",
        "l",
        "a",
    }  # n and s are no rarer than a and d


TEXTS = {
    "a letter": ["a"],
    "a letter many times": ["a" * 40],
    "bytes alone": ["\0\u2585"],
    "spaces": ["   ", " \u2581 "],
    "lines": ["first\tcell\r\nsecond\tcell\n\n" * 3],
    "what lines are written with": ["\ue000\ue001\ue002\n"],
    "special tokens": ["[MASK] <unk> <0x0A> [UNK]" * 9],
    "a set of characters": ["]-[^a\\"],
    "a long word": ["ab\uac00" * 2000],
    "more characters than pieces": ["".join(map(chr, range(0x4E00, 0x4E80)))],
}


@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
def test_unigram_learns_silently_from_any_text_and_loses_none_of_it(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(Dataset.from_dict({"text": texts}), "unigram", 300)
    written = capfd.readouterr()
    assert (written.out, written.err.strip("\r ").count("\n"), "I0000" in written.err) == ("", 0, False)
    assert [*tmp_path.iterdir()] == []
    assert len(tokenizer) <= 300
    assert len({*tokenizer.get_vocab().values()}) == len(tokenizer)
    for text in texts:
        if "[MASK]" not in text:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == text.replace("\u2581", " ")
            assert tokenizer.unk_token_id not in ids


def test_pieces_have_line_ends_in_them_and_come_from_long_words_too() -> None:
    documents = Dataset.from_dict({"text": ["end.\n\nA\tb\n\n" * 40, "quartz" * 800]})
    pieces = train_tokenizer(documents, "unigram", 400).get_vocab()
    assert any("\n\n" in piece for piece in pieces)
    assert any("quartz" in piece for piece in pieces)


def test_unigram_learns_from_a_sample_of_a_long_text(documents: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_tokenizer(documents, "unigram", 320).get_vocab()
    monkeypatch.setattr("minilm.data.tokenizer_training._LEAST_CHARACTERS", 1)
    monkeypatch.setattr("minilm.data.tokenizer_training._MOST_CHARACTERS", 2000)
    sampled = [
        train_tokenizer(some, "unigram", 320).backend_tokenizer.to_str()
        for some in (documents, documents.select(range(len(documents))[::-1]))
    ]
    assert sampled[0] == sampled[1]
    vocabulary = {piece for piece, _ in json.loads(sampled[0])["model"]["vocab"]}
    assert vocabulary != set(whole)
    assert len(vocabulary & set(whole)) > 300
    rare = Dataset.from_dict({"text": [f"word{number}" for number in range(1000)]})  # none occurs twice
    assert "word" in train_tokenizer(rare, "unigram", 320).get_vocab()


ROLES = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


@pytest.mark.parametrize(
    ("kind", "size"),
    [("bpe", 300), ("bpe", 400), ("wordpiece", 100), ("wordpiece", 150), ("unigram", 300), ("unigram", 330)],
)
def test_a_trained_tokenizer_has_the_requested_size_and_the_special_tokens(
    documents: Dataset, kind: str, size: int
) -> None:
    tokenizer = train_tokenizer(documents, kind, size)
    assert len(tokenizer) == size
    assert {role: getattr(tokenizer, f"{role}_token") for role in ROLES} == ROLES
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 4]


def test_special_tokens_stand_around_one_text_and_between_two(each_tokenizer: PreTrainedTokenizerBase) -> None:
    cls, sep = [each_tokenizer.cls_token_id], [each_tokenizer.sep_token_id]
    a, b = (each_tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the list", "a file"))
    assert each_tokenizer("the list")["input_ids"] == cls + a + sep
    pair = each_tokenizer("the list", "a file", return_token_type_ids=True)
    assert pair["input_ids"] == cls + a + sep + b + sep
    assert pair["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)


def test_the_mask_of_a_bpe_tokenizer_takes_the_space_before_it(tokenizer: PreTrainedTokenizerBase) -> None:
    around, mask = tokenizer("the list", add_special_tokens=False)["input_ids"], tokenizer.mask_token_id
    assert tokenizer("the list [MASK]", add_special_tokens=False)["input_ids"] == [*around, mask]


@thorough
@given(text=st.text().filter(lambda text: not any(token in text for token in ROLES.values())))
def test_bpe_gives_back_any_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("rest", [".", " of names", ", and", ""])
def test_a_mask_in_the_text_leaves_the_tokens_after_it_as_they_are(
    tokenizer: PreTrainedTokenizerBase, rest: str
) -> None:
    mask, list_ids = tokenizer.mask_token_id, tokenizer(" list", add_special_tokens=False)["input_ids"]
    masked, plain = (tokenizer(f"the {w}{rest}", add_special_tokens=False)["input_ids"] for w in ("[MASK]", "list"))
    at = masked.index(mask)
    assert plain == [*masked[:at], *list_ids, *masked[at + 1 :]]


def test_wordpiece_gives_back_known_text_in_lower_case(wordpiece: PreTrainedTokenizerBase) -> None:
    ids = wordpiece("The Quick brown fox.", add_special_tokens=False)["input_ids"]
    assert wordpiece.decode(ids) == "the quick brown fox."


@pytest.mark.parametrize("causal", [False, True])
def test_each_character_is_a_token_and_a_new_one_is_unknown(causal: bool) -> None:
    documents = Dataset.from_dict({"text": ["to be,\n\tor ", "not 中é🙂"]})
    tokenizer = train_tokenizer(documents, "characters", 300, causal=causal)
    text = "be not\n\t🙂é中, or"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    special = len(set(tokenizer.all_special_ids))
    assert len(tokenizer) == len(set("to be,\n\tor not 中é🙂")) + special
    assert tokenizer("z", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]
    around = len(tokenizer("to")["input_ids"]) - 2
    assert around == (0 if causal else 2)
