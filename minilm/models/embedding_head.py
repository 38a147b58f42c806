"""The head of a model without logits, which gives embeddings: its hidden states, at chosen tokens or pooled by row.

Axes: T tokens of a batch, R rows, N results, L length of a row, H hidden size.
"""

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minilm.data.packing import Packing
from minilm.models.head import Loss
from minilm.models.sparse_head import SparseHead
from minilm.models.temporary_changes import evaluation_mode

Pooling = Literal["mean", "first", "last", "tokens"]
"""Where a row's embedding comes from: the mean of its hidden states, that of its first or last token, or, for
`tokens`, one embedding for each target."""

_ROW_TOKENS = 6  # tokens of the row on which a model is tried


class EmbeddingHead(SparseHead):
    """A model of `AutoModel` that gives the hidden states of its last layer, and a loss of them.

    It takes the shortcuts `padding_free` and `short` of `SparseHead`. Padding never enters a mean. Raises ValueError
    for a model that does not give a hidden state for each token of a row, such as Perceiver.
    """

    def __init__(self, model: PreTrainedModel, *, pooling: Pooling, loss: Loss) -> None:
        _check_hidden_states(model)
        super().__init__(model, loss=loss)
        self.pooling = pooling

    @property
    def summary(self) -> str:
        layout = (
            "without padding"
            if self.padding_free
            else "rows of one length at a time"
            if self.needs_equal_lengths
            else "padded rows"
        )
        of = "hidden states" if self.pooling == "tokens" else f"embeddings by {self.pooling} pooling"
        return f"{of}, {layout}"

    def logits(
        self, input_ids_T: Tensor, packing: Packing, target_index_N: Tensor, type_ids_T: Tensor | None = None
    ) -> Tensor:
        """Return the embeddings, N x H: of the first N rows, or of the tokens at `target_index_N` for `tokens`."""
        if self.pooling == "tokens":
            return super().logits(input_ids_T, packing, target_index_N, type_ids_T)
        bounds_R1 = packing.bounds_R1
        if self.pooling == "first":
            index = bounds_R1[:-1].long()
        elif self.pooling == "last":
            index = bounds_R1[1:].long() - 1
        else:
            index = torch.arange(len(input_ids_T), device=input_ids_T.device)
        hidden = super().logits(input_ids_T, packing, index, type_ids_T)
        if self.pooling == "mean":
            # `unsafe` leaves out a check of the bounds, which would wait for a GPU.
            hidden = torch.segment_reduce(hidden.float(), "mean", offsets=bounds_R1, unsafe=True)
        return hidden[: len(target_index_N)]

    def _try_sparse(self, expected_NxH: Tensor) -> str:
        """Use `sparse`: a model without a head has nothing to compute at the targets alone. Return an empty string."""
        self.sparse = True
        return ""


def _check_hidden_states(model: PreTrainedModel) -> None:
    """Raise ValueError if the model does not give one hidden state for each token of a row of ids."""
    ids_1xL = torch.full((1, _ROW_TOKENS), 5, device=model.device)
    with evaluation_mode(model):
        hidden = getattr(model(input_ids=ids_1xL), "last_hidden_state", None)
    if hidden is None or hidden.shape[:2] != ids_1xL.shape:
        raise ValueError(
            f"{type(model).__name__} does not give a hidden state for each token of a text: take another model"
        )
