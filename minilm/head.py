"""The head of a language model at its targets, and little work besides.

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

from minilm.attention import ATTENTION
from minilm.losses import linear_cross_entropy, softmax_in_place
from minilm.model import (
    computes_again,
    evaluating,
    left_out,
    longest_input,
    position_offset,
    replaced,
    vocabulary_size,
)
from minilm.packing import Packing, pack
from minilm.probing import CountingFromFar, as_if_trained, sees_padding, training_whole
from minilm.rounding import to_round
from minilm.swap import with_fast_modules

log = logging.getLogger("minilm")

_PROBE = 160  # tokens of the longest row on which a shortcut is tried: more than the usual window of local attention
# The largest logits of the trials of what follows the last product: caps are far below the second.
_PROBED_LOGITS = (1e2, 1e5)
# First and last module of what follows attention in a layer; between the two, each token is by itself.
AFTER_ATTENTION = (
    ("attention.output", "output"),  # BERT and its many relatives
    ("mlp_norm", "mlp"),  # ModernBERT
    ("sa_layer_norm", "output_layer_norm"),  # DistilBERT
    ("attention.LayerNorm", "output"),  # MPNet
)


# What changes no logit where it is on, the cheapest to give up first; and that rows of a batch share a forward at all.
_SHORTCUTS, SHARED = ("fused", "short", "padding_free", "sparse"), "padding"


class Head(nn.Module):
    """A model that gives the losses of a packed batch's targets.

    What saves work and changes no logit is tried at construction on a small random batch, against the model as it came.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        with_fast_modules(model)
        self.model = model
        self.padding_free = False
        """Rows lie one after the other without padding, and attention keeps them apart (`minilm.attention`)."""
        self.alone = False
        """Padding would change the logits: a forward sees rows of one length only."""
        self._own_attention = model.config._attn_implementation
        self._single = False  # a forward sees one row only, as the plain model that all is compared with
        self.misread: tuple[int, ...] = ()
        """Special ids that inside a row would be read otherwise than by the model that has the row for itself."""
        self._offset = position_offset(model)
        self._inside: int | None = None  # a special id that stands in the rows of a trial
        self._masked = False  # without a mask, the model takes any token of padding's id for padding
        config = model.config.get_text_config()
        self._padding = max(0, getattr(config, "pad_token_id", None) or 0)
        ends = getattr(config, "eos_token_id", None)
        self._end: int | None = ends[0] if isinstance(ends, list) else ends
        named = (self._padding, self._end, getattr(config, "pad_index", None), _padding_row(model))
        self._special = sorted({id for id in named if id is not None and id < vocabulary_size(model)})
        self._chunked = bool(getattr(config, "attention_chunk_size", None))  # Llama 4's attention, which masks cut
        takes = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in takes
        self._always: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}

    @property
    def layers(self) -> nn.ModuleList | tuple[()]:
        """The model's layers in a row, or () where they cannot be told."""
        lists = [module for module in self.model.base_model.modules() if isinstance(module, nn.ModuleList)]
        count = getattr(self.model.config.get_text_config(), "num_hidden_layers", None)
        return next((layers for layers in lists if len(layers) == count), ())

    @property
    def described(self) -> str:
        """The kind of head, for people to read."""
        raise NotImplementedError

    @property
    def shortcuts(self) -> tuple[str, ...]:
        """The names of the shortcuts that are taken."""
        return tuple(name for name in _SHORTCUTS if getattr(self, name, False))

    @contextmanager
    def without(self, *names: str) -> Iterator[None]:
        """Without these shortcuts, of those that are taken, for a moment."""
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
        """The model as it came, which sees one row at a time, for a moment."""
        before = self.alone, self._single
        self.alone = self._single = True
        try:
            with self.without(*self.shortcuts):
                yield
        finally:
            self.alone, self._single = before

    def give_up(self, names: Sequence[str]) -> None:
        """Take these shortcuts no more."""
        for name in names:
            if name == SHARED:
                self.alone = self._single = True
            else:
                setattr(self, name, False)
        if "padding_free" in names:
            self.model.set_attn_implementation(self._own_attention)

    def logits(
        self, input_ids_T: Tensor, packing: Packing, target_index_N: Tensor, type_ids_T: Tensor | None = None
    ) -> Tensor:
        """Logits, one row for each of the N targets, which are at `target_index_N` among the T tokens."""
        raise NotImplementedError

    def _inputs(self, input_ids_T: Tensor, packing: Packing, type_ids_T: Tensor | None) -> dict[str, Any]:
        """What the model's forward takes for this batch, packed or padded."""
        if self.padding_free:
            more = to_round(len(input_ids_T), input_ids_T.device)  # each of them attends to itself alone
            # transformers hands a mask of four axes on as it is; packed_attention has no use for one.
            mask = torch.empty(1, 1, 1, 1, device=input_ids_T.device)
            ids_T = F.pad(input_ids_T, (0, more), value=self._padding)
            inputs = {"input_ids": ids_T[None], "attention_mask": mask, "packing": packing, **self._always}
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
        inputs = {"input_ids": ids_RxL, "attention_mask": self._mask_of_all(ids_RxL), **self._always}
        if type_ids_T is not None:
            inputs["token_type_ids"] = group.pad(type_ids_T)
        if group.place_T is not None:
            real_RxL = group.real(input_ids_T.device)
            inputs["input_ids"] = inputs["input_ids"].masked_fill(~real_RxL, self._padding)
            inputs["attention_mask"] = real_RxL.long()
            if type_ids_T is not None:
                inputs["token_type_ids"] = inputs["token_type_ids"].masked_fill(~real_RxL, 0)
        return inputs

    def _positions(self, input_ids_T: Tensor, packing: Packing) -> Tensor:
        """The position of each token as the model itself counts: RoBERTa gives none to a token of padding's id."""
        if not self._offset:
            return packing.position_T
        real_T = (input_ids_T != self._offset - 1).long()
        count_T = real_T.cumsum(0)
        before_T = ((count_T - real_T) * (packing.position_T == 0)).cummax(0).values  # of the rows before
        return (count_T - before_T) * real_T + self._offset - 1

    def _mask_of_all(self, ids_RxL: Tensor) -> Tensor | None:
        """The mask of rows without padding: none, where the model does not guess it from the ids."""
        return torch.ones_like(ids_RxL) if self._masked else None

    def _runs(self, input_ids_T: Tensor, packing: Packing, type_ids_T: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """For each run of rows of the same length: that length, and the logits that the model gives for these alone."""
        at = 0
        runs = [(length, [length]) for length in packing.lengths] if self._single else groupby(packing.lengths)
        for length, rows in runs:
            tokens = slice(at, at := at + length * len(list(rows)))
            ids_RxL = input_ids_T[tokens].view(-1, length)
            inputs = {"input_ids": ids_RxL, "attention_mask": self._mask_of_all(ids_RxL), **self._always}
            if type_ids_T is not None:
                inputs["token_type_ids"] = type_ids_T[tokens].view(-1, length)
            yield length, self.model(**inputs).logits

    def trial(self, lengths: Sequence[int]) -> tuple[Tensor, Packing]:
        """Random ids of rows of these lengths, which end as texts do and hold no padding, and how they lie."""
        device, size = next(self.model.parameters()).device, vocabulary_size(self.model)
        input_ids_T = torch.randint(0, size, (sum(lengths),), generator=torch.Generator().manual_seed(0))
        for id in self._special:
            input_ids_T[input_ids_T == id] = min({*range(9)} - {*self._special})
        if self._end is not None and self._end != self._padding and self._end < size:
            input_ids_T[torch.tensor(lengths).cumsum(0) - 1] = self._end  # BART reads a row's class off this token
        if self._inside is not None:
            starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
            input_ids_T[starts[::2] + torch.tensor(lengths)[::2] // 2] = self._inside
        packing = pack(lengths, grouped=self.padding_free).map(lambda tensor: tensor.to(device))
        return input_ids_T.to(device), packing

    def _probe_batches(self) -> Iterator[tuple[Tensor, Packing]]:
        """Two batches of four rows each, of odd and of even lengths: models pad to the multiple of a window."""
        longest = min(_PROBE, longest_input(self.model) or _PROBE)
        for first in (longest - 1 + longest % 2, 1 << (max(1, longest // 2).bit_length() - 1)):
            yield self.trial([first, first - first // 8, first - first // 8, min(first, 6)])

    def _probe(self) -> Tensor:
        """Logits of the small random batches as things are, N x V."""
        return torch.cat([self._probe_one(*batch) for batch in self._probe_batches()])

    def _probe_one(self, input_ids_T: Tensor, packing: Packing) -> Tensor:
        """Logits of one of them; the last three are of the last three rows."""
        raise NotImplementedError

    def _differs(self, expected_NxV: Tensor) -> str:
        """Why the probe's logits are not the expected ones; empty when they are."""
        try:
            logits_NxV = self._probe()
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"its head does not take single positions ({type(error).__name__}: {error})"
        scale = expected_NxV.abs().max()
        if logits_NxV.shape != expected_NxV.shape or not (logits_NxV - expected_NxV).abs().max() <= 1e-4 * scale:
            return "its head mixes positions"
        return ""

    def _leaks(self) -> bool:
        """Whether the tokens of the first row change logits of the others, however little.

        What crosses rows outside attention, as LFM2's convolutions do, may be next to nothing before training.
        """
        for input_ids_T, packing in self._probe_batches():
            first = packing.lengths[0]
            turned_T = torch.cat([input_ids_T[:first].flip(0), input_ids_T[first:]])
            before_3xV, after_3xV = (self._probe_one(ids_T, packing)[-3:] for ids_T in (input_ids_T, turned_T))
            if not bool((after_3xV - before_3xV).abs().max() <= 1e-6 * before_3xV.abs().max()):
                return True
        return False

    def _counts_rows(self, expected_NxV: Tensor) -> bool:
        """Whether it matters where in the batch a row begins: attention in Llama 4 counts the tokens of the batch."""
        with CountingFromFar({len(input_ids_T) for input_ids_T, _ in self._probe_batches()}):
            return self._differs(expected_NxV) != ""

    def _try_padded(self) -> Tensor:
        """Choose whether rows can be padded, or else share a forward; returns the logits of each row by itself."""
        self._masked = self._guesses_mask()
        self.alone = self._single = True
        expected_NxV = self._probe()
        self._single = False
        self._single = self._differs(expected_NxV) != ""
        self.alone = False
        self.alone = self._differs(expected_NxV) != "" or sees_padding(self.model, self._probe, self._padding)
        return expected_NxV

    def _guesses_mask(self) -> bool:
        """Whether a special id inside a row that comes without a mask is taken for padding, as in XLM."""
        for id in self._special:
            self._inside = id
            row_1xL = self.trial([7])[0][None]
            self._inside = None
            try:
                guessed, told = (
                    self.model(input_ids=row_1xL, attention_mask=mask, **self._always).logits
                    for mask in (None, torch.ones_like(row_1xL))
                )
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                continue
            if guessed.shape != told.shape or not (guessed - told).abs().max() <= 1e-4 * told.abs().max():
                return True
        return False

    def _find_misread(self) -> tuple[int, ...]:
        """`misread`, once the shortcuts are chosen."""
        found, chosen = [], (self.alone, self._single)
        for id in self._special:
            self._inside = id
            self.alone = self._single = True
            try:
                expected_NxV = self._probe()
            except (IndexError, RuntimeError, ValueError):
                expected_NxV = torch.zeros(0)
            self.alone, self._single = chosen
            if self._differs(expected_NxV):
                found.append(id)
        self._inside = None
        return tuple(found)

    def _try_padding_free(self, expected_NxV: Tensor) -> None:
        chosen = getattr(self.model, "attention_is_chosen", False)
        if chosen or self._chunked or not self.model._supports_attention_backend:
            return
        self.model.set_attn_implementation(ATTENTION)
        self.padding_free = True
        if self._differs(expected_NxV) or self._leaks() or self._counts_rows(expected_NxV):
            self.give_up(["padding_free"])


def _padding_row(model: PreTrainedModel) -> int | None:
    """The id whose embedding is not trained."""
    try:
        padding: int | None = getattr(model.get_input_embeddings(), "padding_idx", None)
    except NotImplementedError:
        return None
    return padding


class SparseHead(Head):
    """The losses of a language model at the targets of a packed batch, and little work besides.

    Four shortcuts, none of which changes a logit. Each is tried at construction on a small random batch against the
    model as it came, which sees one row at a time, and left out where the logits are not the same:

    - `sparse`: the head runs on the targets alone, which a hook on `model.base_model` gathers;
    - `padding_free`: rows lie one after the other without padding, and attention keeps them apart (`minilm.attention`);
    - `short`: what follows attention in the last layer runs on the targets alone;
    - `fused`: the last product of the head and the loss are taken together, in parts (`minilm.losses`).

    `reason` says why a model keeps its full head. `label_smoothing` counts in training, and not in evaluation.
    """

    def __init__(self, model: PreTrainedModel, *, label_smoothing: float = 0.0) -> None:
        super().__init__(model)
        self.label_smoothing, self.softmax, self._more = label_smoothing, softmax_in_place, 0
        self.sparse = self.short = self.fused = False
        self._last: Any = model.get_output_embeddings()
        self._target_index: Tensor | None = None
        self._ids: Tensor | None = None  # what the model takes, whose places the targets are among
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
    def described(self) -> str:
        return "sparse head" if self.sparse else f"full head ({self.reason})"

    def forward(
        self,
        input_ids_T: Tensor,
        packing: Packing,
        target_index_N: Tensor,
        target_ids_N: Tensor,
        type_ids_T: Tensor | None = None,
    ) -> Tensor:
        """-log p of the ids `target_ids_N` at the places `target_index_N` among the T tokens, nats, float32[N].

        Only their sum has a gradient where the model is `fused`: take `logits` for anything else.
        """
        kind, smoothing = input_ids_T.device.type, self.label_smoothing if self.training else 0.0
        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        if not self.fused or half:  # small probabilities need the scaled loss in half precision
            logits_NxV = self.logits(input_ids_T, packing, target_index_N, type_ids_T)
            return F.cross_entropy(logits_NxV.float(), target_ids_N, reduction="none", label_smoothing=smoothing)
        with left_out(self._last):
            hidden_NxH = self._logits(input_ids_T, packing, target_index_N, type_ids_T)
        weight, bias = self._last.weight, self._last.bias
        return linear_cross_entropy(hidden_NxH, weight, bias, target_ids_N, smoothing, self.softmax)

    def logits(
        self, input_ids_T: Tensor, packing: Packing, target_index_N: Tensor, type_ids_T: Tensor | None = None
    ) -> Tensor:
        """Logits, N x V, of the targets, which are at `target_index_N` among the T tokens."""
        return self._logits(input_ids_T, packing, target_index_N, type_ids_T)[: len(target_index_N)]

    def _logits(
        self, input_ids_T: Tensor, packing: Packing, target_index_N: Tensor, type_ids_T: Tensor | None
    ) -> Tensor:
        """The same, after which there may be rows of no meaning."""
        if self.alone:
            runs = self._runs(input_ids_T, packing, type_ids_T)
            return torch.cat([logits[:, :length].flatten(0, 1) for length, logits in runs])[target_index_N]
        inputs = self._inputs(input_ids_T, packing, type_ids_T)
        if not self.padding_free and (place_T := packing.groups[0].place_T) is not None:
            target_index_N = place_T[target_index_N]
        self._target_index, self._ids, self._gathered = (
            target_index_N if self.sparse else None,
            inputs["input_ids"],
            False,
        )
        self._more = to_round(len(target_index_N), input_ids_T.device)
        try:
            logits_RxLxV: Tensor = self.model(**inputs).logits
        finally:
            self._target_index = self._ids = self._shape = None
        if self._gathered:
            return logits_RxLxV[0]
        if not self.padding_free:
            logits_RxLxV = logits_RxLxV[:, : packing.groups[0].length]  # Perceiver has some for every place it knows
        return logits_RxLxV.flatten(0, 1)[target_index_N]

    def _probe_one(self, input_ids_T: Tensor, packing: Packing) -> Tensor:
        second, last = packing.lengths[0], len(input_ids_T)
        # More targets than any row has tokens: what takes them for a row's then shows.
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
            reason = self._differs(expected_NxV) or ("" if self._gathered else "its base model adds places of its own")
            self.sparse = reason == ""
            if self.sparse:
                break
            handle.remove()
        return reason

    def _try_short(self, expected_NxV: Tensor) -> None:
        # A layer that is computed again on the way back would no longer know the targets.
        if not self.sparse or not self.layers or computes_again(self.model):
            return
        for names in AFTER_ATTENTION:
            try:
                first, last = (self.layers[-1].get_submodule(name) for name in names)
            except AttributeError:
                continue
            handles = (first.register_forward_pre_hook(self._narrow), last.register_forward_hook(self._widen))
            self.short = True
            if not self._differs(expected_NxV):
                return
            self.short = False
            for handle in handles:
                handle.remove()

    def _try_fused(self, expected_NxV: Tensor) -> None:
        if isinstance(self._last, nn.Linear) and not self._changes_logits(expected_NxV):
            self.fused = True
            self.fused = not self._differs(expected_NxV)

    def _changes_logits(self, expected_NxV: Tensor) -> bool:
        """Whether anything follows the last product, as a cap that only large logits show."""
        product = self._last.forward
        for size in _PROBED_LOGITS:
            times = size / float(expected_NxV.abs().max().clamp(min=1e-9))
            with replaced(self._last, lambda x, times=times: times * product(x)):
                if self._differs(times * expected_NxV):
                    return True
        return False

    def _gather(self, module: nn.Module, inputs: object, output: Any) -> Any:
        if self._target_index is not None and self._is_of_all_places(output.last_hidden_state):
            output.last_hidden_state = self._at_targets(output.last_hidden_state, self._target_index)
            self._gathered = True
        return output

    def _is_of_all_places(self, hidden_RxLxH: Tensor) -> bool:
        """Whether its places are those of the model's input: Longformer adds padding to them, Perceiver has its own."""
        return self._ids is not None and hidden_RxLxH.shape[:2] == self._ids.shape

    def _narrow(self, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """Before the first module: only the targets go in. Where most tokens are targets, all of them do."""
        index, shape = self._target_index, inputs[0].shape
        if (
            index is None
            or not self.short
            or not self._is_of_all_places(inputs[0])
            or 2 * len(index) > shape[0] * shape[1]
        ):
            return None
        self._shape = shape
        return tuple(self._at_targets(hidden_RxLxH, index) for hidden_RxLxH in inputs)

    def _widen(self, module: nn.Module, inputs: object, output_1xNxH: Tensor) -> Any:
        """After the last one: each target back to its place, zeros elsewhere."""
        if self._shape is None or self._target_index is None:
            return None
        index, (rows, length, width), self._shape = self._target_index, self._shape, None
        zeros_RLxH = output_1xNxH.new_zeros(rows * length, width)
        return zeros_RLxH.index_copy(0, index, output_1xNxH[0, : len(index)]).view(rows, length, width)

    def _at_targets(self, hidden_RxLxH: Tensor, index_N: Tensor) -> Tensor:
        """Of all tokens the targets, and rows of zeros to a round number."""
        hidden_NxH = hidden_RxLxH.flatten(0, 1).index_select(0, index_N)
        return (F.pad(hidden_NxH, (0, 0, 0, self._more)) if self._more else hidden_NxH)[None]


def freeze_unused(head: Head) -> None:
    """Freeze the parameters that the logits do not depend on (poolers, for one): DDP would wait for their gradients.

    Raises ValueError for a model that cannot be trained on rows of any length, as Reformer and Funnel.
    """
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    ids_T, packing = head.trial([min(_PROBE, longest_input(head.model) or _PROBE) - 1, 1])
    try:
        with training_whole(head):
            logits_1xV = head.logits(ids_T, packing, torch.zeros_like(ids_T[:1]))
            gradients = torch.autograd.grad(logits_1xV.sum(), trained, allow_unused=True)
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{type(head.model).__name__} cannot be trained on rows of any length: {why}") from error
    for parameter in [p for p, gradient in zip(trained, gradients, strict=True) if gradient is None]:
        parameter.requires_grad_(False)
