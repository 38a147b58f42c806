"""What packed batches are compared with: rows padded one by one, and a plain forward of the whole model."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


def pad_rows(x_T: Tensor, lengths: Sequence[int], value: int) -> tuple[Tensor, Tensor]:
    """The rows of a flat batch as R x L, padded with `value`, and the attention mask that says where they are."""
    padded_RxL = torch.full((len(lengths), max(lengths)), value)
    mask_RxL = torch.zeros_like(padded_RxL)
    for row, own in enumerate(x_T.split(list(lengths))):
        padded_RxL[row, : len(own)] = own
        mask_RxL[row, : len(own)] = 1
    return padded_RxL, mask_RxL


def full_logits(model: PreTrainedModel, input_ids_T: Tensor, lengths: Sequence[int]) -> Tensor:
    """Logits of every token of a flat batch, T x V, from one padded forward of a plain model."""
    ids_RxL, mask_RxL = pad_rows(input_ids_T, lengths, model.config.pad_token_id or 0)
    logits_RxLxV = model(input_ids=ids_RxL, attention_mask=mask_RxL).logits
    return torch.cat([logits_LxV[:length] for logits_LxV, length in zip(logits_RxLxV, lengths, strict=True)])
