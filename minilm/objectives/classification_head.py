"""The logits and the losses of a sequence classifier.

Axes: T tokens of the micro-batch, R its rows, N its examples (as many as the rows; 0 in an empty micro-batch, which has
one row), H hidden size, C labels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from minilm.data.labels import Labels
from minilm.data.packing import Packing
from minilm.models.head import Head
from minilm.models.layers import AFTER_ATTENTION, uses_gradient_checkpointing
from minilm.models.temporary_changes import evaluation_mode, randomize_constant_parameters


class ClassificationHead(Head):
    """A sequence classifier that gives the loss of each example of a micro-batch.

    It takes two shortcuts if a trial shows that they do not change a logit. `padding_free` joins rows without padding,
    for models that classify a row by its first token. `short` runs only these first tokens through the part of the last
    layer that follows attention.
    """

    def __init__(self, model: PreTrainedModel, labels: Labels, *, label_smoothing: float = 0.0) -> None:
        super().__init__(model)
        self.label_smoothing = label_smoothing
        self.short = False
        # The places of the rows' first tokens, for the hooks. It is set only during a forward without padding.
        self._first_R: Tensor | None = None
        self._problem = labels.problem
        self._weight_C = None if labels.weights is None else torch.from_numpy(labels.weights).to(model.device)
        with evaluation_mode(model), randomize_constant_parameters(model):
            expected_RxC = self._try_padded()
            if not self.needs_equal_lengths:
                self._try_first_tokens(expected_RxC)
            self.misread_ids = self._find_misread_ids()

    @property
    def summary(self) -> str:
        if self.padding_free:
            return "classes from first tokens, without padding"
        return (
            "rows of one length at a time, since padding changes its logits"
            if self.needs_equal_lengths
            else "padded rows"
        )

    def forward(
        self,
        input_ids_T: Tensor,
        packing: Packing,
        target_index_N: Tensor,
        labels: Tensor | None = None,
        type_ids_T: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each example, float32[N], or without `labels` the logits, float32[N, C].

        target_index_N: the place of each row's first token.
        labels: as in `compute_classification_losses`.
        type_ids_T: the token types, or None if the model takes none or all are 0.
        """
        logits_NxC = self.logits(input_ids_T, packing, target_index_N, type_ids_T).float()
        if labels is None:
            return logits_NxC
        return compute_classification_losses(logits_NxC, labels, self._problem, self._weight_C, self.label_smoothing)

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
            logits_RxC: Tensor = self.model(**self._make_inputs(input_ids_T, packing, type_ids_T)).logits
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


def compute_classification_losses(
    logits_NxC: Tensor, labels: Tensor, problem: str, weight_C: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Return the loss of each example, float32[N].

    single-label (labels int64[N]): the cross entropy, with a share `smoothing` of the target spread evenly over all
    classes (Szegedy et al. 2016, section 7), times the weight of the example's class. multi-label (labels float32[N,
    C]): the mean over labels of their binary cross entropies. regression (labels float32[N]): the squared error.
    """
    if problem == "regression":
        return F.mse_loss(logits_NxC[:, 0], labels, reduction="none")
    if problem == "multi-label":
        return F.binary_cross_entropy_with_logits(logits_NxC, labels, reduction="none").mean(1)
    nats_N = F.cross_entropy(logits_NxC, labels, reduction="none", label_smoothing=smoothing)
    return nats_N if weight_C is None else nats_N * weight_C[labels]
