"""The right tokenizer is loaded, and a trained or extended one is cached."""

import json
import os
import string
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minilm.config import Tokens
from minilm.data.tokenizer import load_tokenizer
from minilm.data.tokenizer_state import serialize_tokenizer
from minilm.data.tokenizer_training import train_tokenizer


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
        forbidden.setattr("minilm.data.tokenizer.train_tokenizer", None)
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
def test_an_extended_tokenizer_keeps_the_settings_of_the_original(
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
        "import json, sys; from transformers import AutoTokenizer; "
        "from minilm.data.tokenizer_state import serialize_tokenizer; "
        "print(json.dumps(serialize_tokenizer(AutoTokenizer.from_pretrained(sys.argv[1]))))"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    # This process has another seed, a random one.
    state = subprocess.run(words, env=os.environ | {"PYTHONHASHSEED": "1"}, stdout=-1, check=True).stdout
    assert state == json.dumps(serialize_tokenizer(AutoTokenizer.from_pretrained(tmp_path))).encode() + b"\n"


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
    with pytest.raises(ValueError, match=r"^tokenizer [^\n]* has no padding token[^\n]*--tokens\.name\.\Z"):
        load_tokenizer(Tokens(name=str(tmp_path)), None, documents)


def test_a_tokenizer_without_padding_pads_with_the_token_that_ends_texts(documents: Dataset, tmp_path: Path) -> None:
    letters = {letter: number for number, letter in enumerate(string.ascii_lowercase)}
    gpt = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(letters)), eos_token="z")
    gpt.save_pretrained(tmp_path)
    assert load_tokenizer(Tokens(name=str(tmp_path)), None, documents).pad_token == "z"
    assert load_tokenizer(Tokens(name=str(tmp_path)), None, documents, causal=True).pad_token is None


def test_calls_with_truncation_and_padding_do_not_change_what_identifies_a_tokenizer(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    own = AutoTokenizer.from_pretrained(tmp_path)
    backend = own.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    state = serialize_tokenizer(own)
    own(["A short one.", "The quick brown fox jumps."], truncation=True, max_length=5, stride=2, padding="longest")
    truncation, padding = backend.truncation, backend.padding
    assert (truncation["max_length"], truncation["stride"], padding["length"]) == (5, 2, None)
    assert serialize_tokenizer(own) == state
    assert (backend.truncation, backend.padding) == (truncation, padding)
    # Another vocabulary is another tokenizer.
    own.add_tokens("quick brown")
    assert serialize_tokenizer(own) != state
