"""Tokenizers and checkpoints from the field: what surrounds a text, holes in the ids, padding that is a token too."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertTokenizerFast,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    pipeline,
)

from minilm.causal import CausalCollator
from minilm.config import MaskedLM, Model
from minilm.head import SparseHead
from minilm.masked import MaskedCollator
from minilm.model import load_model
from minilm.objectives import objective_of
from minilm.special_ids import id_count, ids_around
from minilm.tokens import encode
from minilm.train import train_step
from minilm.vocabulary import extend_tokenizer, train_tokenizer

pytestmark = pytest.mark.scorecard(31)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
AROUND = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
)
ROLES = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def words_of(*words: str, unknown: str | None = None, ids: list[int] | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, `ids` their numbers, by default those after the special tokens'."""
    numbers = ids or [len(SPECIAL) + i for i in range(len(words))]
    vocabulary = {**{token: i for i, token in enumerate(SPECIAL)}, **dict(zip(words, numbers, strict=True))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown or "none"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = AROUND
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ROLES, **({"unk_token": unknown} if unknown else {}))


def dna() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *"ACGT"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.post_processor = AROUND
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ROLES)


def digits() -> PreTrainedTokenizerFast:
    tokenizer = words_of(*"0123456789")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", "")
    return tokenizer


def begun() -> PreTrainedTokenizerFast:
    """As Llama's: a token before the text and none after it, and a space that is put before each text."""
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("▁", -1.0), ("▁A", -1.0)], 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def bare() -> PreTrainedTokenizerFast:
    tokenizer = dna()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


SURROUNDED: dict[str, tuple[Callable[[], PreTrainedTokenizerBase], str, list[int], list[int]]] = {
    "DNA letters without an unknown token": (dna, "GATTACA", [2], [3]),
    "whole words without an unknown token": (lambda: words_of("the", "fox"), "the fox", [2], [3]),
    "whole words with an unknown token": (lambda: words_of("the", "fox", unknown="[UNK]"), "the fox", [2], [3]),
    "a normalizer that drops the letter a": (digits, "4 2", [2], [3]),
    "a token before the text and none after it": (begun, "A", [1], []),
    "nothing around a text": (bare, "GATTACA", [], []),
}


@pytest.mark.parametrize("situation", SURROUNDED)
def test_the_special_tokens_around_a_text_are_found_whatever_the_vocabulary(situation: str) -> None:
    make, text, before, after = SURROUNDED[situation]
    tokenizer = make()
    expected = make()(text)["input_ids"]
    examples = encode(Dataset.from_dict({"text": [text]}), tokenizer, max_length=16)
    assert examples[0].tolist() == expected
    assert [ids.tolist() for ids in ids_around(tokenizer)] == [before, after]


def repeated_line(folder: Path) -> PreTrainedTokenizerBase:
    lines = [*SPECIAL, "the", "quick", "fox", "the", "dog", "runs"]
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return BertTokenizerFast(str(folder / "vocab.txt"))


def hole(folder: Path) -> PreTrainedTokenizerBase:
    return words_of("the", "quick", "fox", "dog", "runs", unknown="[UNK]", ids=[5, 9, 11, 40, 41])


def far_token(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = words_of("the", "quick", "fox", "dog", "runs", unknown="[UNK]")
    state = tokenizer.backend_tokenizer.to_str()
    vocabulary = '"runs":9'
    assert vocabulary in state
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(state.replace(vocabulary, '"runs":300')), unk_token="[UNK]", **ROLES
    )


def whole(folder: Path) -> PreTrainedTokenizerBase:
    return words_of("the", "quick", "fox", "dog", "runs", unknown="[UNK]")


@pytest.mark.parametrize(
    ("make", "size"),
    [(repeated_line, 11), (hole, 42), (far_token, 301), (whole, 10)],
    ids=["a repeated line in vocab.txt", "ids with holes", "one id far beyond the others", "no hole"],
)
def test_a_model_has_a_row_for_each_id_and_trains_on_them(
    make: Callable[[Path], PreTrainedTokenizerBase], size: int, tmp_path: Path
) -> None:
    tokenizer = make(tmp_path)
    text = "the quick fox the dog runs"
    documents = Dataset.from_dict({"text": [text, "the dog runs"]})
    examples = encode(documents, tokenizer, max_length=16)
    assert examples[0].tolist() == tokenizer(text)["input_ids"]
    assert id_count(tokenizer) == size == max(tokenizer.get_vocab().values()) + 1
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    network = load_model(Model(type="bert", config=fields), tokenizer, max_length=16, seed=0)
    assert network.config.vocab_size == size
    objective = objective_of(MaskedLM(rate=0.5))
    collator = MaskedCollator(tokenizer, rate=0.5, seed=0, padded=False, multiple=1)
    assert {*collator.replacements} == {*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids}
    head = SparseHead(network)
    rows = [examples[i] for i in range(2)]
    step = train_step(
        Accelerator(cpu=True),
        head,
        torch.optim.SGD(head.parameters(), lr=0.1),
        [collator(rows, np.arange(2), 0)],
        lr=0.1,
        max_grad_norm=1.0,
    )
    assert np.isfinite(step.loss.item())
    assert objective.auto is AutoModelForMaskedLM
    assert examples.counts(id_count(tokenizer)).sum() == 9


def test_words_are_added_after_the_last_id_where_the_ids_have_holes(tmp_path: Path) -> None:
    tokenizer = repeated_line(tmp_path)
    documents = Dataset.from_dict({"text": ["foxthe dogthe", "foxthe dogthe thedog"]})
    (tmp_path / "vocab.txt").write_text(
        "\n".join([*SPECIAL, "the", "fox", "##the", "the", "dog", "##dog"]) + "\n", encoding="utf-8"
    )
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    extended = extend_tokenizer(tokenizer, documents, 2)
    assert extended("foxthe dogthe", add_special_tokens=False)["input_ids"] == [12, 11]
    assert extended("fox dog the", add_special_tokens=False)["input_ids"] == [6, 9, 8]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "roberta", "qwen2", "gemma3"])
def test_a_new_causal_model_learns_what_comes_after_the_end_of_a_text(kind: str, tmp_path: Path) -> None:
    texts = ["Once upon a time there was a fox.", "Once more the fox ran away.", "Once the dog slept, the fox came."]
    documents = Dataset.from_dict({"text": texts * 8})
    tokenizer = train_tokenizer(documents, "bpe", 300, causal=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
        "opt": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
        },
        "roberta": {"is_decoder": True, **{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}},
        "gemma3": {},
    }
    if kind == "gemma3":
        from transformers import Gemma3TextConfig

        inner = Gemma3TextConfig(**LLAMA, head_dim=16, vocab_size=300).to_dict()
        sizes["gemma3"] = {
            "text_config": inner,
            "vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        }
    model = Model(type=kind, config=sizes.get(kind, LLAMA))
    network = load_model(model, tokenizer, max_length=32, seed=0, auto=AutoModelForCausalLM)
    ids = np.concatenate([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts * 8])
    rows = [row.astype(np.int64) for row in np.array_split(ids, 12)]
    head = SparseHead(network)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    collator = CausalCollator(tokenizer, padded=not head.padding_free, multiple=1)
    for step in range(60):
        batch = collator(rows, np.arange(len(rows)), step)
        train_step(Accelerator(cpu=True), head.train(), optimizer, [batch], lr=1e-2, max_grad_norm=1.0)
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    once = tokenizer("Once")["input_ids"][0]
    with torch.no_grad():
        logits_V = plain(input_ids=torch.tensor([[tokenizer.eos_token_id]])).logits[0, -1]
    assert logits_V.softmax(-1)[once] > 0.8
    if kind != "gemma3":  # whose pipeline wants a processor of images
        generate = pipeline("text-generation", str(tmp_path), max_new_tokens=3, do_sample=False)
        assert len(generate(["Once upon", "The fox"], batch_size=2)) == 2
