"""What packed batches are compared with: rows padded one by one, and a plain forward of the whole model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from minilm.config import Model
from minilm.data.corpus import Examples
from minilm.models.loading import load_model


class ScaledLosses:
    """The losses of some targets times a factor. As with those of a fused head, only the sum has a gradient."""

    def __init__(self, losses_N: Tensor, factor: float) -> None:
        self._losses_N, self._factor = losses_N, factor

    def sum(self) -> Tensor:
        return self._losses_N.sum() * self._factor

    def detach(self) -> Tensor:
        return self._losses_N.detach() * self._factor


NO_EXAMPLES = Examples(
    **dict.fromkeys(("ids", "start", "stop", "prefix", "suffix"), np.zeros(0, np.int64)),
)
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


def fields(kind: str, own: dict[str, Any] | None = None) -> dict[str, Any]:
    """The configuration of a tiny model of this type without dropout; `own` are fields that only this type has."""
    default = AutoConfig.for_model(kind)
    asked = {**SMALL, **(TYPES[kind] if own is None else own)}
    asked = {name: value for name, value in asked.items() if name in default.to_dict() or name in default.attribute_map}
    return {**asked, **{name: 0.0 for name in default.to_dict() if "drop" in name}}


def build(tokenizer: PreTrainedTokenizerBase, kind: str = "bert", seed: int = 0, **changed: Any) -> PreTrainedModel:
    model = Model(type=kind, config={**fields(kind), **changed})
    return load_model(model, tokenizer, max_length=32, seed=seed)


def pad_rows(x_T: Tensor, lengths: Sequence[int], value: int) -> tuple[Tensor, Tensor]:
    """The rows of a flat batch as R x L, padded with `value`, and the attention mask that says where they are."""
    padded_RxL = torch.full((len(lengths), max(lengths)), value)
    mask_RxL = torch.zeros_like(padded_RxL)
    for row, own in enumerate(x_T.split(list(lengths))):
        padded_RxL[row, : len(own)] = own
        mask_RxL[row, : len(own)] = 1
    return padded_RxL, mask_RxL


def assert_same_gradients(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Each gradient that the plain model has is the model's, but for rounding."""
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    largest = max(float(gradient.norm()) for gradient in gradients.values() if gradient is not None)
    for name, parameter in model.named_parameters():
        if gradients[name] is not None:
            error = (parameter.grad - gradients[name]).norm()
            assert error <= 1e-5 * gradients[name].norm() + 1e-6 * largest, name


def full_logits(model: PreTrainedModel, input_ids_T: Tensor, lengths: Sequence[int]) -> Tensor:
    """Logits of every token of a flat batch, T x V, from one padded forward of a plain model."""
    ids_RxL, mask_RxL = pad_rows(input_ids_T, lengths, model.config.pad_token_id or 0)
    logits_RxLxV = model(input_ids=ids_RxL, attention_mask=mask_RxL).logits
    return torch.cat([logits_LxV[:length] for logits_LxV, length in zip(logits_RxLxV, lengths, strict=True)])


def attended_rows(states: Sequence[Tensor], lengths: Sequence[int], near: int, causal: bool, scaling: float) -> Tensor:
    """Attention of each row by itself, from queries, keys and values, T x A x D each; no further away than `near`."""
    rows = []
    for query, key, value in zip(*(x.transpose(0, 1).split(list(lengths), dim=1) for x in states), strict=True):
        at = torch.arange(query.shape[1], device=query.device)
        before = at[:, None] - at
        seen = (before <= near) & ((before >= 0) if causal else (before >= -near))
        scores = (query @ key.transpose(1, 2) * scaling).masked_fill(~seen, -torch.inf)
        rows.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(rows)
