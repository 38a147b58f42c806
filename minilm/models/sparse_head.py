"""The head of a model with logits for each token, which computes them at the targets alone.

Axes: T tokens of a batch, R rows, L padded length, H hidden size, N targets, V vocabulary (or number of other outputs).
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from minilm.data.packing import Packing
from minilm.models.chunked_loss import eager_cross_entropy, linear_cross_entropy
from minilm.models.head import Head, Loss
from minilm.models.layers import AFTER_ATTENTION, uses_gradient_checkpointing
from minilm.models.matmul_shapes import count_padding_rows
from minilm.models.temporary_changes import bypass, evaluation_mode, randomize_constant_parameters, replace_forward

log = logging.getLogger("minilm")

# A cap on the logits shows only if they are large. Trials scale the logits up to these sizes: caps lie far below the
# second one.
_LARGEST_LOGITS = (1e2, 1e5)


class SparseHead(Head):
    """A model with logits for each token that computes the losses of a packed batch's targets.

    Without `loss`, this is the cross entropy of the targets, which are ids of tokens or of labels, int64[N], in nats.
    The logits of a model for question answering have two columns: of the start and of the end of the answer.

    The head has four shortcuts, and uses those that do not change the logits in a trial:

    - `sparse`: the head runs on the targets alone. A hook on `model.base_model` selects them;
    - `padding_free`: rows follow each other without padding, and attention keeps them apart
      (`minilm.models.attention`);
    - `short`: the modules after attention in the last layer run on the targets alone;
    - `fused`: the last product of the head and the loss are computed together, in parts (`minilm.models.chunked_loss`).
      This is for language models with the default loss.

    `reason` says why a model keeps its full head. `label_smoothing` and `z_loss` have an effect in training only, and
    only on the default loss (`minilm.models.chunked_loss.linear_cross_entropy`).
    """

    def __init__(
        self, model: PreTrainedModel, *, label_smoothing: float = 0.0, z_loss: float = 0.0, loss: Loss | None = None
    ) -> None:
        super().__init__(model, loss)
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.cross_entropy = eager_cross_entropy
        self.sparse = self.short = self.fused = False
        self._last: Any = model.get_output_embeddings()
        # The state of one forward, for the hooks.
        self._target_index: Tensor | None = None
        self._ids: Tensor | None = None  # the model's input; `_target_index` counts its places
        self._padding_rows = 0  # rows of zeros after the targets
        self._gathered = False
        self._shape: torch.Size | None = None
        with evaluation_mode(model), randomize_constant_parameters(model):
            expected_NxV = self._try_padded()
            padding_matters = self.needs_equal_lengths
            self.reason = "padding changes its logits" if padding_matters else self._try_sparse(expected_NxV)
            if not self.needs_equal_lengths:
                self._try_padding_free(expected_NxV)
                self._try_short(expected_NxV)
            self._try_fused(expected_NxV)
            self.misread_ids = self._find_misread_ids()
        # The head of a model without output embeddings, such as a tagger, costs next to nothing at any token.
        if not self.sparse and self._last is not None:
            exception = " except for its last product" if self.fused else ""
            log.warning(f"{type(model).__name__} runs its head on all tokens{exception}: {self.reason}")

    @property
    def summary(self) -> str:
        if self.sparse:
            return "sparse head"
        return f"{'small head on all tokens' if self._last is None else 'full head'} ({self.reason})"

    def forward(
        self,
        input_ids_T: Tensor,
        packing: Packing,
        target_index_N: Tensor,
        targets: Tensor | None = None,
        type_ids_T: Tensor | None = None,
        coupling_NxD: Tensor | None = None,
    ) -> Tensor:
        """Return -log p of the ids `targets`, int64[N], at `target_index_N` among the T tokens, in nats, float32[N].

        With a `loss` of its own the head returns what that returns. Without `targets` it returns the logits,
        float32[N, V]. If the model is `fused`, only the sum of the losses has a gradient. Use `logits` for other
        functions of it.
        """
        if targets is None or self.loss is not None:
            return super().forward(input_ids_T, packing, target_index_N, targets, type_ids_T, coupling_NxD)
        device = input_ids_T.device.type
        smoothing, z_loss = (self.label_smoothing, self.z_loss) if self.training else (0.0, 0.0)
        half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        # In fp16, gradients of small probabilities vanish unless the loss is scaled first. `fused` computes gradients
        # before the loss is scaled.
        teacher = self.teacher if self.training else None
        if not self.fused or half or teacher is not None:
            logits_NxV = self.logits(input_ids_T, packing, target_index_N, type_ids_T).float()
            nats_N = F.cross_entropy(logits_NxV, targets, reduction="none", label_smoothing=smoothing)
            if z_loss:
                nats_N = nats_N + z_loss * logits_NxV.logsumexp(-1) ** 2
            if teacher is None:
                return nats_N
            return teacher.mix(nats_N, logits_NxV, targets, input_ids_T, packing, target_index_N, type_ids_T)
        with bypass(self._last):
            hidden_NxH = self._compute_logits(input_ids_T, packing, target_index_N, type_ids_T)
        weight, bias = self._last.weight, self._last.bias
        return linear_cross_entropy(hidden_NxH, weight, bias, targets, smoothing, self.cross_entropy, z_loss=z_loss)

    def logits(
        self, input_ids_T: Tensor, packing: Packing, target_index_N: Tensor, type_ids_T: Tensor | None = None
    ) -> Tensor:
        """Return the logits, N x V, of the targets, which are at `target_index_N` among the T tokens."""
        return self._compute_logits(input_ids_T, packing, target_index_N, type_ids_T)[: len(target_index_N)]

    def _compute_logits(
        self, input_ids_T: Tensor, packing: Packing, target_index_N: Tensor, type_ids_T: Tensor | None
    ) -> Tensor:
        """Return the same as `logits`. Meaningless rows may follow the first N."""
        if self.needs_equal_lengths:
            runs = self._run_equal_lengths(input_ids_T, packing, type_ids_T)
            return torch.cat([logits[:, :length].flatten(0, 1) for length, logits in runs])[target_index_N]
        inputs = self._make_inputs(input_ids_T, packing, type_ids_T)
        if not self.padding_free and (place_T := packing.groups[0].place_T) is not None:
            target_index_N = place_T[target_index_N]
        self._target_index = target_index_N if self.sparse else None
        self._ids = inputs["input_ids"]
        self._gathered = False
        self._padding_rows = count_padding_rows(len(target_index_N), input_ids_T.device)
        try:
            logits_RxLxV = self._run_model(inputs)
        finally:
            self._target_index = self._ids = self._shape = None
        if self._gathered:
            return logits_RxLxV[0]
        if not self.padding_free:
            # Perceiver returns logits at all of its places, even if the rows are shorter.
            logits_RxLxV = logits_RxLxV[:, : packing.groups[0].length]
        return logits_RxLxV.flatten(0, 1)[target_index_N]

    def _trial_logits(self, input_ids_T: Tensor, lengths: Sequence[int]) -> Tensor:
        packing, second, last = self._pack(lengths), lengths[0], len(input_ids_T)
        # There are more targets than any row has tokens, so that a module that takes them for a row fails.
        target_index_N = torch.tensor([*range(second), second, last - 8, last - 2]).to(input_ids_T.device)
        # Not `self.logits`, since EmbeddingHead returns the mean of a row, which could hide an error at one token.
        with bypass(self._last) if self.fused else nullcontext():
            outputs = SparseHead.logits(self, input_ids_T, packing, target_index_N)
        return F.linear(outputs, self._last.weight, self._last.bias) if self.fused else outputs

    def _try_sparse(self, expected_NxV: Tensor) -> str:
        """Use `sparse` if the logits stay the expected ones. Return the reason if they do not, else an empty string."""
        reason = "the model has no separate base model"
        for base in (self.model.base_model, self.model.get_decoder()):  # OPT calls the decoder inside its base model
            if base is None or base is self.model:
                continue
            handle = base.register_forward_hook(self._select_targets)
            self.sparse = True
            reason = self._trials.explain_difference(expected_NxV)
            if not reason and not self._gathered:
                reason = "its base model adds places of its own"
            self.sparse = reason == ""
            if self.sparse:
                break
            handle.remove()
        return reason

    def _try_short(self, expected_NxV: Tensor) -> None:
        """Use `short` if the logits stay the expected ones."""
        # Gradient checkpointing runs a layer again in backward, when the targets are no longer known.
        if not self.sparse or not self.layers or uses_gradient_checkpointing(self.model):
            return
        for names in AFTER_ATTENTION:
            try:
                first, last = (self.layers[-1].get_submodule(name) for name in names)
            except AttributeError:
                continue
            handles = (first.register_forward_pre_hook(self._narrow), last.register_forward_hook(self._widen))
            self.short = True
            if not self._trials.explain_difference(expected_NxV):
                return
            self.short = False
            for handle in handles:
                handle.remove()

    def _try_fused(self, expected_NxV: Tensor) -> None:
        """Use `fused` if the logits stay the expected ones."""
        if self.loss is None and isinstance(self._last, nn.Linear) and self._product_is_last(expected_NxV):
            self.fused = True
            self.fused = not self._trials.explain_difference(expected_NxV)

    def _product_is_last(self, expected_NxV: Tensor) -> bool:
        """Return whether the head's last product is its last operation, without a cap on the logits after it."""
        product = self._last.forward
        for size in _LARGEST_LOGITS:
            times = size / float(expected_NxV.abs().max().clamp(min=1e-9))
            with replace_forward(self._last, lambda x, times=times: times * product(x)):
                if self._trials.explain_difference(times * expected_NxV):
                    return False
        return True

    def _select_targets(self, module: nn.Module, inputs: object, output: Any) -> Any:
        """Keep only the targets of the base model's output: a forward hook."""
        if self._target_index is not None and self._has_input_places(output.last_hidden_state):
            output.last_hidden_state = self._at_targets(output.last_hidden_state, self._target_index)
            self._gathered = True
        return output

    def _has_input_places(self, hidden_RxLxH: Tensor) -> bool:
        """Return whether the states have the input's places. Longformer adds padding, and Perceiver has others."""
        return self._ids is not None and hidden_RxLxH.shape[:2] == self._ids.shape

    def _narrow(self, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """Pass only the targets to the first module after attention, unless most tokens are targets: a pre-hook."""
        index, shape = self._target_index, inputs[0].shape
        if (
            index is None
            or not self.short
            or not self._has_input_places(inputs[0])
            or 2 * len(index) > shape[0] * shape[1]
        ):
            return None
        self._shape = shape
        return tuple(self._at_targets(hidden_RxLxH, index) for hidden_RxLxH in inputs)

    def _widen(self, module: nn.Module, inputs: object, output_1xNxH: Tensor) -> Any:
        """Put the targets back to their places after the last module, with zeros elsewhere: a forward hook."""
        if self._shape is None or self._target_index is None:
            return None
        index, (rows, length, width), self._shape = self._target_index, self._shape, None
        zeros_RLxH = output_1xNxH.new_zeros(rows * length, width)
        return zeros_RLxH.index_copy(0, index, output_1xNxH[0, : len(index)]).view(rows, length, width)

    def _at_targets(self, hidden_RxLxH: Tensor, index_N: Tensor) -> Tensor:
        """Return the hidden states of the targets, 1 x N x H, followed by the padding rows."""
        hidden_NxH = hidden_RxLxH.flatten(0, 1).index_select(0, index_N)
        return (F.pad(hidden_NxH, (0, 0, 0, self._padding_rows)) if self._padding_rows else hidden_NxH)[None]
