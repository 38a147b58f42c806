"""Tokenizers as users have them: special tokens, gaps between ids, padding that is also another token."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizerFast,
    Gemma3TextConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    pipeline,
)

from minilm import Batch, Classification, Config, Data, Run, Tokens
from minilm.commands.evaluate import evaluate
from minilm.config import CausalLM, MaskedLM, Model
from minilm.data.corpus import PreparedData, encode
from minilm.data.labels import Labels
from minilm.data.micro_batch import collate_all_targets, concatenate_rows
from minilm.data.special_ids import count_embedding_rows, find_prefix_and_suffix
from minilm.data.tokenizer import load_tokenizer
from minilm.data.tokenizer_extension import extend_tokenizer
from minilm.data.tokenizer_training import train_tokenizer
from minilm.models.loading import load_model
from minilm.models.row_head import RowHead
from minilm.models.sparse_head import SparseHead
from minilm.objectives.causal_lm import CausalLMCollator
from minilm.objectives.classification_loss import ClassificationLoss
from minilm.objectives.factory import build_objective
from minilm.objectives.masking import MaskedLMCollator
from minilm.train import train, train_step
from tests.tiny import tiny_config

pytestmark = pytest.mark.scorecard(31)


@pytest.fixture(autouse=True)
def no_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # a run chooses its precision


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
    """Return a tokenizer of whole words. `ids` are their ids, by default those after the special tokens."""
    numbers = ids or [len(SPECIAL) + i for i in range(len(words))]
    vocabulary = {**{token: i for i, token in enumerate(SPECIAL)}, **dict(zip(words, numbers, strict=True))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown or "none"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = AROUND
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ROLES, **({"unk_token": unknown} if unknown else {}))


def dna_letters() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *"ACGT"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.post_processor = AROUND
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ROLES)


def digits() -> PreTrainedTokenizerFast:
    tokenizer = words_of(*"0123456789")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", "")
    return tokenizer


def llama_like() -> PreTrainedTokenizerFast:
    """Return a tokenizer as Llama's: it puts a token and a space before each text, and no token after it."""
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("▁", -1.0), ("▁A", -1.0)], 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def without_special_tokens() -> PreTrainedTokenizerFast:
    tokenizer = dna_letters()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


SURROUNDED: dict[str, tuple[Callable[[], PreTrainedTokenizerBase], str, list[int], list[int]]] = {
    "DNA letters without an unknown token": (dna_letters, "GATTACA", [2], [3]),
    "whole words without an unknown token": (lambda: words_of("the", "fox"), "the fox", [2], [3]),
    "whole words with an unknown token": (lambda: words_of("the", "fox", unknown="[UNK]"), "the fox", [2], [3]),
    "a normalizer that drops the letter a": (digits, "4 2", [2], [3]),
    "a token before the text and none after it": (llama_like, "A", [1], []),
    "nothing around a text": (without_special_tokens, "GATTACA", [], []),
}


@pytest.mark.parametrize("situation", SURROUNDED)
def test_the_special_tokens_around_a_text_are_found_whatever_the_vocabulary(situation: str) -> None:
    make, text, before, after = SURROUNDED[situation]
    tokenizer = make()
    expected = make()(text)["input_ids"]
    examples = encode(Dataset.from_dict({"text": [text]}), tokenizer, max_length=16)
    assert examples[0].tolist() == expected
    assert [ids.tolist() for ids in find_prefix_and_suffix(tokenizer)] == [before, after]


def repeated_line(folder: Path) -> PreTrainedTokenizerBase:
    lines = [*SPECIAL, "the", "quick", "fox", "the", "dog", "runs"]
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return BertTokenizerFast(str(folder / "vocab.txt"))


def with_gaps(folder: Path) -> PreTrainedTokenizerBase:
    return words_of("the", "quick", "fox", "dog", "runs", unknown="[UNK]", ids=[5, 9, 11, 40, 41])


def far_token(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = words_of("the", "quick", "fox", "dog", "runs", unknown="[UNK]")
    state = tokenizer.backend_tokenizer.to_str()
    vocabulary = '"runs":9'
    assert vocabulary in state
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(state.replace(vocabulary, '"runs":300')), unk_token="[UNK]", **ROLES
    )


def without_gaps(folder: Path) -> PreTrainedTokenizerBase:
    return words_of("the", "quick", "fox", "dog", "runs", unknown="[UNK]")


@pytest.mark.parametrize(
    ("make", "size"),
    [(repeated_line, 11), (with_gaps, 42), (far_token, 301), (without_gaps, 10)],
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
    assert count_embedding_rows(tokenizer) == size == max(tokenizer.get_vocab().values()) + 1
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    network = load_model(Model(type="bert", config=fields), tokenizer, max_length=16, seed=0)
    assert network.config.vocab_size == size
    objective = build_objective(MaskedLM(rate=0.5))
    collator = MaskedLMCollator(tokenizer, rate=0.5, seed=0, padded=False, multiple=1)
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
    assert examples.count_ids(count_embedding_rows(tokenizer)).sum() == 9


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
    collator = CausalLMCollator(tokenizer, padded=not head.padding_free, multiple=1)
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


def checkpoint(kind: str, folder: Path, auto: Any, rows: int, **changed: Any) -> None:
    config = tiny_config(kind, trained_tokenizer())
    for name, value in {"vocab_size": rows, **changed}.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    auto.from_config(config).save_pretrained(folder)


@cache
def trained_tokenizer() -> PreTrainedTokenizerBase:
    texts = [f"{i} and {i * i} make {i + i * i}, all told." for i in range(60)]
    return train_tokenizer(Dataset.from_dict({"text": texts}), "bpe", 300)


POSITIONS: dict[str, tuple[str, int | None, str]] = {
    "a RoBERTa whose padding id is an ordinary word of the tokenizer": ("roberta", 16, "1 and 1 make 2, all told."),
    "a RoBERTa of the usual padding id and a tokenizer of BERT's": ("roberta", 1, "[UNK] 1 and [UNK] 4 make 5."),
    "padding in a text of RoBERTa": ("roberta", None, "12 [PAD] 144 make [PAD][PAD] 156"),
    "padding in a text of XLM-R": ("xlm-roberta", None, "[PAD] 12 [PAD] 144 make 156"),
    "padding in a text of CamemBERT": ("camembert", None, "12 [PAD] 144 make 156"),
    "padding in a text of BERT": ("bert", None, "12 [PAD] 144 make 156"),
    "padding in a text of XLM, which guesses a mask": ("xlm", None, "12 [PAD] 144 make 156"),
    "no special token in a text of RoBERTa": ("roberta", None, "12 and 144 make 156"),
}


@pytest.mark.parametrize("head", ["masked", "classification"])
@pytest.mark.parametrize("situation", POSITIONS)
def test_losses_are_those_of_plain_transformers_whatever_the_padding_id(
    situation: str, head: str, tmp_path: Path
) -> None:
    kind, padding, text = POSITIONS[situation]
    tokenizer = trained_tokenizer()
    changed = {} if padding is None else {"pad_token_id": padding}
    texts = [text, "7 and 49 make 56, all told.", text + " " + text, "3"]
    auto = AutoModelForMaskedLM if head == "masked" else AutoModelForSequenceClassification
    checkpoint(kind, tmp_path, auto, count_embedding_rows(tokenizer), **changed, num_labels=3)
    plain = auto.from_pretrained(tmp_path).eval()
    encoded = [tokenizer(each, return_tensors="pt") for each in texts]
    with torch.no_grad():
        logits = [plain(input_ids=e["input_ids"], attention_mask=e["attention_mask"]).logits[0] for e in encoded]
    network = load_model(Model(name=str(tmp_path)), tokenizer, max_length=40, seed=0, auto=auto)
    assert network.config.pad_token_id == plain.config.pad_token_id
    rows = [e["input_ids"][0].numpy() for e in encoded]
    if head == "masked":
        ours: Any = SparseHead(network).eval()
        batch = collate_all_targets(rows, np.arange(4), 0, 0.0)
        if not ours.padding_free:
            ids_T, packing = concatenate_rows(rows, padded=True, multiple=1)
            batch = replace(batch, packing=packing)
        with torch.no_grad():
            actual = ours(batch.input_ids_T, batch.packing, batch.target_index_N, batch.target_ids_N)
        expected = torch.cat(
            [F.cross_entropy(x, e["input_ids"][0], reduction="none") for x, e in zip(logits, encoded, strict=True)]
        )
    else:
        ours = RowHead(network, loss=ClassificationLoss(Labels(problem="single-label", names=("a", "b", "c")))).eval()
        ids_T, packing = concatenate_rows(rows, padded=not ours.padding_free, multiple=1)
        first_R = (packing.position_T == 0).nonzero()[:, 0]
        with torch.no_grad():
            actual = ours(torch.from_numpy(ids_T), packing, first_R)
        expected = torch.stack(logits)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def write_rows(path: Path, texts: list[str]) -> str:
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


TEXTS = [f"{i} and {i * i} make {i + i * i}, all told." for i in range(30)]
REFUSED: dict[str, tuple[str, list[str], dict[str, Any], str]] = {
    "an end token inside a text of BART": (
        "bart",
        [*TEXTS, "a page of HTML </s> with a tag"],
        {},
        r"1 of the (training|evaluation) texts hold the special token </s> .*begins 'a page of HTML.*': take it out",
    ),
    "no end token at all for BART": (
        "bart",
        TEXTS,
        {"single": "$A"},
        r"BartForSequenceClassification reads the class of a text at the token that ends it, .*</s> .*--tokens\.name",
    ),
    "an end token inside a text of T5": (
        "t5",
        [*TEXTS, "a page of HTML </s> with a tag"],
        {},
        r"1 of the (training|evaluation) texts hold the special token </s>",
    ),
}


def bart_like(single: str = "$A </s>") -> PreTrainedTokenizerBase:
    """Return a tokenizer as BART's, whose texts end with </s>."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>", "<unk>", "<mask>"]
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", mask_token="<mask>")


@pytest.mark.parametrize("situation", REFUSED)
def test_a_text_that_the_model_would_misread_is_found_before_the_first_step(situation: str, tmp_path: Path) -> None:
    kind, texts, around, message = REFUSED[situation]
    tokenizer = bart_like(**around)
    tokenizer.save_pretrained(tmp_path / "model")
    config = tiny_config(kind, tokenizer)
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    run_config = Config(
        data=Data(source=write_rows(tmp_path / "rows.jsonl", texts), label_column="label", eval_fraction=0.3),
        model=Model(name=str(tmp_path / "model")),
        batch=Batch(max_length=48, examples=4),
        objective=Classification(),
        run=Run(max_steps=2, output_dir=str(tmp_path / "out")),
    )
    with pytest.raises(ValueError, match=message) as caught:
        train(run_config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def bert_like(cls: int = 0, text: int = 0) -> PreTrainedTokenizerBase:
    """Return a tokenizer as BERT's, which gives a second text the token type 1."""
    tokenizer = words_of(*"0123456789", "and", "make", unknown="[UNK]")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"[CLS]:{cls} $A:{text} [SEP]:{text}",
        pair=f"[CLS]:{cls} $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        unk_token="[UNK]",
        eos_token="[SEP]",
        model_input_names=names,
        **ROLES,
    )


def on_pairs(folder: Path, tokenizer: PreTrainedTokenizerBase, model: Model) -> Config:
    """Return the configuration of a short run on pairs with this tokenizer."""
    rows = [{"a": f"{i % 10} and {i % 7}", "b": f"make {i % 9}", "label": i % 2} for i in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer.save_pretrained(folder / "tokenizer")
    columns = {"column": "a", "pair_column": "b", "label_column": "label"}
    return Config(
        data=Data(source=str(folder / "pairs.jsonl"), eval_fraction=0.25, **columns),
        tokens=Tokens(name=str(folder / "tokenizer")),
        model=model,
        batch=Batch(max_length=48, examples=4),
        objective=Classification(),
        run=Run(max_steps=2, output_dir=str(folder / "out")),
    )


SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("kind", "size", "types", "warning"),
    [
        ("roberta", {**SMALL, "type_vocab_size": 1}, False, "only one"),
        ("bert", {**SMALL, "type_vocab_size": 1}, False, "only one"),
        ("distilbert", {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}, False, "none"),
        ("bert", SMALL, True, None),
    ],
    ids=["RoBERTa of one token type", "BERT of one", "DistilBERT, which takes none", "BERT of two"],
)
def test_pairs_train_whatever_token_types_the_model_knows(
    kind: str,
    size: dict[str, Any],
    types: bool,
    warning: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "minilm"):
        train(on_pairs(tmp_path, bert_like(), Model(type=kind, config=size)))
    lines = [record.message for record in caplog.records if "token types" in record.message]
    assert [f"takes {warning}: they are left out" in line for line in lines] == [True] * (warning is not None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ("token_type_ids" in tokenizer("1", "2")) == types
    classify = pipeline("text-classification", str(tmp_path / "out"))
    pairs = [{"text": "1 and 1", "text_pair": "make 2"}, {"text": "3", "text_pair": "4"}]
    assert len(classify(pairs, batch_size=2)) == 2


@pytest.mark.parametrize("paired", [False, True], ids=["texts", "pairs"])
@pytest.mark.parametrize("named", [False, True], ids=["a tokenizer without types", "a tokenizer with types"])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_classifier_reads_the_token_types_that_the_plain_model_reads(
    kind: str, named: bool, paired: bool, tmp_path: Path
) -> None:
    tokenizer = bert_like()
    if not named:
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids", "attention_mask"]
    run_config = on_pairs(tmp_path, tokenizer, Model(name=str(tmp_path / "model")))
    (tmp_path / "held.jsonl").write_text((tmp_path / "pairs.jsonl").read_text())
    data = Data(
        source=run_config.data.source,
        eval_source=str(tmp_path / "held.jsonl"),
        column="a",
        pair_column="b" if paired else None,
        label_column="label",
    )
    run_config = replace(run_config, data=data)
    torch.manual_seed(1)
    config = tiny_config(kind, tokenizer)
    config.pad_token_id, config.initializer_range = tokenizer.pad_token_id, 0.5
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    objective = build_objective(run_config.objective)
    prepared = objective.prepare(run_config)
    network = load_model(
        run_config.model, prepared.tokenizer, max_length=48, seed=0, auto=objective.auto, fields=prepared.fields
    )
    head = objective.head(network, prepared).eval()
    examples = prepared.train
    collator = objective.collator(prepared.tokenizer, examples, seed=None, padded=not head.padding_free, multiple=1)
    batch = collator([examples[i] for i in (3, 4)], np.array([3, 4]), 0)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    texts = [("3 and 3", "make 3"), ("4 and 4", "make 4")]
    with torch.no_grad():
        actual = head.logits(batch.input_ids_T, batch.packing, batch.target_index_N, batch.type_ids_T)
        expected = [plain(**tokenizer(*each[: 1 + paired], return_tensors="pt")).logits[0] for each in texts]
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-4, atol=1e-5)


NO_TYPES = "is trained and evaluated without token types"


@pytest.mark.parametrize(
    ("objective", "kind", "text", "named", "warning"),
    [
        (MaskedLM(), "bert", 1, True, "types 0, 1, "),
        (MaskedLM(), "bert", 1, False, None),
        (MaskedLM(), "bert", 0, True, None),
        (MaskedLM(), "distilbert", 1, True, None),  # it takes no types at all
        (CausalLM(), "bert", 1, True, "types 0, 1, "),
        (CausalLM(), "bert", 0, True, None),
        (CausalLM(), "gpt2", 0, True, "types 0, "),
        (CausalLM(), "gpt2", 0, False, None),
    ],
)
def test_token_types_that_a_language_model_does_not_read_cause_a_warning(
    objective: Any, kind: str, text: int, named: bool, warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = bert_like(text=text)
    if not named:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    config = tiny_config(kind, tokenizer)
    config.is_decoder = isinstance(objective, CausalLM)
    auto: Any = AutoModelForCausalLM if isinstance(objective, CausalLM) else AutoModelForMaskedLM
    examples = encode(Dataset.from_dict({"text": ["1 and 2", "3"]}), tokenizer, max_length=16)
    with caplog.at_level(logging.WARNING, "minilm"):
        build_objective(objective).head(
            auto.from_config(config), PreparedData(tokenizer=tokenizer, train=examples, eval=examples)
        )
    lines = [record.message for record in caplog.records if "token types" in record.message]
    assert [warning is not None and warning in line and NO_TYPES in line for line in lines] == [True] * (
        warning is not None
    )


def test_more_token_types_than_the_model_knows_are_refused(tmp_path: Path) -> None:
    run_config = on_pairs(tmp_path, bert_like(cls=2), Model(type="bert", config=SMALL))
    with pytest.raises(ValueError, match=r"token types up to 2 and BertForSequenceClassification knows 2: .*-size 3"):
        train(run_config)


@pytest.mark.parametrize(
    ("text", "causal", "token"),
    [
        ("a [MASK] in a text", False, "[MASK]"),
        ("a [PAD] in a text", False, "[PAD]"),
        ("a [SEP] in a text", False, "[SEP]"),
        ("two<|endoftext|>documents", True, "<|endoftext|>"),
        ("no token", False, None),
        ("no token", True, None),
    ],
)
def test_special_tokens_in_texts_cause_one_warning(
    text: str, causal: bool, token: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    documents = Dataset.from_dict({"text": ["one", "two", text, text, f"{text} {causal}"]})
    tokenizer = train_tokenizer(documents, "bpe", 300, causal=causal)
    for layout in ("documents", "blocks"):
        for _ in range(2):  # from the cache too
            caplog.clear()
            with caplog.at_level(logging.WARNING, "minilm"):
                encode(documents, tokenizer, max_length=16, layout=layout, causal=causal, name="training documents")
            warning = [record.message for record in caplog.records if "special token" in record.message]
            assert len(warning) == (token is not None)
            if token:
                assert f"3 of the training documents hold the special token {token}. The first is number" in warning[0]
                assert repr(text) in warning[0]


def test_special_tokens_that_model_and_tokenizer_name_differently_cause_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = trained_tokenizer()
    checkpoint(
        "roberta", tmp_path, AutoModelForMaskedLM, count_embedding_rows(tokenizer), pad_token_id=9, eos_token_id=11
    )
    network = load_model(Model(name=str(tmp_path)), tokenizer, max_length=40, seed=0)
    examples = encode(Dataset.from_dict({"text": TEXTS}), tokenizer, max_length=40)
    prepared = PreparedData(tokenizer=tokenizer, train=examples, eval=examples)
    with caplog.at_level(logging.WARNING, "minilm"):
        build_objective(MaskedLM()).head(network, prepared)
    (warning,) = [record.message for record in caplog.records if "name other special tokens" in record.message]
    assert "pad_token_id is 9 and 0" in warning


def test_a_checkpoint_whose_end_of_text_is_padding_causes_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    documents = Dataset.from_dict({"text": TEXTS})
    tokenizer = train_tokenizer(documents, "bpe", 300, causal=True)
    config = tiny_config("llama", tokenizer)
    assert config.pad_token_id == tokenizer.eos_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    network = load_model(Model(name=str(tmp_path)), tokenizer, max_length=32, seed=0, auto=AutoModelForCausalLM)
    examples = encode(documents, tokenizer, max_length=32, causal=True)
    with caplog.at_level(logging.WARNING, "minilm"):
        build_objective(CausalLM()).head(network, PreparedData(tokenizer=tokenizer, train=examples, eval=examples))
    assert "<|endoftext|>, which ends texts, is padding in the model's configuration" in caplog.text


@pytest.mark.parametrize(("before", "after"), [(None, 0), (7, 0), (0, 0)], ids=["none", "another", "the same"])
def test_a_last_token_classifier_gets_the_padding_id_and_trains_its_embedding(
    before: int | None, after: int, tmp_path: Path
) -> None:
    tokenizer = train_tokenizer(Dataset.from_dict({"text": TEXTS}), "bpe", 300, causal=True)
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "num_labels": 3}
    config = GPT2Config(vocab_size=count_embedding_rows(tokenizer), pad_token_id=before, **size)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    auto = AutoModelForSequenceClassification
    network = load_model(Model(name=str(tmp_path)), tokenizer, max_length=32, seed=0, auto=auto)
    assert network.config.pad_token_id == after
    network.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    classify = pipeline("text-classification", str(tmp_path / "out"))
    alone = [classify(text)[0]["score"] for text in TEXTS[8:12]]
    assert [actual["score"] for actual in classify(TEXTS[8:12], batch_size=4)] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("named", "advice"),
    [
        (True, "leave --tokens.name out to take the model's own"),
        (False, "take the tokenizer that the model was trained with"),
    ],
)
def test_the_advice_for_a_tokenizer_that_does_not_fit_depends_on_its_origin(
    named: bool, advice: str, tmp_path: Path
) -> None:
    tokenizer = trained_tokenizer()
    checkpoint("bert", tmp_path / "model", AutoModelForMaskedLM, 100)
    folder = tmp_path / ("other" if named else "model")
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=f"ids up to .* 100 rows: .*{advice}"):
        load_model(Model(name=str(tmp_path / "model")), AutoTokenizer.from_pretrained(folder), max_length=16, seed=0)


DECODERS = ["llama", "gpt2", "opt", "mistral", "phi"]
ENDS = {
    "the end token at the end of a text": ("12 and 144 </s>", r"1 of the training texts end with the token </s> .*"),
    "two end tokens at the end of a text": (
        "12 </s></s>",
        r"1 of the training texts end with .*number 31, begins '12.*",
    ),
    "the end token inside a text": ("12 </s> 144", None),
    "no end token in a text": ("12 and 144", None),
}


def decoder_folder(kind: str, folder: Path, **changed: Any) -> PreTrainedTokenizerBase:
    """A classifier of this type without an id for padding, and a tokenizer without one."""
    made = bart_like(single="$A")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, eos_token="</s>")
    tokenizer.save_pretrained(folder)
    config = tiny_config(kind, tokenizer)
    config.num_labels = 3
    for name, value in {"pad_token_id": None, "eos_token_id": tokenizer.eos_token_id, **changed}.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return tokenizer


def short_run(folder: Path, texts: list[str], model: Model) -> Config:
    return Config(
        data=Data(
            source=write_rows(folder / "rows.jsonl", texts),
            eval_source=write_rows(folder / "held.jsonl", TEXTS[:6]),
            label_column="label",
        ),
        model=model,
        batch=Batch(max_length=48, examples=4),
        objective=Classification(),
        run=Run(max_steps=1, output_dir=str(folder / "out")),
    )


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("situation", ENDS)
def test_a_decoder_reads_the_class_at_the_last_token_of_each_text_or_says_that_it_cannot(
    situation: str, kind: str, tmp_path: Path
) -> None:
    text, message = ENDS[situation]
    tokenizer = decoder_folder(kind, tmp_path / "model")
    run_config = short_run(tmp_path, [*TEXTS, text], Model(name=str(tmp_path / "model")))
    objective = build_objective(run_config.objective)
    if message is not None:
        with pytest.raises(ValueError, match=message) as caught:
            train(run_config)
        assert "\n" not in str(caught.value)
        return
    prepared = objective.prepare(run_config)
    network = load_model(
        run_config.model, prepared.tokenizer, max_length=48, seed=0, auto=objective.auto, fields=prepared.fields
    )
    head = objective.head(network, prepared).eval()
    ids_T, packing = concatenate_rows([prepared.train[30], prepared.train[3]], padded=not head.padding_free, multiple=1)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        actual = head.logits(torch.from_numpy(ids_T), packing, (packing.position_T == 0).nonzero()[:, 0])
        expected = [plain(**tokenizer(each, return_tensors="pt")).logits[0] for each in (text, TEXTS[3])]
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["<b>x</s>y", "A </s> and </s>"])
def test_a_text_with_a_special_token_is_named_by_its_number_and_quoted_as_it_is(text: str, tmp_path: Path) -> None:
    tokenizer = bart_like()
    tokenizer.save_pretrained(tmp_path / "model")
    config = tiny_config("bart", tokenizer)
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="number 31, begins") as caught:
        train(short_run(tmp_path, [*TEXTS, text], Model(name=str(tmp_path / "model"))))
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("head", ["causal", "classification"])
def test_a_configuration_that_cannot_read_a_row_is_refused_in_one_line(head: str) -> None:
    settings: Any = {"causal": CausalLM(), "classification": Classification()}[head]
    kind = "mistral"
    config: dict[str, Any] = {**LLAMA, "num_key_value_heads": 8}
    with pytest.raises(ValueError, match=r"cannot read a row .*--model\.config") as caught:
        load_model(
            Model(type=kind, config=config),
            trained_tokenizer(),
            max_length=32,
            seed=0,
            auto=build_objective(settings).auto,
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("objective", [MaskedLM(), Classification()], ids=["masked", "classification"])
@pytest.mark.parametrize("part", ["training", "evaluation"])
def test_a_text_that_the_vocabulary_cannot_spell_is_named(objective: Any, part: str, tmp_path: Path) -> None:
    digits_only = words_of(*"0123456789")
    digits_only.save_pretrained(tmp_path / "tokenizer")
    good, bad = [str(i % 10) for i in range(12)], ["1 2", "3 x"]
    run_config = replace(
        short_run(tmp_path, good + (bad if part == "training" else []), Model(type="bert", config=SMALL)),
        objective=objective,
        tokens=Tokens(name=str(tmp_path / "tokenizer")),
    )
    if part == "evaluation":
        write_rows(tmp_path / "held.jsonl", good + bad)
    with pytest.raises(ValueError, match=f"number 14 of the {part} documents, which begins '3 x'") as caught:
        train(run_config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_tokens_that_a_class_of_tokenizers_adds_to_any_vocabulary_are_named(tmp_path: Path) -> None:
    decoder_folder("qwen2", tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"ids up to 300 .* 300 rows: <\|endoftext\|> \(Qwen2.*resize_token_embeddings"
    ):
        train(short_run(tmp_path, TEXTS, Model(name=str(tmp_path / "model"))))


def two_label_bart(folder: Path) -> PreTrainedTokenizerBase:
    """A checkpoint whose config.json does not say that it has 2 labels, so that transformers reads it with 3."""
    tokenizer = bart_like()
    tokenizer.save_pretrained(folder)
    config = tiny_config("bart", tokenizer)
    config.num_labels = 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).num_labels == 3
    return tokenizer


def labelled_run(folder: Path, labels: list[Any]) -> Config:
    rows = [{"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(TEXTS)]
    run_config = short_run(folder, TEXTS, Model(name=str(folder / "model")))
    for name in ("rows", "held"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return run_config


def test_a_configuration_with_more_labels_than_the_head_is_refused_with_both_shapes(tmp_path: Path) -> None:
    two_label_bart(tmp_path / "model")
    run_config = labelled_run(tmp_path, [0, 1])
    shapes = r"out_proj\.bias has another shape than its configuration says \(\[2\] and \[3\]\)"
    with pytest.raises(ValueError, match=rf"{shapes}: .*config\.json, such as id2label") as caught:
        train(run_config)
    assert "\n" not in str(caught.value)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "no", "1": "yes"}}))
    train(run_config)
    assert AutoConfig.from_pretrained(tmp_path / "out").num_labels == 2


@pytest.mark.parametrize("labels", [["no", "yes"], ["no", "yes", "maybe"], list("abcd")], ids=len)
def test_a_head_that_contradicts_its_configuration_makes_room_for_new_labels(labels: list[str], tmp_path: Path) -> None:
    two_label_bart(tmp_path / "model")
    train(labelled_run(tmp_path, labels))
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert sorted(saved.config.id2label.values()) == sorted(labels)
    assert saved.classification_head.out_proj.bias.shape == (len(labels),)


def test_a_language_model_with_another_shape_than_its_configuration_is_refused_in_one_line(tmp_path: Path) -> None:
    checkpoint("bert", tmp_path, AutoModelForMaskedLM, 300)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 290}))
    with pytest.raises(ValueError, match=r"has another shape than its configuration says \(\[300.*\] and \[290"):
        load_model(Model(name=str(tmp_path)), trained_tokenizer(), max_length=16, seed=0)


def spoil_tokenizer(folder: Path, *, padding: bool = True, mask: bool = True) -> None:
    tokenizer = words_of("one", "two", "three", unknown="[UNK]")
    tokenizer.pad_token = tokenizer.pad_token if padding else None
    tokenizer.mask_token = tokenizer.mask_token if mask else None
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("lacking", ["padding", "mask"])
def test_the_evaluation_of_a_model_without_a_token_says_what_helps_there(lacking: str, tmp_path: Path) -> None:
    checkpoint("bert", tmp_path / "model", AutoModelForMaskedLM, 300)
    spoil_tokenizer(tmp_path / "model", **{lacking: False})
    (tmp_path / "text.txt").write_text("one two\n" * 9)
    with pytest.raises(ValueError, match=rf"no {lacking} token.*_token in its tokenizer_config\.json") as caught:
        evaluate(tmp_path / "model", Data(source=str(tmp_path / "text.txt")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", ["one x", "one [SEP]"], ids=["a word it cannot spell", "a special token"])
def test_the_evaluation_of_a_model_calls_its_texts_documents(
    words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint("bert", tmp_path / "model", AutoModelForMaskedLM, 300)
    words_of("one", "two", "three").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("one two\n" * 9 + words + "\n")
    data = Data(source=str(tmp_path / "text.txt"))
    if "x" in words:
        with pytest.raises(ValueError, match="number 10 of the documents, which begins 'one x'"):
            evaluate(tmp_path / "model", data)
        return
    with caplog.at_level(logging.WARNING, "minilm"):
        evaluate(tmp_path / "model", data)
    lines = [record.message for record in caplog.records if "special token" in record.message]
    assert [line.startswith("1 of the documents hold the special token [SEP]") for line in lines] == [True]


@pytest.mark.parametrize("kind", ["characters", "wordpiece", "bpe", "unigram"])
def test_a_vocabulary_is_learnt_from_both_texts_of_a_pair(kind: str, tmp_path: Path) -> None:
    documents = Dataset.from_dict({"text": ["abc abc"] * 9, "pair": ["xyz xyz", "xyz", "zyx"] * 3})
    tokenizer = load_tokenizer(Tokens(kind=kind, vocab_size=300), None, documents)
    ids = tokenizer("abc", "xyz")["input_ids"]
    assert tokenizer.unk_token_id not in ids
    alone = load_tokenizer(Tokens(kind=kind, vocab_size=300), None, documents.remove_columns("pair"))
    assert alone.get_vocab() != tokenizer.get_vocab()
