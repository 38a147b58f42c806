"""Tokenizers and corpora: text comes back from ids, no token is lost, and nothing is encoded twice."""

import copy
import itertools
import json
import os
import string
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import minilm.data.corpus
from minilm.config import Data, Tokens
from minilm.data.array_file import FlatFile
from minilm.data.corpus import Examples, encode, fingerprint, load_tokenizer, state_of
from minilm.data.documents import load_documents
from minilm.data.text_pairs import encode_pairs
from minilm.data.vocabulary import train_tokenizer

ROLES = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
thorough = settings(deadline=None, max_examples=100)


@pytest.fixture(scope="session")
def wordpiece(documents: Dataset) -> PreTrainedTokenizerBase:
    """A lower-cased WordPiece tokenizer trained on the documents."""
    return train_tokenizer(documents, "wordpiece", 150)


@pytest.fixture(params=["tokenizer", "wordpiece", "unigram"])
def either(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """The one, then the others."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "minilm"


def _plain(tokenizer: PreTrainedTokenizerBase, documents: Dataset) -> list[list[int]]:
    return tokenizer([*documents["text"]], add_special_tokens=False)["input_ids"]


def _joined(parts: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


def _middles(examples: Examples) -> list[list[int]]:
    """The examples without the special token at either end."""
    return [examples[i][1:-1].tolist() for i in range(len(examples))]


@pytest.mark.parametrize(
    ("kind", "size"),
    [("bpe", 300), ("bpe", 400), ("wordpiece", 100), ("wordpiece", 150), ("unigram", 300), ("unigram", 330)],
)
def test_a_trained_tokenizer_has_the_size_and_the_special_tokens_asked_for(
    documents: Dataset, kind: str, size: int
) -> None:
    tokenizer = train_tokenizer(documents, kind, size)
    assert len(tokenizer) == size
    assert {role: getattr(tokenizer, f"{role}_token") for role in ROLES} == ROLES
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 4]


def test_special_tokens_stand_around_one_text_and_between_two(either: PreTrainedTokenizerBase) -> None:
    cls, sep = [either.cls_token_id], [either.sep_token_id]
    a, b = (either(text, add_special_tokens=False)["input_ids"] for text in ("the list", "a file"))
    assert either("the list")["input_ids"] == cls + a + sep
    pair = either("the list", "a file", return_token_type_ids=True)
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


@pytest.mark.parametrize("max_length", [8, 17, 512])
def test_split_drops_no_token_and_cuts_into_the_fewest_nearly_equal_pieces(
    documents: Dataset, either: PreTrainedTokenizerBase, max_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minilm.data.corpus, "_CHUNK", 7)
    examples = encode(documents, either, max_length=max_length)
    rows = [examples[i].tolist() for i in range(len(examples))]
    assert examples.lengths.tolist() == [len(row) for row in rows]
    assert all((row[0], row[-1]) == (either.cls_token_id, either.sep_token_id) for row in rows)
    pieces = iter(_middles(examples))
    for ids in _plain(either, documents):
        own = [next(pieces) for _ in range(-(-len(ids) // (max_length - 2)))]
        sizes = [len(piece) for piece in own]
        assert _joined(own) == ids
        assert max(sizes) <= max_length - 2
        assert max(sizes) - min(sizes) <= 1
    assert next(pieces, None) is None


@pytest.mark.parametrize("max_length", [8, 17, 512])
def test_truncation_is_that_of_transformers(
    documents: Dataset, either: PreTrainedTokenizerBase, max_length: int
) -> None:
    examples = encode(documents, either, max_length=max_length, overflow="truncate")
    reference = either([*documents["text"]], truncation=True, max_length=max_length)["input_ids"]
    assert [examples[i].tolist() for i in range(len(examples))] == reference


@pytest.mark.parametrize("max_length", [8, 17, 512])
def test_blocks_are_the_joined_documents_cut_into_full_rows(
    documents: Dataset, either: PreTrainedTokenizerBase, max_length: int
) -> None:
    examples = encode(documents, either, max_length=max_length, layout="blocks")
    joined = _joined([*ids, either.sep_token_id] for ids in _plain(either, documents))
    assert _joined(_middles(examples)) == joined
    assert set(examples.lengths[:-1]) == {max_length}
    assert 2 < examples.lengths[-1] <= max_length


@pytest.mark.parametrize("layout", ["documents", "blocks"])
def test_counts_are_those_of_the_documents_and_of_what_is_between_them(
    documents: Dataset, either: PreTrainedTokenizerBase, layout: str
) -> None:
    counts = encode(documents, either, max_length=17, layout=layout).counts(len(either))
    expected = np.bincount(_joined(_plain(either, documents)), minlength=len(either))
    expected[either.sep_token_id] += len(documents) if layout == "blocks" else 0
    assert counts.tolist() == expected.tolist()


@pytest.mark.parametrize("layout", ["documents", "blocks"])
def test_ids_are_encoded_once_for_each_content(
    layout: str, tokenizer: PreTrainedTokenizerBase, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, write = [], minilm.data.corpus._write_ids

    def spy(folder: Path, documents: Dataset, *rest: object) -> None:
        encoded.extend(documents["text"])
        write(folder, documents, *rest)

    monkeypatch.setattr(minilm.data.corpus, "_write_ids", spy)

    def rows(texts: list[str], max_length: int) -> list[list[int]]:
        encoded.clear()
        return _middles(encode(Dataset.from_dict({"text": texts}), tokenizer, max_length=max_length, layout=layout))

    texts = ["one document", "an other"]
    first = rows(texts, 64)
    assert encoded == texts
    assert rows(texts, 64) == first
    rows(texts, 32)
    assert encoded == []
    for changed in (["one document", "an othex"], ["one documentan", " other"], ["an other", "one document"]):
        assert rows(changed, 64) != first
        assert encoded == changed
    assert all(not file.name.startswith(".") for file in cache.iterdir())


def test_the_cache_knows_the_tokenizer(documents: Dataset, tokenizer: PreTrainedTokenizerBase, cache: Path) -> None:
    for other in (tokenizer, train_tokenizer(documents, "bpe", 300)):
        assert _joined(_middles(encode(documents, other, max_length=512))) == _joined(_plain(other, documents))


@pytest.mark.parametrize("document", ["line", "file"])
def test_texts_are_hashed_once_for_each_state_of_their_files(
    document: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Dataset] = []
    iterate = Dataset.iter

    def spy(documents: Dataset, *rest: Any, **options: Any) -> Iterator[Any]:
        read.append(documents)
        return iterate(documents, *rest, **options)

    monkeypatch.setattr(Dataset, "iter", spy)
    file = tmp_path / "text.txt"

    def keys() -> list[str]:
        documents, held_out = load_documents(Data(source=str(file), document=document, eval_fraction=0.5), seed=1)
        read.clear()
        return [fingerprint(documents), fingerprint(held_out[""]), fingerprint(documents, 7)]

    def write(text: str, seconds: int) -> None:
        file.write_text(text)
        os.utime(file, (seconds, seconds))

    write("one line\nan other\n", 1)
    first = keys()
    assert len(set(first)) == len(read) == 3
    assert keys() == first
    assert read == []
    write("two line\nor other\n", 1)  # of the same size and time
    assert len({*first, *keys()}) == 6
    write("one line\nan other\n", 3)
    assert keys() == first  # they are of the content
    assert {path.name.partition("-")[0] for path in cache.iterdir()} == {"fingerprint", "rows"}


def test_a_hash_is_of_the_columns_that_are_asked_for(cache: Path) -> None:
    documents = Dataset.from_dict({"text": ["one", "two"], "pair": ["two", "one"]})
    asked = (("text",), ("pair",), ("text", "pair"), ("pair", "text"))
    keys = [fingerprint(documents, columns=columns) for columns in asked]
    assert len(set(keys)) == 4
    assert [fingerprint(documents, columns=columns) for columns in asked] == keys
    assert fingerprint(documents.select_columns("text")) == keys[0]


def test_ids_are_cached_for_whether_special_tokens_in_a_text_are_split(
    tokenizer: PreTrainedTokenizerBase, cache: Path
) -> None:
    documents, other = Dataset.from_dict({"text": ["A [MASK]."]}), copy.deepcopy(tokenizer)
    other.split_special_tokens = True
    whole, split = (encode(documents, each, max_length=32) for each in (tokenizer, other))
    assert tokenizer.mask_token_id in whole[0]
    assert tokenizer.mask_token_id not in split[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "truncation_side", "left"),
        lambda tokenizer: setattr(tokenizer, "model_input_names", ["input_ids", "token_type_ids"]),
        lambda tokenizer: setattr(tokenizer, "split_special_tokens", True),
    ],
)
def test_pairs_are_cached_for_the_settings_that_decide_their_ids_and_types(
    tokenizer: PreTrainedTokenizerBase, cache: Path, change: Callable[[Any], None]
) -> None:
    documents = Dataset.from_dict({"text": ["A [MASK].", "The quick"], "pair": ["Another.", "It jumps over. " * 5]})

    def rows(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        examples = encode_pairs(documents, tokenizer, np.zeros(2), max_length=20, name="documents")
        types = [examples.row_types(i).tolist() for i in range(2)] if examples.types is not None else []
        return [examples[i].tolist() for i in range(2)] + types

    changed = copy.deepcopy(tokenizer)
    change(changed)
    before = rows(tokenizer)
    expected = changed(documents["text"][:], documents["pair"][:], truncation=True, max_length=20)
    assert rows(changed) == expected["input_ids"] + expected.get("token_type_ids", [])
    assert rows(changed) != before
    assert rows(tokenizer) == before


def test_pairs_are_not_taken_for_single_texts_that_are_the_same_one_after_the_other(
    tokenizer: PreTrainedTokenizerBase, cache: Path
) -> None:
    pair, single = {"text": ["one"], "pair": ["two"]}, {"text": ["one", "two"]}
    for rows in (pair, single):
        documents, labels = Dataset.from_dict(rows), np.zeros(len(rows["text"]))
        assert len(encode_pairs(documents, tokenizer, labels, max_length=20, name="documents")) == len(labels)


@pytest.mark.parametrize(("size", "kind"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_ids_are_read_from_disk_in_the_smallest_type_that_holds_them(size: int, kind: type, cache: Path) -> None:
    backend = Tokenizer(models.WordLevel({str(number): number for number in range(size - 1)} | {"a": size - 1}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    examples = encode(Dataset.from_dict({"text": ["5 a 65534", "7"]}), tokenizer, max_length=8)
    assert isinstance(examples.ids, FlatFile)
    assert examples.ids.dtype == kind
    assert [examples[i].tolist() for i in range(2)] == [[5, size - 1, 65534], [7]]
    assert examples[0].dtype == np.int64


@pytest.mark.parametrize("overflow", ["split", "truncate"])
def test_empty_documents_are_passed_over_and_nothing_but_them_is_refused(
    wordpiece: PreTrainedTokenizerBase, overflow: str
) -> None:
    documents = Dataset.from_dict({"text": ["\x01", "a file", "\x02"]})
    examples = encode(documents, wordpiece, max_length=8, overflow=overflow)
    assert len(examples) == 1
    with pytest.raises(ValueError, match=r"^the training documents hold no token [^\n]*\Z"):
        encode(
            Dataset.from_dict({"text": ["\x01", "\x02"]}),
            wordpiece,
            max_length=8,
            overflow=overflow,
            name="training documents",
        )


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_tokenizer_is_trained_once_for_each_content(
    documents: Dataset, kind: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(documents: Dataset, size: int = 300) -> PreTrainedTokenizerBase:
        return load_tokenizer(Tokens(kind=kind, vocab_size=size), None, documents)

    first = load(documents)
    assert first.get_vocab() == train_tokenizer(documents, kind, 300).get_vocab()
    assert first("the [MASK]")["input_ids"] == train_tokenizer(documents, kind, 300)("the [MASK]")["input_ids"]
    with monkeypatch.context() as forbidden:
        forbidden.setattr("minilm.data.corpus.train_tokenizer", None)
        assert load(documents).get_vocab() == first.get_vocab()
        for changed in (lambda: load(documents, 310), lambda: load(documents.select(range(59)))):
            with pytest.raises(TypeError):
                changed()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_input_names", ["input_ids", "token_type_ids", "attention_mask"]),
        ("model_max_length", 77),
        ("padding_side", "left"),
        ("clean_up_tokenization_spaces", True),
        ("mask_token", "[UNK]"),
    ],
)
def test_an_extended_tokenizer_comes_from_the_cache_with_the_settings_of_the_one_that_was_extended(
    documents: Dataset, wordpiece: PreTrainedTokenizerBase, cache: Path, tmp_path: Path, name: str, value: object
) -> None:
    for change in ({}, {name: value}):
        wordpiece.save_pretrained(tmp_path)
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        expected = getattr(AutoTokenizer.from_pretrained(tmp_path), name)
        assert (expected == value) is bool(change)
        for _ in range(2):  # the second time from the cache
            assert getattr(load_tokenizer(Tokens(extend=3), str(tmp_path), documents), name) == expected
    assert len([*cache.glob("tokenizer-*")]) == 2


def test_a_tokenizer_has_one_state_in_each_process(wordpiece: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    wordpiece.save_pretrained(tmp_path)
    program = (
        "import json, sys; from transformers import AutoTokenizer; from minilm.data.corpus import state_of; "
        "print(json.dumps(state_of(AutoTokenizer.from_pretrained(sys.argv[1]))))"
    )
    words, states = [sys.executable, "-c", program, str(tmp_path)], []
    for seed in "12":
        states.append(subprocess.run(words, env=os.environ | {"PYTHONHASHSEED": seed}, stdout=-1, check=True).stdout)
    assert states[0] == states[1] == json.dumps(state_of(AutoTokenizer.from_pretrained(tmp_path))).encode() + b"\n"


def test_a_tokenizer_is_loaded_by_its_own_name_before_the_models(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, wordpiece: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "own")
    wordpiece.save_pretrained(tmp_path / "model")
    own, model = str(tmp_path / "own"), str(tmp_path / "model")
    assert load_tokenizer(Tokens(name=own), model, documents).get_vocab() == tokenizer.get_vocab()
    assert load_tokenizer(Tokens(), model, documents).get_vocab() == wordpiece.get_vocab()


def test_a_tokenizer_that_is_missing_or_cannot_pad_is_refused(documents: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^tokenizer 'no-such/name' cannot be loaded[^\n]*\Z"):
        load_tokenizer(Tokens(name="no-such/name"), None, documents)
    letters = {letter: number for number, letter in enumerate(string.ascii_lowercase)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(letters))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^tokenizer [^\n]* has no padding token[^\n]*--tokens\.name\Z"):
        load_tokenizer(Tokens(name=str(tmp_path)), None, documents)


def test_a_tokenizer_without_padding_pads_with_the_token_that_ends_texts(documents: Dataset, tmp_path: Path) -> None:
    letters = {letter: number for number, letter in enumerate(string.ascii_lowercase)}
    gpt = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(letters)), eos_token="z")
    gpt.save_pretrained(tmp_path)
    assert load_tokenizer(Tokens(name=str(tmp_path)), None, documents).pad_token == "z"
    assert load_tokenizer(Tokens(name=str(tmp_path)), None, documents, causal=True).pad_token is None


@pytest.mark.parametrize("causal", [False, True])
def test_characters_are_the_tokens_and_what_was_never_seen_is_unknown(causal: bool) -> None:
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
