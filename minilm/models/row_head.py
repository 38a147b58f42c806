"""The head of a model with one row of logits for each row of a batch, such as a sequence classifier.

Axes: T tokens of the micro-batch, R its rows, N rows with a result (as many as R; 0 in an empty micro-batch, which has
one row), H hidden size, C logits of a row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm.data.packing import Packing
from minilm.models.head import Head, Loss
from minilm.models.layers import AFTER_ATTENTION, uses_gradient_checkpointing
from minilm.models.model_inputs import is_for_multiple_choice
from minilm.models.temporary_changes import evaluation_mode, randomize_constant_parameters


class RowHead(Head):
    """A model with one row of logits for each row of a micro-batch, and a loss of them.

    A model for multiple choice gives one logit for each row, which holds a question and one of its choices, R x 1.

    The head takes two shortcuts if a trial shows that they do not change a logit. `padding_free` joins rows without
    padding, for models that read a row's logits at its first token. `short` runs only these first tokens through the
    part of the last layer that follows attention.
    """

    def __init__(self, model: PreTrainedModel, *, loss: Loss) -> None:
        super().__init__(model, loss)
        self.short = False
        # The places of the rows' first tokens, for the hooks. It is set only during a forward without padding.
        self._first_R: Tensor | None = None
        if is_for_multiple_choice(model):
            model.base_model.register_forward_pre_hook(self._restore_axes, with_kwargs=True)
        with evaluation_mode(model), randomize_constant_parameters(model):
            expected_RxC = self._try_padded()
            if not self.needs_equal_lengths:
                self._try_first_tokens(expected_RxC)
            self.misread_ids = self._find_misread_ids()

    @property
    def summary(self) -> str:
        if self.padding_free:
            return "logits from first tokens, without padding"
        return (
            "rows of one length at a time, since padding changes its logits"
            if self.needs_equal_lengths
            else "padded rows"
        )

    def logits(
        self, input_ids_T: Tensor, packing: Packing, target_index_N: Tensor, type_ids_T: Tensor | None = None
    ) -> Tensor:
        """Return the logits, N x C, of the first N rows, whose first tokens are at `target_index_N`."""
        if self.needs_equal_lengths:
            runs = self._run_equal_lengths(input_ids_T, packing, type_ids_T)
            return torch.cat([logits_RxC for _, logits_RxC in runs])[: len(target_index_N)]
        first_R = target_index_N if len(target_index_N) else target_index_N.new_zeros(1)
        self._first_R = first_R if self.padding_free else None
        try:
            logits_RxC = self._run_model(self._make_inputs(input_ids_T, packing, type_ids_T))
        finally:
            self._first_R = None
        return logits_RxC[: len(target_index_N)]

    def _trial_logits(self, input_ids_T: Tensor, lengths: Sequence[int]) -> Tensor:
        packing = self._pack(lengths)
        return self.logits(input_ids_T, packing, (packing.position_T == 0).nonzero()[:, 0])

    def _try_first_tokens(self, expected_RxC: Tensor) -> None:
        """Choose the first place in the last layer at which the hidden states can be reduced to the first tokens."""
        if not self.layers:
            return
        layer = self.layers[-1]
        # None stands for the end of the layer. With gradient checkpointing only the end is tried, because the backward
        # pass recomputes the layer when `_first_R` is not set any more, and a hook inside the layer would fail.
        places = (None,) if uses_gradient_checkpointing(self.model) else (*AFTER_ATTENTION, None)
        for names in places:
            try:
                handle = (
                    layer.register_forward_hook(self._reduce_output)
                    if names is None
                    else layer.get_submodule(names[0]).register_forward_pre_hook(self._reduce_inputs)
                )
            except AttributeError:
                continue
            self._try_padding_free(expected_RxC)
            if self.padding_free:
                self.short = names is not None
                return
            handle.remove()

    def _restore_axes(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Give the arguments of a packed batch the axes that a model without choices takes.

        The model for multiple choice reshapes the mask to two axes, from which transformers would make a mask of T x T
        tokens. DistilBERT's does not reshape positions.
        """
        if self._first_R is None:
            return None
        named = {**named, "attention_mask": named["attention_mask"].view(1, 1, 1, 1)}
        if named.get("position_ids") is not None:
            named["position_ids"] = named["position_ids"].view(1, -1)
        return inputs, named

    def _reduce_inputs(self, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        if self._first_R is None:
            return None
        return tuple(_select_first_tokens(hidden_1xTxH, self._first_R) for hidden_1xTxH in inputs)

    def _reduce_output(self, module: nn.Module, inputs: object, output: Any) -> Any:
        if self._first_R is None:
            return None
        if isinstance(output, tuple):
            return (_select_first_tokens(output[0], self._first_R), *output[1:])
        return _select_first_tokens(output, self._first_R)


def _select_first_tokens(hidden_1xTxH: Tensor, first_R: Tensor) -> Tensor:
    """Return the hidden states of the rows' first tokens, R x 1 x H."""
    return hidden_1xTxH[0].index_select(0, first_R)[:, None]
