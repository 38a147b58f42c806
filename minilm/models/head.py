"""Heads: models of transformers that give the losses of a packed batch's targets, with little other work.

Axes: T tokens of a batch, R rows, L padded length, H hidden size, N targets, V vocabulary.
"""

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from minilm.data.packing import Packing, pack
from minilm.models.attention import ATTENTION
from minilm.models.chunked_loss import linear_cross_entropy, softmax_in_place
from minilm.models.fast_modules import with_fast_modules
from minilm.models.loading import computes_again, evaluating, left_out, position_offset, replaced
from minilm.models.probes import as_if_trained, training_whole
from minilm.models.rounding import to_round
from minilm.models.trials import Trials

log = logging.getLogger("minilm")

# The largest logits with which a trial looks for a cap: caps are far below the second.
_LARGEST_LOGITS = (1e2, 1e5)
# The first and the last module of a layer after its attention. From the one to the other, tokens do not mix.
AFTER_ATTENTION = (
    ("attention.output", "output"),  # BERT and its many relatives
    ("mlp_norm", "mlp"),  # ModernBERT
    ("sa_layer_norm", "output_layer_norm"),  # DistilBERT
    ("attention.LayerNorm", "output"),  # MPNet
)

_SHORTCUTS = ("fused", "short", "padding_free", "sparse")  # in the order in which they are given up: the cheapest first
SHARED = "padding"  # the last one to give up: that several rows share a forward


class Head(nn.Module):
    """A model that gives the losses of a packed batch's targets.

    A shortcut saves work and changes no logit. Each one is tried at construction on small random batches, against the
    model as it came (`minilm.models.trials`).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        with_fast_modules(model)
        self.model = model
        self.padding_free = False
        """Rows lie one after the other without padding, and attention keeps them apart (`minilm.models.attention`)."""
        self.alone = False
        """A forward takes rows of one length only, since padding would change the logits."""
        self._own_attention = model.config._attn_implementation
        self.misread: tuple[int, ...] = ()
        """Special ids that would be read differently inside a row of a batch than in the same row by itself."""
        self._one_row = False  # where `alone`, a forward takes one row only
        self._needs_mask = False  # without a mask, the model takes each token with padding's id for padding
        self._offset = position_offset(model)
        # Masks cut Llama 4's attention into chunks.
        self._chunked = bool(getattr(model.config.get_text_config(), "attention_chunk_size", None))
        self._trials = Trials(model, self._trial_logits)
        takes = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in takes
        self._options: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}

    @property
    def layers(self) -> nn.ModuleList | tuple[()]:
        """The model's layers in order, or () if the model has no list of them."""
        lists = [module for module in self.model.base_model.modules() if isinstance(module, nn.ModuleList)]
        count = getattr(self.model.config.get_text_config(), "num_hidden_layers", None)
        return next((layers for layers in lists if len(layers) == count), ())

    @property
    def summary(self) -> str:
        """A description of the head in a few words."""
        raise NotImplementedError

    @property
    def shortcuts(self) -> tuple[str, ...]:
        """The names of the shortcuts in use."""
        return tuple(name for name in _SHORTCUTS if getattr(self, name, False))

    @contextmanager
    def without(self, *names: str) -> Iterator[None]:
        """Leave out these shortcuts, which must be in use, for a moment."""
        self.give_up(names)
        try:
            yield
        finally:
            for name in names:
                setattr(self, name, True)
            if "padding_free" in names:
                self.model.set_attn_implementation(ATTENTION)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Use the model as it came, one row at a time, for a moment."""
        before = self.alone, self._one_row
        self.alone = self._one_row = True
        try:
            with self.without(*self.shortcuts):
                yield
        finally:
            self.alone, self._one_row = before

    def give_up(self, names: Sequence[str]) -> None:
        """Stop using these shortcuts; with `SHARED`, a forward takes one row only."""
        for name in names:
            if name == SHARED:
                self.alone = self._one_row = True
            else:
                setattr(self, name, False)
        if "padding_free" in names:
            self.model.set_attn_implementation(self._own_attention)

    def logits(
        self, input_ids_T: Tensor, packing: Packing, target_index_N: Tensor, type_ids_T: Tensor | None = None
    ) -> Tensor:
        """Return logits, one row for each of the N targets, which are at `target_index_N` among the T tokens."""
        raise NotImplementedError

    def _inputs(self, input_ids_T: Tensor, packing: Packing, type_ids_T: Tensor | None) -> dict[str, Any]:
        """Return the arguments of the model's forward for this batch, packed or padded."""
        if self.padding_free:
            more = to_round(len(input_ids_T), input_ids_T.device)  # tokens, each of which attends to itself alone
            # packed_attention ignores the mask. transformers leaves a mask of four axes as it is.
            mask = torch.empty(1, 1, 1, 1, device=input_ids_T.device)
            ids_T = F.pad(input_ids_T, (0, more), value=self._trials.padding)
            inputs = {"input_ids": ids_T[None], "attention_mask": mask, "packing": packing, **self._options}
            if self._takes_positions:
                position_T = self._positions(input_ids_T, packing)
                inputs["position_ids"] = F.pad(position_T, (0, more), value=self._offset)[None]
            if type_ids_T is not None:
                inputs["token_type_ids"] = F.pad(type_ids_T, (0, more))[None]
            return inputs
        (group,) = packing.groups
        if group.owner_RL is not None:
            raise ValueError(
                f"{type(self.model).__name__} takes padded rows, and this batch was made for a model without padding: "
                "give the collator the plan's `padded` and `multiple`"
            )
        ids_RxL = group.pad(input_ids_T)
        inputs = {"input_ids": ids_RxL, "attention_mask": self._full_mask(ids_RxL), **self._options}
        if type_ids_T is not None:
            inputs["token_type_ids"] = group.pad(type_ids_T)
        if group.place_T is not None:
            real_RxL = group.token_mask(input_ids_T.device)
            inputs["input_ids"] = inputs["input_ids"].masked_fill(~real_RxL, self._trials.padding)
            inputs["attention_mask"] = real_RxL.long()
            if type_ids_T is not None:
                inputs["token_type_ids"] = inputs["token_type_ids"].masked_fill(~real_RxL, 0)
        return inputs

    def _positions(self, input_ids_T: Tensor, packing: Packing) -> Tensor:
        """Return each token's position as the model counts them: RoBERTa does not count tokens with padding's id."""
        if not self._offset:
            return packing.position_T
        real_T = (input_ids_T != self._offset - 1).long()
        count_T = real_T.cumsum(0)
        before_T = ((count_T - real_T) * (packing.position_T == 0)).cummax(0).values  # the count at the row's start
        return (count_T - before_T) * real_T + self._offset - 1

    def _full_mask(self, ids_RxL: Tensor) -> Tensor | None:
        """Return the mask of rows without padding, or None for a model that does not guess a missing mask from ids."""
        return torch.ones_like(ids_RxL) if self._needs_mask else None

    def _runs(self, input_ids_T: Tensor, packing: Packing, type_ids_T: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """Yield the length and the logits of each run of rows of one length, each run in a forward of its own."""
        at = 0
        runs = [(length, [length]) for length in packing.lengths] if self._one_row else groupby(packing.lengths)
        for length, rows in runs:
            tokens = slice(at, at := at + length * len(list(rows)))
            ids_RxL = input_ids_T[tokens].view(-1, length)
            inputs = {"input_ids": ids_RxL, "attention_mask": self._full_mask(ids_RxL), **self._options}
            if type_ids_T is not None:
                inputs["token_type_ids"] = type_ids_T[tokens].view(-1, length)
            yield length, self.model(**inputs).logits

    @property
    def longest_trial(self) -> int:
        """Tokens of the longest row of a trial."""
        return self._trials.longest

    def draw_rows(self, lengths: Sequence[int]) -> tuple[Tensor, Packing]:
        """Return random ids of rows of these lengths, and their packing."""
        return self._trials.draw_ids(lengths), self._pack(lengths)

    def _pack(self, lengths: Sequence[int]) -> Packing:
        device = next(self.model.parameters()).device
        return pack(lengths, grouped=self.padding_free).map(lambda tensor: tensor.to(device))

    def _trial_logits(self, input_ids_T: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return logits of rows of these lengths, N x V; the last three belong to the last three rows."""
        raise NotImplementedError

    def _try_padded(self) -> Tensor:
        """Choose whether rows can be padded, or else share a forward; return the logits of each row by itself."""
        self._needs_mask = self._trials.guesses_mask(self._options)
        with self.plain():
            expected_NxV = self._trials.logits()
        self.alone = True
        self._one_row = self._trials.explain_difference(expected_NxV) != ""
        self.alone = False
        self.alone = self._trials.explain_difference(expected_NxV) != "" or self._trials.padding_leaks()
        return expected_NxV

    def _try_padding_free(self, expected_NxV: Tensor) -> None:
        chosen = getattr(self.model, "attention_is_chosen", False)
        if chosen or self._chunked or not self.model._supports_attention_backend:
            return
        self.model.set_attn_implementation(ATTENTION)
        self.padding_free = True
        trials = self._trials
        if trials.explain_difference(expected_NxV) or trials.rows_leak() or trials.places_matter(expected_NxV):
            self.give_up(["padding_free"])

    def _find_misread(self) -> tuple[int, ...]:
        """Return the value of `misread`. The shortcuts must be chosen before."""
        misread = []
        for id in self._trials.special:
            with self._trials.with_id_inside(id):
                try:
                    with self.plain():
                        expected_NxV = self._trials.logits()
                except (IndexError, RuntimeError, ValueError):
                    expected_NxV = torch.zeros(0)
                if self._trials.explain_difference(expected_NxV):
                    misread.append(id)
        return tuple(misread)


class SparseHead(Head):
    """A language model that gives the losses of a packed batch's targets, with little other work.

    It has four shortcuts. Each one is left out if it changes logits in a trial:

    - `sparse`: the head runs on the targets alone, which a hook on `model.base_model` selects;
    - `padding_free`: rows lie one after the other without padding, and attention keeps them apart
      (`minilm.models.attention`);
    - `short`: the modules after attention in the last layer run on the targets alone;
    - `fused`: the last product of the head and the loss are computed together, in parts (`minilm.models.chunked_loss`).

    `reason` says why a model keeps its full head. `label_smoothing` has an effect in training only.
    """

    def __init__(self, model: PreTrainedModel, *, label_smoothing: float = 0.0) -> None:
        super().__init__(model)
        self.label_smoothing = label_smoothing
        self.softmax = softmax_in_place
        self.sparse = self.short = self.fused = False
        self._last: Any = model.get_output_embeddings()
        # The state of one forward, for the hooks.
        self._target_index: Tensor | None = None
        self._ids: Tensor | None = None  # the model's input, in which `_target_index` gives places
        self._more = 0  # rows of zeros after the targets
        self._gathered = False
        self._shape: torch.Size | None = None
        with evaluating(model), as_if_trained(model):
            expected_NxV = self._try_padded()
            self.reason = "padding changes its logits" if self.alone else self._try_sparse(expected_NxV)
            if not self.alone:
                self._try_padding_free(expected_NxV)
                self._try_short(expected_NxV)
            self._try_fused(expected_NxV)
            self.misread = self._find_misread()
        if not self.sparse:
            saved = " but for its last product" if self.fused else ""
            log.warning(f"{type(model).__name__} runs its head on all tokens{saved}: {self.reason}")

    @property
    def summary(self) -> str:
        return "sparse head" if self.sparse else f"full head ({self.reason})"

    def forward(
        self,
        input_ids_T: Tensor,
        packing: Packing,
        target_index_N: Tensor,
        target_ids_N: Tensor,
        type_ids_T: Tensor | None = None,
    ) -> Tensor:
        """Return -log p of the ids `target_ids_N` at `target_index_N` among the T tokens, nats, float32[N].

        If the model is `fused`, only the sum of these has a gradient: use `logits` for any other function of them.
        """
        device = input_ids_T.device.type
        smoothing = self.label_smoothing if self.training else 0.0
        half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        # In fp16, gradients of small probabilities vanish unless the loss is scaled first; `fused` takes them before.
        if not self.fused or half:
            logits_NxV = self.logits(input_ids_T, packing, target_index_N, type_ids_T)
            return F.cross_entropy(logits_NxV.float(), target_ids_N, reduction="none", label_smoothing=smoothing)
        with left_out(self._last):
            hidden_NxH = self._logits(input_ids_T, packing, target_index_N, type_ids_T)
        weight, bias = self._last.weight, self._last.bias
        return linear_cross_entropy(hidden_NxH, weight, bias, target_ids_N, smoothing, self.softmax)

    def logits(
        self, input_ids_T: Tensor, packing: Packing, target_index_N: Tensor, type_ids_T: Tensor | None = None
    ) -> Tensor:
        """Return logits, N x V, of the targets, which are at `target_index_N` among the T tokens."""
        return self._logits(input_ids_T, packing, target_index_N, type_ids_T)[: len(target_index_N)]

    def _logits(
        self, input_ids_T: Tensor, packing: Packing, target_index_N: Tensor, type_ids_T: Tensor | None
    ) -> Tensor:
        """Return the same as `logits`, perhaps with meaningless rows after the N."""
        if self.alone:
            runs = self._runs(input_ids_T, packing, type_ids_T)
            return torch.cat([logits[:, :length].flatten(0, 1) for length, logits in runs])[target_index_N]
        inputs = self._inputs(input_ids_T, packing, type_ids_T)
        if not self.padding_free and (place_T := packing.groups[0].place_T) is not None:
            target_index_N = place_T[target_index_N]
        self._target_index = target_index_N if self.sparse else None
        self._ids = inputs["input_ids"]
        self._gathered = False
        self._more = to_round(len(target_index_N), input_ids_T.device)
        try:
            logits_RxLxV: Tensor = self.model(**inputs).logits
        finally:
            self._target_index = self._ids = self._shape = None
        if self._gathered:
            return logits_RxLxV[0]
        if not self.padding_free:
            # Perceiver gives logits at all of its places, however short the rows are.
            logits_RxLxV = logits_RxLxV[:, : packing.groups[0].length]
        return logits_RxLxV.flatten(0, 1)[target_index_N]

    def _trial_logits(self, input_ids_T: Tensor, lengths: Sequence[int]) -> Tensor:
        packing, second, last = self._pack(lengths), lengths[0], len(input_ids_T)
        # There are more targets than any row has tokens, so that a module that takes them for a row fails.
        target_index_N = torch.tensor([*range(second), second, last - 8, last - 2]).to(input_ids_T.device)
        if not self.fused:
            return self.logits(input_ids_T, packing, target_index_N)
        with left_out(self._last):
            hidden_NxH = self.logits(input_ids_T, packing, target_index_N)
        return F.linear(hidden_NxH, self._last.weight, self._last.bias)

    def _try_sparse(self, expected_NxV: Tensor) -> str:
        reason = "the model has no separate base model"
        for base in (self.model.base_model, self.model.get_decoder()):  # OPT calls the decoder inside its base model
            if base is None or base is self.model:
                continue
            handle = base.register_forward_hook(self._gather)
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
        # Under gradient checkpointing, backward computes a layer again, and the targets are then no longer known.
        if not self.sparse or not self.layers or computes_again(self.model):
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
        if isinstance(self._last, nn.Linear) and self._product_is_last(expected_NxV):
            self.fused = True
            self.fused = not self._trials.explain_difference(expected_NxV)

    def _product_is_last(self, expected_NxV: Tensor) -> bool:
        """Return whether nothing follows the last product: a cap, for one, changes large logits only."""
        product = self._last.forward
        for size in _LARGEST_LOGITS:
            times = size / float(expected_NxV.abs().max().clamp(min=1e-9))
            with replaced(self._last, lambda x, times=times: times * product(x)):
                if self._trials.explain_difference(times * expected_NxV):
                    return False
        return True

    def _gather(self, module: nn.Module, inputs: object, output: Any) -> Any:
        """Select the targets from the base model's output."""
        if self._target_index is not None and self._has_input_places(output.last_hidden_state):
            output.last_hidden_state = self._at_targets(output.last_hidden_state, self._target_index)
            self._gathered = True
        return output

    def _has_input_places(self, hidden_RxLxH: Tensor) -> bool:
        """Return whether its places are those of the input: Longformer adds padding, Perceiver has its own places."""
        return self._ids is not None and hidden_RxLxH.shape[:2] == self._ids.shape

    def _narrow(self, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """Before the first module: pass only the targets to it, unless most tokens are targets."""
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
        """After the last module: put each target back to its place, and zeros elsewhere."""
        if self._shape is None or self._target_index is None:
            return None
        index, (rows, length, width), self._shape = self._target_index, self._shape, None
        zeros_RLxH = output_1xNxH.new_zeros(rows * length, width)
        return zeros_RLxH.index_copy(0, index, output_1xNxH[0, : len(index)]).view(rows, length, width)

    def _at_targets(self, hidden_RxLxH: Tensor, index_N: Tensor) -> Tensor:
        """Return the targets among all tokens, 1 x N x H, and rows of zeros up to a round number."""
        hidden_NxH = hidden_RxLxH.flatten(0, 1).index_select(0, index_N)
        return (F.pad(hidden_NxH, (0, 0, 0, self._more)) if self._more else hidden_NxH)[None]


def freeze_unused(head: Head) -> None:
    """Freeze the parameters that have no effect on the logits, such as a pooler's: DDP would wait for their gradients.

    Raises ValueError for a model that cannot be trained on rows of any length, such as Reformer and Funnel.
    """
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    ids_T, packing = head.draw_rows([head.longest_trial - 1, 1])
    try:
        with training_whole(head):
            logits_1xV = head.logits(ids_T, packing, torch.zeros_like(ids_T[:1]))
            gradients = torch.autograd.grad(logits_1xV.sum(), trained, allow_unused=True)
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{type(head.model).__name__} cannot be trained on rows of any length: {why}") from error
    for parameter in [p for p, gradient in zip(trained, gradients, strict=True) if gradient is None]:
        parameter.requires_grad_(False)
