"""The base class of heads: models of transformers that compute the losses of a packed batch's targets.

Axes: T tokens of a batch, R rows, L padded length, H hidden size, N targets, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm.data.micro_batch import couple_losses
from minilm.data.packing import Packing, pack
from minilm.models.attention import ATTENTION
from minilm.models.fast_modules import install_fast_modules
from minilm.models.layers import find_layers
from minilm.models.model_inputs import ModelInputs
from minilm.models.shortcut_trials import ShortcutTrials
from minilm.models.teacher import Teacher
from minilm.models.temporary_changes import training_mode

_SHORTCUTS = ("fused", "short", "padding_free", "sparse")  # from the cheapest to give up to the dearest
# The name of the last shortcut to give up: several rows share a forward.
SHARED_FORWARD = "padding"

Loss = Callable[[Tensor, Tensor, Packing], Tensor]
"""Computes losses, float32, from a head's outputs in float32, the targets of the micro-batch and its packing.

There is one loss for each output of the head, or one for each target where a target belongs to several outputs.
"""


class Head(nn.Module):
    """A model that computes the losses of a packed batch's targets.

    A shortcut saves work without changing the logits. At construction the head tries each shortcut on small random
    batches and keeps it only if the logits stay those of the plain model (`minilm.models.shortcut_trials`).
    """

    def __init__(self, model: PreTrainedModel, loss: Loss | None = None) -> None:
        super().__init__()
        install_fast_modules(model)
        self.model = model
        self.loss = loss
        self.coupled_rows = 0
        """The number of rows of an example if `loss` compares the examples of a step, else 0."""
        self.teacher: Teacher | None = None
        """A model whose outputs this one learns too, in training."""
        self.padding_free = False
        """Rows follow each other without padding, and attention keeps them apart (`minilm.models.attention`)."""
        self.needs_equal_lengths = False
        """A forward takes only rows of equal length, because padding would change the logits."""
        self.misread_ids: tuple[int, ...] = ()
        """Special ids that the model would read differently inside a row of a batch than inside a single row."""
        self._needs_single_rows = False  # with `needs_equal_lengths`: a forward takes only one row
        self._own_attention = model.config._attn_implementation
        # Llama 4's attention is cut into chunks by its masks, which `padding_free` does not use.
        self._has_chunked_attention = bool(getattr(model.config.get_text_config(), "attention_chunk_size", None))
        self._trials = ShortcutTrials(model, self._trial_logits)
        self._inputs = ModelInputs(model, self._trials.padding)

    @property
    def layers(self) -> nn.ModuleList | tuple[()]:
        """The model's layers in order, or () if the model has no list of them."""
        return find_layers(self.model)

    @property
    def summary(self) -> str:
        """A description of the head in a few words."""
        raise NotImplementedError

    @property
    def shortcuts(self) -> tuple[str, ...]:
        """The names of the shortcuts in use."""
        return tuple(name for name in _SHORTCUTS if getattr(self, name, False))

    @contextmanager
    def without_shortcuts(self, *names: str) -> Iterator[None]:
        """Run without these shortcuts, which must be in use, until the block ends."""
        self.drop_shortcuts(names)
        try:
            yield
        finally:
            for name in names:
                setattr(self, name, True)
            if "padding_free" in names:
                self.model.set_attn_implementation(ATTENTION)

    @contextmanager
    def reference_mode(self) -> Iterator[None]:
        """Run the plain model, one row at a time, until the block ends."""
        before = self.needs_equal_lengths, self._needs_single_rows
        self.needs_equal_lengths = self._needs_single_rows = True
        try:
            with self.without_shortcuts(*self.shortcuts):
                yield
        finally:
            self.needs_equal_lengths, self._needs_single_rows = before

    def drop_shortcuts(self, names: Sequence[str]) -> None:
        """Stop using these shortcuts. Without `SHARED_FORWARD`, a forward takes only one row."""
        for name in names:
            if name == SHARED_FORWARD:
                self.needs_equal_lengths = self._needs_single_rows = True
            else:
                setattr(self, name, False)
        if "padding_free" in names:
            self.model.set_attn_implementation(self._own_attention)

    def forward(
        self,
        input_ids_T: Tensor,
        packing: Packing,
        target_index_N: Tensor,
        targets: Tensor | None = None,
        type_ids_T: Tensor | None = None,
        coupling_NxD: Tensor | None = None,
    ) -> Tensor:
        """Return what `loss` returns for the outputs and the targets, or without `targets` the outputs in float32.

        target_index_N: as in `logits`.
        type_ids_T: the token types, or None if the model takes none or all are 0.
        coupling_NxD: float32, the losses of the examples and their sum's gradient at the outputs, where the examples of
            the whole step decide them. The result is then these losses, with this gradient.
        """
        outputs = self.logits(input_ids_T, packing, target_index_N, type_ids_T).float()
        if targets is None:
            return outputs
        if coupling_NxD is not None:
            return couple_losses(outputs, coupling_NxD)
        assert self.loss is not None
        losses_N = self.loss(outputs, targets, packing)
        if self.teacher is None or not self.training:
            return losses_N
        return self.teacher.mix(losses_N, outputs, targets, input_ids_T, packing, target_index_N, type_ids_T)

    def logits(
        self, input_ids_T: Tensor, packing: Packing, target_index_N: Tensor, type_ids_T: Tensor | None = None
    ) -> Tensor:
        """Return the outputs for the N targets, one row each. A target is at `target_index_N` among the T tokens."""
        raise NotImplementedError

    @property
    def longest_trial(self) -> int:
        """The number of tokens in the longest row of a trial."""
        return self._trials.longest

    def draw_rows(self, lengths: Sequence[int]) -> tuple[Tensor, Packing]:
        """Return random ids of rows of these lengths, int64[T], and their packing."""
        return self._trials.draw_ids(lengths), self._pack(lengths)

    def _pack(self, lengths: Sequence[int]) -> Packing:
        device = next(self.model.parameters()).device
        return pack(lengths, grouped=self.padding_free).map(lambda tensor: tensor.to(device))

    def _make_inputs(self, input_ids_T: Tensor, packing: Packing, type_ids_T: Tensor | None) -> dict[str, Any]:
        """Return the arguments of the model's forward for this batch, packed or padded."""
        make = self._inputs.packed if self.padding_free else self._inputs.padded
        return make(input_ids_T, packing, type_ids_T)

    def _run_equal_lengths(
        self, input_ids_T: Tensor, packing: Packing, type_ids_T: Tensor | None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the length and the outputs of each run of rows of equal length. Each run has its own forward."""
        runs = self._inputs.equal_lengths(input_ids_T, packing, type_ids_T, single_rows=self._needs_single_rows)
        for length, inputs in runs:
            yield length, self._run_model(inputs)

    def _run_model(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the model's outputs for these arguments: its logits, whose first axis is that of the input ids.

        A model for question answering gives two logits per token, R x L x 2: of the start and of the end of the answer.
        A model without a head gives its hidden states, R x L x H.
        """
        output: Any = self.model(**inputs)
        if hasattr(output, "start_logits"):
            return torch.stack([output.start_logits, output.end_logits], dim=-1)
        outputs: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
        return outputs

    def _run_row(self, ids_1xL: Tensor, mask_1xL: Tensor | None) -> Tensor:
        """Return the model's outputs for one row with this mask, or without one."""
        return self._run_model(self._inputs.single_row(ids_1xL, mask_1xL))

    def _trial_logits(self, input_ids_T: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return logits of rows of these lengths, N x V. The last three must belong to the last three rows."""
        raise NotImplementedError

    def _try_padded(self) -> Tensor:
        """Choose whether a forward takes padded rows, rows of equal length or single rows.

        Return the logits of single rows.
        """
        self._inputs.needs_mask = self._trials.guesses_mask(self._run_row)
        with self.reference_mode():
            expected_NxV = self._trials.logits()
        self.needs_equal_lengths = True
        self._needs_single_rows = self._trials.explain_difference(expected_NxV) != ""
        self.needs_equal_lengths = False
        self.needs_equal_lengths = self._trials.explain_difference(expected_NxV) != "" or self._trials.padding_leaks()
        return expected_NxV

    def _try_padding_free(self, expected_NxV: Tensor) -> None:
        """Use `padding_free` if the logits stay the expected ones."""
        chosen = getattr(self.model, "attention_is_chosen", False)
        if chosen or self._has_chunked_attention or not self.model._supports_attention_backend:
            return
        self.model.set_attn_implementation(ATTENTION)
        self.padding_free = True
        trials = self._trials
        if trials.explain_difference(expected_NxV) or trials.rows_leak() or trials.places_matter(expected_NxV):
            self.drop_shortcuts(["padding_free"])

    def _find_misread_ids(self) -> tuple[int, ...]:
        """Return the value of `misread_ids`. The shortcuts must have been chosen before."""
        misread = []
        for id in self._trials.special:
            with self._trials.insert_id(id):
                try:
                    with self.reference_mode():
                        expected_NxV = self._trials.logits()
                except (IndexError, RuntimeError, ValueError):
                    expected_NxV = torch.zeros(0)
                if self._trials.explain_difference(expected_NxV):
                    misread.append(id)
        return tuple(misread)


def freeze_unused(head: Head) -> None:
    """Freeze parameters that do not affect the logits, such as a pooler's. DDP would wait for their gradients.

    Raises ValueError for a model that cannot be trained on rows of any length, such as Reformer and Funnel.
    """
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    ids_T, packing = head.draw_rows([head.longest_trial - 1, 1])
    try:
        with training_mode(head):
            logits_1xV = head.logits(ids_T, packing, torch.zeros_like(ids_T[:1]))
            gradients = torch.autograd.grad(logits_1xV.sum(), trained, allow_unused=True)
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{type(head.model).__name__} cannot be trained on rows of any length: {reason}") from error
    for parameter in [p for p, gradient in zip(trained, gradients, strict=True) if gradient is None]:
        parameter.requires_grad_(False)
