"""Checkpoints from the field: unusual configurations and trained weights give the plain model's losses and gradients.

The head of a model is built while its weights are new, as `train` does. Then the weights are made like trained ones.
A step of rows of several lengths is compared with what the plain model makes of each row alone.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from minilm.head import Head
from minilm.objectives import objective_of
from minilm.tokens import Prepared
from tests.matrix import HEADS, LABELS, gradient_error, reference, tokenizer_for, update
from tests.reference import NO_EXAMPLES
from tests.tiny import tiny_config

pytestmark = pytest.mark.scorecard(31)

LONGEST = 200
LENGTHS: dict[str, tuple[int, ...]] = {
    "odd": (151, 77, 77, 33, 5, 1),
    "windows": (96, 96, 64, 32, 16, 16),
    "uneven": (160, 149, 31, 30, 2),
    "many": (*(150,) * 3, *(33,) * 4, *(7,) * 4),
}


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A checkpoint: its type, its head, and what its configuration says that the default does not."""

    kind: str
    head: str = "causal"
    changed: dict[str, Any] = field(default_factory=dict)
    scale: float = 4.0
    """How many times the matrices grow in training."""


def build(situation: Situation, *, seed: int = 0) -> nn.Module:
    """The plain model, with new weights."""
    tokenizer = tokenizer_for(situation.head, situation.kind)
    torch.manual_seed(seed)
    config = tiny_config(situation.kind, tokenizer)
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, 2 * LONGEST)
    for name, value in situation.changed.items():
        setattr(text, name, value)
    if situation.head == "classification":
        for name, value in LABELS.fields().items():
            setattr(config, name, value)
        text.pad_token_id = config.pad_token_id = tokenizer.pad_token_id
    return objective_of(HEADS[situation.head].settings).auto.from_config(config)


def head_of(situation: Situation, network: Any) -> Head:
    """minilm's head of it."""
    tokenizer = tokenizer_for(situation.head, situation.kind)
    prepared = Prepared(tokenizer=tokenizer, train=NO_EXAMPLES, eval=NO_EXAMPLES, labels=LABELS)
    return objective_of(HEADS[situation.head].settings).head(network, prepared)


def train_weights(network: nn.Module, scale: float) -> None:
    """Weights that look trained: larger matrices, and no vector of zeros or ones."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            constant = bool((parameter == parameter.flatten()[0]).all())
            parameter.mul_(scale if parameter.ndim > 1 else 1.0)
            parameter.add_(0.2 * torch.randn_like(parameter) * constant)


def differences(situation: Situation, lengths: tuple[int, ...]) -> tuple[float, float]:
    """The relative differences of loss and gradients from the plain model's."""
    network = build(situation).train()
    plain = deepcopy(network)
    head = head_of(situation, network).train()
    for model in (network, plain):
        train_weights(model, situation.scale)
    tokenizer, kind = tokenizer_for(situation.head, situation.kind), HEADS[situation.head]
    rows = [np.random.default_rng(n).integers(5, len(tokenizer), length) for n, length in enumerate(lengths)]
    if situation.head == "classification" and tokenizer.sep_token_id is not None:
        for row in rows:
            row[-1] = tokenizer.sep_token_id
    ids, examples = np.arange(len(rows)), replace(NO_EXAMPLES, labels=np.arange(len(rows)) % 3)
    layout = {"padded": not head.padding_free, "multiple": 1}
    batch = objective_of(kind.settings).collator(tokenizer, examples, seed=0, **layout)(rows, ids, 0)
    expected, gradients = reference(plain, kind.examples(batch, lengths))
    loss, ours = update(head, [batch])
    return abs(loss - expected) / expected, gradient_error(ours, gradients)


CAP = {"final_logit_softcapping": 300.0}
FULL = {"attention_chunk_size": None, "layer_types": ["full_attention"] * 4}
SITUATIONS = {
    "Longformer with a window of 32": Situation(
        kind="longformer", head="masked", changed={"attention_window": [32] * 2}
    ),
    "Longformer with a window of 8": Situation(kind="longformer", head="masked", changed={"attention_window": [8] * 2}),
    "Longformer with windows of two sizes": Situation(
        kind="longformer", head="masked", changed={"attention_window": [16, 64]}
    ),
    "Gemma 2 with a final cap that new logits do not reach": Situation(kind="gemma2", changed=CAP, scale=40.0),
    "Gemma 3 with such a cap": Situation(kind="gemma3_text", changed=CAP, scale=40.0),
    "nanochat with such a cap": Situation(kind="nanochat", changed=CAP, scale=40.0),
    "xLSTM with such a cap": Situation(kind="xlstm", changed={"output_logit_soft_cap": 300.0}, scale=40.0),
    "Gemma 2 without a final cap": Situation(kind="gemma2", changed={"final_logit_softcapping": None}),
    "Llama 4 without chunks, whose attention counts tokens": Situation(
        kind="llama4_text", changed={**FULL, "floor_scale": 16}
    ),
    "Llama 4 without chunks, where the count matters late": Situation(
        kind="llama4_text", changed={**FULL, "floor_scale": 512}
    ),
    "ESM that scales rows by their masks": Situation(kind="esm", head="masked", changed={"token_dropout": True}),
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_losses_and_gradients_are_those_of_the_plain_model(situation: str, lengths: str) -> None:
    loss, gradient = differences(SITUATIONS[situation], LENGTHS[lengths])
    assert loss <= 1e-5
    assert gradient <= 1e-3
