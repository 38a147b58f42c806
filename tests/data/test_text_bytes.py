"""The bytes of a text's tokens sum to its length in UTF-8, with every kind of tokenizer."""

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minilm.data.corpus import encode
from minilm.data.text_bytes import count_text_bytes, measure_token_names
from minilm.data.tokenizer_training import train_tokenizer
from tests.languages import EVERYTHING

WORDS = ["the quick fox", "a list of names", "  spaces   and\ttabs\n", "naïve café", "中文字 と 日本語", *EVERYTHING]
DOCUMENTS = Dataset.from_dict({"text": WORDS * 3})
TOKENS = [
    AddedToken("Übergröße", special=False),
    AddedToken("中文", special=False, lstrip=True),
    AddedToken("é", special=False, rstrip=True, normalized=False),
    AddedToken("Ġ", special=False),
    AddedToken("\u2581", special=False, lstrip=True, rstrip=True),
    AddedToken("  ", special=False),
]


def trained(kind: str, causal: bool = False) -> PreTrainedTokenizerBase:
    return train_tokenizer(DOCUMENTS, kind, 400, causal=causal)


def roberta() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(WORDS, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def sentencepiece(prepend: str = "always", normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerBase:
    """Return a Unigram tokenizer without a piece for a space alone, so that it spells a space in bytes."""
    single = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", *single, "\u2581a", "a", "b", "c", "bc", "é", "\u2581é"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    if normalizer:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def words() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "fox": 2, "a": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level BPE": lambda: trained("bpe"),
    "byte-level BPE that puts a space first and trims places": roberta,
    "WordPiece in lower case without accents": lambda: trained("wordpiece"),
    "Unigram with bytes": lambda: trained("unigram"),
    "characters": lambda: trained("characters"),
    "SentencePiece that puts a space first": sentencepiece,
    "SentencePiece of compatible forms": lambda: sentencepiece("first", normalizers.NFKC()),
    "whole words": words,
}
texts = (
    st.text()
    | st.text(alphabet="abcé Ü中Ġ\u2581\n½ﬁ")
    | st.lists(st.sampled_from(["Übergröße", "中文", "é", "Ġ", "\u2581", " ", "the fox", "a", "[MASK]", "x"])).map(
        "".join
    )
)


@pytest.mark.scorecard(31)
@pytest.mark.parametrize("added", [False, True], ids=["", "with added tokens"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_the_tokens_of_any_text_sum_to_its_length(kind: str, added: bool) -> None:
    tokenizer = KINDS[kind]()
    if added:
        tokenizer.add_tokens(TOKENS)

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(rows=st.lists(texts.filter(str.strip), min_size=1, max_size=30))
    def check(rows: list[str]) -> None:
        documents = Dataset.from_dict({"text": [*rows, "a"]})
        examples = encode(documents, tokenizer, max_length=10**6, text_bytes=True)
        spelt = [row for row in documents["text"] if tokenizer(row, add_special_tokens=False)["input_ids"]]
        sizes = [int(examples.token_bytes(i).sum()) for i in range(len(examples))]
        assert sizes == [len(row.encode()) for row in spelt]
        assert [len(examples.token_bytes(i)) for i in range(len(examples))] == examples.lengths.tolist()

    check()


@given(text=st.text())
def test_a_token_of_byte_level_bpe_has_the_bytes_that_it_spells(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    weights = measure_token_names(tokenizer)[encoding.ids]
    if not {*encoding.ids} & {*tokenizer.all_special_ids}:
        assert count_text_bytes(text, encoding.offsets, weights).tolist() == [len(token) for token in encoding.tokens]


@pytest.mark.scorecard(31)
@pytest.mark.parametrize(
    ("make", "text", "tokens", "sizes"),
    [
        (KINDS["byte-level BPE"], "xÜbergröße", ["x", "Übergröße"], [1, 12]),
        (KINDS["byte-level BPE"], "x 中文", ["x", " 中文"], [1, 7]),
        (KINDS["whole words"], "the  fox ", ["the", "fox"], [3, 6]),
        (sentencepiece, "a b", ["\u2581a", "<0xE2>", "<0x96>", "<0x81>", "b"], [1, 0, 0, 1, 1]),
        (lambda: sentencepiece("never"), "é中", ["é", "<0xE4>", "<0xB8>", "<0xAD>"], [2, 1, 1, 1]),
    ],
    ids=["an added word of two-byte letters", "the space before it", "dropped spaces", "a space in bytes", "bytes"],
)
def test_each_token_has_the_bytes_of_its_characters(
    make: Callable[[], PreTrainedTokenizerBase], text: str, tokens: list[str], sizes: list[int], tmp_path: Path
) -> None:
    tokenizer = make()
    tokenizer.add_tokens(TOKENS[:2])
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    assert encoding.tokens == tokens
    assert count_text_bytes(text, encoding.offsets, measure_token_names(tokenizer)[encoding.ids]).tolist() == sizes
