"""Heads and runs of unusual architectures."""

import copy
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

import minilm.models.attention
from minilm.config import Model
from minilm.data.packing import pack
from minilm.models.attention import packed_attention
from minilm.models.head import freeze_unused
from minilm.models.loading import load_model
from minilm.models.sparse_head import SparseHead
from minilm.models.temporary_changes import evaluation_mode
from tests.tiny import tiny_config


def tiny(kind: str, auto: type, tokenizer: PreTrainedTokenizerBase, **fields: object) -> PreTrainedModel:
    config = tiny_config(kind, tokenizer)
    for name, value in fields.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return auto.from_config(config).eval()


def test_rwkv_keeps_its_weights_over_an_evaluation(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny("rwkv", AutoModelForCausalLM, tokenizer, num_hidden_layers=8).train()
    before = copy.deepcopy(model.state_dict())
    with evaluation_mode(model):
        model(torch.tensor([[7, 8, 9]]), use_cache=False)
        assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_chunks_of_attention_are_kept_though_no_row_of_the_trial_is_as_long(tokenizer: PreTrainedTokenizerBase) -> None:
    long = {"attention_chunk_size": 200, "max_position_embeddings": 1024}
    model = tiny("llama4_text", AutoModelForCausalLM, tokenizer, **long)
    plain, head, lengths = copy.deepcopy(model), SparseHead(model), (520, 150)
    ids_T = torch.randint(5, len(tokenizer), (sum(lengths),), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = head.logits(ids_T, pack(lengths, grouped=head.padding_free), torch.arange(len(ids_T)))
        expected = torch.cat([plain(row[None], use_cache=False).logits[0] for row in ids_T.split(lengths)])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_big_bird_attends_in_full_from_the_start_and_says_so(
    tokenizer: PreTrainedTokenizerBase, tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny("big_bird", AutoModelForMaskedLM, tokenizer, max_position_embeddings=1024).save_pretrained(tmp_path / "sparse")
    with caplog.at_level(logging.WARNING, logger="minilm"):
        model = load_model(Model(name=str(tmp_path / "sparse")), tokenizer, max_length=1024, seed=0)
    assert [record.message for record in caplog.records if "original_full" in record.message]
    head = SparseHead(model.eval())
    ids_T = torch.randint(5, len(tokenizer), (1024,), generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "full")
    with torch.no_grad():
        logits = head.logits(ids_T, pack([1024], grouped=head.padding_free), torch.arange(1024))
        saved = AutoModelForMaskedLM.from_pretrained(tmp_path / "full").eval()(ids_T[None]).logits[0]
    torch.testing.assert_close(logits, saved, rtol=0, atol=1e-5 * float(saved.abs().max()))


def test_mobilebert_sees_padding_once_its_embedding_is_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    assert SparseHead(tiny("mobilebert", AutoModelForMaskedLM, tokenizer)).needs_equal_lengths
    assert not SparseHead(tiny("mpnet", AutoModelForMaskedLM, tokenizer)).needs_equal_lengths


@pytest.mark.parametrize("kind", ["opt", "xglm"])
def test_a_layer_that_is_dropped_at_random_is_not_frozen(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    head = SparseHead(tiny(kind, AutoModelForCausalLM, tokenizer, layerdrop=1.0)).eval()
    freeze_unused(head)
    assert all(parameter.requires_grad for parameter in head.model.model.parameters())
    assert not head.training
    assert [module.layerdrop for module in head.modules() if hasattr(module, "layerdrop")] == [1.0]


def test_values_narrower_than_queries_do_not_go_to_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm.models.attention, "_flash_attention_fits", lambda query, dropout: True)
    monkeypatch.setattr(minilm.models.attention, "_attend_at_once", None)
    states = [torch.randn(1, 2, 9, width) for width in (16, 16, 8)]
    packing = pack([5, 4])
    attended, _ = packed_attention(torch.nn.Module(), *states, None, packing=packing, is_causal=False)
    assert attended.shape == (1, 9, 2, 8)
