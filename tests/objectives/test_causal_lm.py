"""Causal LM: each token predicted from those before it in its own document, by every family of models."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, pipeline

from minilm import Batch, CausalLM, Config, Data, Model, Optim, Run, Tokens
from minilm.data.batch_plan import Plan
from minilm.data.corpus import encode
from minilm.data.micro_batch import loss_sum
from minilm.data.packing import pack
from minilm.data.tokenizer_training import train_tokenizer
from minilm.models.inference import load_causal_lm
from minilm.models.loading import load_model
from minilm.models.sparse_head import SparseHead
from minilm.objectives.causal_lm import CausalLMCollator
from minilm.objectives.factory import build_objective, prepare_data
from minilm.train import train
from tests.launch import read_log
from tests.reference import NO_EXAMPLES, assert_same_gradients, fields

SHARED = {"num_attention_heads": 4, "num_key_value_heads": 2}  # grouped query attention
# Families of models, and what a tiny one of each needs besides its size.
TYPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": SHARED,
    "mistral": {**SHARED, "sliding_window": 12},
    "qwen2": SHARED,
    "qwen3": {**SHARED, "head_dim": 8},
    "gpt_neox": {},
    "phi": {},
    "olmo2": {},
    "smollm3": SHARED,
    "starcoder2": SHARED,
    "gemma2": {**SHARED, "head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "bloom": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}
PADDED = {"gemma2", "gpt_neo", "bloom"}  # a cap on the scores, and attention of their own
CAPPED = {"gemma2"}  # it caps its logits
LENGTHS = (40, 33, 9, 9, 2, 1)


@pytest.fixture(scope="session")
def causal_tokenizer(documents: Dataset) -> PreTrainedTokenizerBase:
    return train_tokenizer(documents, "bpe", 400, causal=True)


def build(tokenizer: PreTrainedTokenizerBase, kind: str) -> PreTrainedModel:
    model = Model(type=kind, config=fields(kind, TYPES[kind]))
    return load_model(model, tokenizer, max_length=64, seed=0, auto=AutoModelForCausalLM)


def rows_for(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 300, length) for length in lengths]


def reference_loss(model: PreTrainedModel, rows: Sequence[np.ndarray]) -> Tensor:
    """Return the sum over the rows. The plain model reads each row alone."""
    total = torch.zeros(())
    for row in rows:
        ids_L = torch.from_numpy(row)
        logits_LxV = model(input_ids=ids_L[None], use_cache=False).logits[0]
        total = total + F.cross_entropy(logits_LxV[:-1].float(), ids_L[1:], reduction="sum")
    return total


@pytest.mark.parametrize("rounding", [0, 7])
@pytest.mark.parametrize("kind", TYPES)
def test_loss_and_gradients_are_those_of_each_document_read_alone(
    kind: str, rounding: int, causal_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("model_inputs", "sparse_head"):
        monkeypatch.setattr(f"minilm.models.{module}.count_padding_rows", lambda rows, device: rounding)
    model = build(causal_tokenizer, kind).train()
    plain = deepcopy(model)
    head = SparseHead(model)
    assert (head.sparse, head.padding_free) == (True, kind not in PADDED)
    assert head.fused == (kind not in CAPPED)
    rows = rows_for()
    collator = CausalLMCollator(causal_tokenizer, padded=not head.padding_free, multiple=1)
    loss = loss_sum(head, collator(rows, np.arange(len(rows)), 0))
    expected = reference_loss(plain, rows)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    assert_same_gradients(head.model, plain)


@pytest.mark.scorecard(10)
@pytest.mark.parametrize("kind", TYPES)
def test_no_logit_depends_on_a_later_token_or_on_another_document(
    kind: str, causal_tokenizer: PreTrainedTokenizerBase, figure: Callable[[str], None]
) -> None:
    head = SparseHead(build(causal_tokenizer, kind)).eval()
    rows = rows_for()
    packing = pack([len(row) for row in rows], grouped=head.padding_free)
    ids_T = torch.from_numpy(np.concatenate(rows))
    everywhere = torch.arange(len(ids_T))
    changed_row, at = 1, 20
    start = LENGTHS[0]
    with torch.no_grad():
        before = head.logits(ids_T, packing, everywhere)
        ids_T[start + at] = (ids_T[start + at] + 7) % 300 + 2
        after = head.logits(ids_T, packing, everywhere)
    differs = (before - after).abs().max(dim=-1).values > 1e-6
    assert differs[start + at]
    allowed = torch.zeros(len(ids_T), dtype=torch.bool)
    allowed[start + at : start + LENGTHS[changed_row]] = True
    assert not (differs & ~allowed).any()
    figure(f"{len(TYPES)} causal families: a changed token changes no logit before it and none of another document")


@pytest.mark.parametrize("padded", [False, True])
def test_every_token_but_the_first_of_each_document_is_a_target_once(
    padded: bool, causal_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = rows_for()
    batch = CausalLMCollator(causal_tokenizer, padded=padded, multiple=1)(rows, np.arange(len(rows)), 0)
    assert batch.input_ids_T.tolist() == np.concatenate(rows).tolist()
    assert batch.target_ids_N.tolist() == [int(i) for row in rows for i in row[1:]]
    before = [int(i) for row in rows for i in row[:-1]]
    assert batch.input_ids_T[batch.target_index_N].tolist() == before
    assert CausalLMCollator(causal_tokenizer, padded=False, multiple=1)([], np.zeros(0, np.int64), 0).target_count == 0


@pytest.mark.parametrize("layout", ["documents", "blocks"])
@pytest.mark.parametrize("max_length", [9, 64])
def test_each_document_ends_with_the_end_of_text_wherever_it_is_cut_and_padding_hides_none(
    layout: str, max_length: int, documents: Dataset, causal_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert causal_tokenizer.pad_token_id == causal_tokenizer.eos_token_id
    end = causal_tokenizer.eos_token_id
    examples = encode(documents, causal_tokenizer, max_length=max_length, layout=layout, causal=True)
    joined = [id for text in documents["text"] for id in (*causal_tokenizer(text)["input_ids"], end)]
    rows = [examples[i] for i in range(len(examples))]
    assert [int(id) for row in rows for id in row] == joined
    assert max(map(len, rows)) <= max_length
    assert examples.count_ids(len(causal_tokenizer))[end] == len(documents)
    batch = build_objective(CausalLM()).collator(causal_tokenizer, NO_EXAMPLES, seed=0, padded=False, multiple=1)(
        rows, np.arange(len(rows)), 0
    )
    ends = sum(row[1:].tolist().count(end) for row in rows)
    assert int((batch.target_ids_N == end).sum()) == ends > 0


def test_a_tokenizer_that_begins_texts_begins_documents(tokenizer: PreTrainedTokenizerBase, documents: Dataset) -> None:
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    examples = encode(documents, tokenizer, max_length=16, layout="blocks", causal=True)
    joined = [int(id) for i in range(len(examples)) for id in examples[i]]
    plain = tokenizer([*documents["text"]], add_special_tokens=False)["input_ids"]
    assert joined == [id for ids in plain for id in (first, *ids, last)]


@pytest.fixture(scope="module")
def text(documents: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "documents.txt"
    path.write_text("\n".join(documents["text"]))
    return str(path)


def config_for(text: str, folder: Path, **run: Any) -> Config:
    return Config(
        data=Data(source=text, eval_fraction=0.2),
        tokens=Tokens(vocab_size=400),
        model=Model(
            type="llama",
            config={
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "intermediate_size": 64,
                "max_position_embeddings": 128,
            },
        ),
        objective=CausalLM(),
        batch=Batch(examples=12, max_length=48),
        optim=Optim(lr=3e-3),
        run=Run(**{"max_steps": 40, "precision": "fp32", "output_dir": str(folder), **run}),
    )


@pytest.fixture(scope="module")
def trained(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "run"
    train(config_for(text, folder, samples=("The quick",)))
    return folder


def test_a_run_learns_and_plain_transformers_reads_what_it_saves(trained: Path) -> None:
    steps, evaluations = read_log(trained)
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    assert evaluations[-1]["bits_per_byte"] < evaluations[-1]["unigram_bits_per_byte"]
    model, tokenizer = load_causal_lm(trained)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.use_cache
    answer = pipeline("text-generation", model=str(trained))("The quick", max_new_tokens=5, do_sample=False)
    assert answer[0]["generated_text"].startswith("The quick")
    ids_1xL = tokenizer("The quick brown fox", return_tensors="pt")["input_ids"]
    theirs = AutoModelForCausalLM.from_pretrained(trained).eval()
    with torch.no_grad():
        assert torch.equal(model(ids_1xL).logits, theirs(ids_1xL).logits)
    card = (trained / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    assert "- The quick →" in card


def test_micro_batches_do_not_change_the_update(text: str, trained: Path, tmp_path: Path) -> None:
    config = config_for(text, tmp_path / "out")
    train(replace(config, batch=replace(config.batch, micro_tokens=64)))
    for ours, expected in zip(read_log(tmp_path / "out")[0], read_log(trained)[0], strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_the_logged_loss_is_that_of_the_plain_model(text: str, trained: Path) -> None:
    config = config_for(text, trained)
    prepared = prepare_data(config)
    tokenizer, examples = prepared.tokenizer, prepared.train
    model = load_model(config.model, tokenizer, max_length=48, seed=0, auto=AutoModelForCausalLM)
    (ids,) = Plan(examples.lengths, examples=12, micro_tokens=4096).step(0).micro_batches[0]
    rows = [examples[int(i)] for i in ids]
    expected = reference_loss(model, rows) / sum(len(row) - 1 for row in rows)
    assert read_log(trained)[0][0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_that_sees_later_tokens_is_refused_before_it_is_trained(text: str, tmp_path: Path) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = config_for(text, tmp_path / "out", max_steps=2)
    with pytest.raises(ValueError, match=r"sees the tokens after .* --model.config.is-decoder True"):
        train(replace(config, model=Model(type="bert", config=size)))
    train(
        replace(
            config,
            model=Model(type="bert", config={**size, "is_decoder": True}),
            run=replace(config.run, overwrite=True),
        )
    )
