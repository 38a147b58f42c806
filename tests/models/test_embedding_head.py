"""Embeddings are the pooled hidden states of plain transformers, for rows of any length, packed or padded."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from minilm.data.packing import Packing, pack
from minilm.models.embedding_head import EmbeddingHead
from minilm.models.head import freeze_unused
from tests.models.test_heads import LENGTHS, build, draw_ids
from tests.reference import assert_same_gradients, pad_rows

# Whether the model packs rows without padding, by its type.
KINDS = {"bert": True, "roberta": True, "modernbert": True, "distilbert": True, "mpnet": False, "fnet": False}
DECODERS = {"llama": True, "qwen2": True, "gpt2": True}
PLACES = torch.tensor([0, 3, 31, 32, 47, 82])
POOLINGS = ("mean", "first", "last", "tokens")


def weighted_sums(embeddings_NxH: Tensor, weight_NxH: Tensor, packing: Packing) -> Tensor:
    """Return a loss with another gradient for each number of an embedding, in place of one that compares them."""
    return (embeddings_NxH * weight_NxH).sum(1)


def plain_embeddings(plain: PreTrainedModel, ids_T: Tensor, pooling: str) -> Tensor:
    """Return the embeddings of rows that the plain model reads one by one."""
    rows = [plain(input_ids=row_L[None]).last_hidden_state[0] for row_L in ids_T.split(LENGTHS)]
    if pooling == "tokens":
        return torch.cat(rows)[PLACES]
    return torch.stack(
        [{"mean": row_LxH.mean(0), "first": row_LxH[0], "last": row_LxH[-1]}[pooling] for row_LxH in rows]
    )


@pytest.mark.parametrize("more", [0, 7])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", [*KINDS, *DECODERS])
def test_embeddings_and_gradients_are_those_of_each_row_alone(
    kind: str,
    pooling: Any,
    padded: bool,
    more: int,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("model_inputs", "sparse_head"):
        monkeypatch.setattr(f"minilm.models.{module}.count_padding_rows", lambda rows, device: more)
    model, ids_T = build(kind, AutoModel, tokenizer), draw_ids(tokenizer)
    plain = deepcopy(model)
    model.attention_is_chosen = padded  # type: ignore[assignment]
    head = EmbeddingHead(model, pooling=pooling, loss=weighted_sums)
    assert head.padding_free == ({**KINDS, **DECODERS}[kind] and not padded)
    assert head.needs_equal_lengths == (kind == "fnet")
    freeze_unused(head)
    packing = pack(LENGTHS, grouped=head.padding_free)
    index_N = PLACES if pooling == "tokens" else (packing.position_T == 0).nonzero()[:, 0]
    expected_NxH = plain_embeddings(plain, ids_T, pooling)
    embeddings_NxH = head(ids_T, packing, index_N)
    torch.testing.assert_close(embeddings_NxH, expected_NxH, rtol=0, atol=2e-6 * expected_NxH.abs().max().item())
    weight_NxH = torch.randn(expected_NxH.shape, generator=torch.Generator().manual_seed(1))
    head(ids_T, packing, index_N, weight_NxH).sum().backward()
    (expected_NxH * weight_NxH).sum().backward()
    assert_same_gradients(head.model, plain)


@pytest.mark.parametrize("kind", ["bert", "modernbert", "distilbert"])
@pytest.mark.parametrize("pooling", ["first", "last", "tokens"])
def test_only_pooled_tokens_run_through_the_end_of_the_last_layer(
    kind: str, pooling: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    head = EmbeddingHead(build(kind, AutoModel, tokenizer), pooling=pooling, loss=weighted_sums)
    assert head.short
    ids_T = draw_ids(tokenizer)
    sizes = list[int]()
    part = {"bert": "intermediate", "modernbert": "mlp", "distilbert": "ffn"}[kind]
    for layer in head.layers:
        layer.get_submodule(part).register_forward_pre_hook(lambda m, inputs: sizes.append(inputs[0].shape[1]))
    packing = pack(LENGTHS)
    head(ids_T, packing, PLACES if pooling == "tokens" else (packing.position_T == 0).nonzero()[:, 0])
    assert sizes[0] >= len(ids_T)
    assert sizes[-1] < sizes[0] / 2


def test_a_mean_in_half_precision_is_taken_in_float32(tokenizer: PreTrainedTokenizerBase) -> None:
    head = EmbeddingHead(build("llama", AutoModel, tokenizer).bfloat16().eval(), pooling="mean", loss=weighted_sums)
    tokens = EmbeddingHead(head.model, pooling="tokens", loss=weighted_sums)
    ids_T, packing = draw_ids(tokenizer), pack(LENGTHS, grouped=head.padding_free)
    with torch.no_grad():
        hidden_TxH = tokens.logits(ids_T, packing, torch.arange(len(ids_T)))
        embeddings_RxH = head.logits(ids_T, packing, (packing.position_T == 0).nonzero()[:, 0])
    assert hidden_TxH.dtype == torch.bfloat16
    expected_RxH = torch.stack([row_LxH.double().mean(0) for row_LxH in hidden_TxH.split(LENGTHS)])
    torch.testing.assert_close(embeddings_RxH.double(), expected_RxH, rtol=0, atol=1e-6)


def test_a_batch_without_rows_has_no_embeddings_and_every_gradient(tokenizer: PreTrainedTokenizerBase) -> None:
    for pooling in POOLINGS:
        head = EmbeddingHead(build("bert", AutoModel, tokenizer), pooling=pooling, loss=weighted_sums)
        freeze_unused(head)
        nothing_N = torch.zeros(0, dtype=torch.int64)
        losses_N = head(torch.zeros(1, dtype=torch.int64), pack([1]), nothing_N, torch.zeros(0, 32))
        assert losses_N.shape == (0,)
        losses_N.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in head.parameters() if p.requires_grad)


def test_a_pooler_is_frozen_and_nothing_else(tokenizer: PreTrainedTokenizerBase) -> None:
    for pooling in POOLINGS:
        head = EmbeddingHead(build("bert", AutoModel, tokenizer), pooling=pooling, loss=weighted_sums)
        freeze_unused(head)
        frozen = {name for name, p in head.model.named_parameters() if not p.requires_grad}
        assert frozen == {"pooler.dense.weight", "pooler.dense.bias"}


def test_padding_never_enters_a_mean(tokenizer: PreTrainedTokenizerBase) -> None:
    model = build("mpnet", AutoModel, tokenizer).eval()
    head, ids_T = EmbeddingHead(model, pooling="mean", loss=weighted_sums), draw_ids(tokenizer)
    ids_RxL, mask_RxL = pad_rows(ids_T, LENGTHS, tokenizer.pad_token_id)
    with torch.no_grad():
        hidden_RxLxH = model(input_ids=ids_RxL, attention_mask=mask_RxL).last_hidden_state
        expected_RxH = (hidden_RxLxH * mask_RxL[..., None]).sum(1) / mask_RxL.sum(1, keepdim=True)
        packing = pack(LENGTHS, grouped=False, multiple=40)
        embeddings_RxH = head(ids_T, packing, (packing.position_T == 0).nonzero()[:, 0])
    torch.testing.assert_close(embeddings_RxH, expected_RxH, rtol=0, atol=1e-6)


def test_the_summary_says_pooling_and_layout(tokenizer: PreTrainedTokenizerBase) -> None:
    def summary(kind: str, pooling: Any) -> str:
        return EmbeddingHead(build(kind, AutoModel, tokenizer), pooling=pooling, loss=weighted_sums).summary

    assert summary("bert", "mean") == "embeddings by mean pooling, without padding"
    assert summary("mpnet", "last") == "embeddings by last pooling, padded rows"
    assert summary("fnet", "tokens") == "hidden states, rows of one length at a time"


def test_a_model_without_a_hidden_state_for_each_token_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    model = build("bert", AutoModel, tokenizer)
    model.register_forward_hook(lambda module, inputs, output: output[0][:, ::2])
    with pytest.raises(ValueError, match=r"^BertModel does not give a hidden state for each token of a text: take"):
        EmbeddingHead(model, pooling="mean", loss=weighted_sums)
