"""Heads for tags, questions and choices give the losses and gradients of transformers, for rows of any length."""

import logging
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from minilm.data.packing import Packing, pack
from minilm.models.head import Head, freeze_unused
from minilm.models.row_head import RowHead
from minilm.models.sparse_head import SparseHead
from tests.reference import assert_same_gradients, pad_rows
from tests.tiny import tiny_config

LENGTHS = (30, 17, 17, 12, 5, 2)
LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2}
# Whether the head packs rows without padding, and whether it runs on the targets alone, by the type of the model.
TAGGERS = {"bert": True, "roberta": True, "distilbert": True, "modernbert": True, "mpnet": False, "llama": True}
ANSWERERS = {**TAGGERS, "bart": False}
CHOOSERS = {"bert": True, "roberta": True, "distilbert": True, "modernbert": True, "mpnet": False, "fnet": False}


def build(kind: str, auto: Any, tokenizer: PreTrainedTokenizerBase, **fields: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config(kind, tokenizer)
    for name, value in fields.items():
        setattr(config, name, value)
    model: PreTrainedModel = auto.from_config(config).train()
    for module in model.modules():
        # The head of Llama's tagger has dropout that no field of its configuration names.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def draw_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    return torch.randint(5, len(tokenizer), (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))


def packing_for(head: Head) -> Packing:
    return pack(LENGTHS, grouped=head.padding_free)


@pytest.mark.parametrize("kind", TAGGERS)
def test_tags_are_learned_as_by_transformers(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = build(kind, AutoModelForTokenClassification, tokenizer, num_labels=5)
    plain, head, ids_T = deepcopy(model), SparseHead(model), draw_ids(tokenizer)
    assert (head.padding_free, head.sparse, head.fused) == (TAGGERS[kind], True, False)
    labels_T = ids_T % 5
    labels_T[::3] = -100
    index_N = (labels_T >= 0).nonzero()[:, 0]
    losses_N = head(ids_T, packing_for(head), index_N, labels_T[index_N])
    ids_RxL, mask_RxL = pad_rows(ids_T, LENGTHS, tokenizer.pad_token_id)
    expected = plain(input_ids=ids_RxL, attention_mask=mask_RxL, labels=pad_rows(labels_T, LENGTHS, -100)[0]).loss
    assert losses_N.shape == index_N.shape
    torch.testing.assert_close(losses_N.mean(), expected, rtol=1e-5, atol=0)
    losses_N.mean().backward()
    expected.backward()
    assert_same_gradients(head.model, plain)


def span_losses(logits_Tx2: Tensor, positions_Rx2: Tensor, packing: Packing) -> Tensor:
    """Return the mean of the cross entropies of an answer's start and end, for each row."""
    rows = zip(logits_Tx2.split(list(packing.lengths)), positions_Rx2, strict=True)
    return torch.stack([F.cross_entropy(logits_Lx2.T, at_2) for logits_Lx2, at_2 in rows])


@pytest.mark.parametrize("kind", ANSWERERS)
def test_answers_are_learned_as_by_transformers_from_each_row_alone(
    kind: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build(kind, AutoModelForQuestionAnswering, tokenizer)
    plain, head, ids_T = deepcopy(model), SparseHead(model, loss=span_losses), draw_ids(tokenizer)
    assert head.padding_free == ANSWERERS[kind]
    assert head.sparse
    freeze_unused(head)
    every_T, positions_Rx2 = torch.arange(len(ids_T)), torch.tensor([[n // 3, n - 1] for n in LENGTHS])
    losses_R = head(ids_T, packing_for(head), every_T, positions_Rx2)
    expected_R = [
        plain(input_ids=row[None], start_positions=start[None], end_positions=end[None]).loss
        for row, (start, end) in zip(ids_T.split(LENGTHS), positions_Rx2, strict=True)
    ]
    torch.testing.assert_close(losses_R, torch.stack(expected_R), rtol=1e-5, atol=0)
    losses_R.sum().backward()
    torch.stack(expected_R).sum().backward()
    assert_same_gradients(head.model, plain)


def choice_losses(logits_Rx1: Tensor, chosen_E: Tensor, packing: Packing) -> Tensor:
    """Return the cross entropy of the right one of two choices, for each question."""
    return F.cross_entropy(logits_Rx1.view(-1, 2), chosen_E, reduction="none")


@pytest.mark.parametrize("kind", CHOOSERS)
def test_choices_are_learned_as_by_transformers(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = build(kind, AutoModelForMultipleChoice, tokenizer)
    plain, head, ids_T = deepcopy(model), RowHead(model, loss=choice_losses), draw_ids(tokenizer)
    assert (head.padding_free, head.needs_equal_lengths) == (CHOOSERS[kind], kind == "fnet")
    freeze_unused(head)
    packing, chosen_E = packing_for(head), torch.tensor([1, 0, 1])
    first_R = (packing.position_T == 0).nonzero()[:, 0]
    losses_E = head(ids_T, packing, first_R, chosen_E)
    if kind == "fnet":
        logits_R = torch.cat([plain(row[None, None]).logits[0] for row in ids_T.split(LENGTHS)])
        expected = F.cross_entropy(logits_R.view(3, 2), chosen_E)
    else:
        ids_Ex2xL, mask_Ex2xL = (x_RxL.view(3, 2, -1) for x_RxL in pad_rows(ids_T, LENGTHS, tokenizer.pad_token_id))
        expected = plain(input_ids=ids_Ex2xL, attention_mask=mask_Ex2xL, labels=chosen_E).loss
    torch.testing.assert_close(losses_E.mean(), expected, rtol=1e-5, atol=0)
    losses_E.mean().backward()
    expected.backward()
    assert_same_gradients(head.model, plain)


def test_a_packed_choice_never_makes_a_mask_of_all_pairs_of_tokens(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, ids_T = RowHead(build("bert", AutoModelForMultipleChoice, tokenizer), loss=choice_losses), draw_ids(tokenizer)
    masks: list[Tensor] = []
    original = head.model.bert.encoder.forward

    def look(hidden: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Any:
        if attention_mask is not None:
            masks.append(attention_mask)
        return original(hidden, attention_mask=attention_mask, **more)

    monkeypatch.setattr(head.model.bert.encoder, "forward", look)
    packing = packing_for(head)
    head(ids_T, packing, (packing.position_T == 0).nonzero()[:, 0])
    assert [mask.numel() for mask in masks] == [1]


@pytest.mark.parametrize(
    ("auto", "make", "outputs"),
    [
        (AutoModelForTokenClassification, SparseHead, 2),
        (AutoModelForQuestionAnswering, SparseHead, 2),
        (AutoModelForMultipleChoice, lambda model: RowHead(model, loss=choice_losses), 1),
        (AutoModelForMaskedLM, SparseHead, None),
    ],
)
def test_without_targets_a_head_returns_its_outputs_in_float32(
    auto: Any, make: Callable[[PreTrainedModel], Head], outputs: int | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    head, ids_T = make(build("bert", auto, tokenizer)), draw_ids(tokenizer)
    packing = packing_for(head)
    first_R = (packing.position_T == 0).nonzero()[:, 0]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert head.logits(ids_T, packing, first_R).dtype == torch.bfloat16
        outputs_NxC = head(ids_T, packing, first_R)
    assert outputs_NxC.dtype == torch.float32
    assert outputs_NxC.shape == (len(LENGTHS), outputs or len(tokenizer))


def test_a_loss_of_ones_own_takes_the_logits_of_the_targets(tokenizer: PreTrainedTokenizerBase) -> None:
    model, ids_T = build("bert", AutoModelForMaskedLM, tokenizer), draw_ids(tokenizer)
    given: list[Any] = []

    def squares(*arguments: Any) -> Tensor:
        given.extend(arguments)
        losses: Tensor = arguments[0].square().sum(1)
        return losses

    usual, head = SparseHead(deepcopy(model)), SparseHead(model, loss=squares)
    assert (usual.fused, head.fused) == (True, False)
    packing, index_N = packing_for(head), torch.tensor([3, 40, 60])
    losses_N = head(ids_T, packing, index_N, ids_T[index_N])
    torch.testing.assert_close(given[0], usual.logits(ids_T, packing, index_N))
    assert torch.equal(given[1], ids_T[index_N])
    assert given[2] is packing
    assert torch.equal(losses_N, given[0].square().sum(1))


def test_a_small_head_on_all_tokens_is_worth_no_warning(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="minilm"):
        head = SparseHead(build("fnet", AutoModelForTokenClassification, tokenizer))
        assert not caplog.messages
        SparseHead(build("fnet", AutoModelForMaskedLM, tokenizer))
    assert head.summary == "small head on all tokens (padding changes its logits)"
    assert [message.split(":")[0] for message in caplog.messages] == [
        "FNetForMaskedLM runs its head on all tokens except for its last product"
    ]
