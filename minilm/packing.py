"""Rows of different lengths without padding: one flat row of tokens, and attention that keeps to each row of it.

Every layer of a transformer but attention works on each token alone, so it can take the tokens of a batch as one row,
concatenated. Attention is one kernel for all rows where there is one (FlashAttention, Dao 2023, in half precision on
GPUs), and else looks at small groups of rows of similar length at a time, padded inside the group.

Axes: T tokens of the batch, R rows and L padded length of a group, A heads, D size of a head.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from minilm.dropout import dropout as drop

ATTENTION = "minilm_packed"  # the name under which transformers knows `packed_attention`
_SIMILAR, _SLACK = 0.75, 4  # rows of one group are no shorter than this share of the longest, less some tokens
_SHORT = 128  # up to this length plain matrix products beat the fused kernel on a CPU, backward above all
# What models hand to attention that does not change its result; whatever else they hand over, it must know about.
_HARMLESS = {
    *("position_ids", "cache_position", "use_cache", "past_key_values", "deterministic", "return_dict"),
    *("output_attentions", "output_hidden_states", "token_type_ids"),
}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows that follow each other in the batch, seen as R x L."""

    start: int
    """Where its tokens begin in the batch."""
    stop: int
    """Where they end."""
    rows: int
    length: int
    """L: the longest row."""
    source_RL: Tensor | None
    """int64, which of the group's tokens each place holds (padding repeats a token); None where no row is padded."""
    place_T: Tensor | None
    """int64, the place of each of the group's tokens; None where no row is padded."""
    _bias: dict[tuple[int | None, bool], Tensor | None] = field(default_factory=dict, compare=False, repr=False)
    _by_head: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def pad(self, x_TxH: Tensor) -> Tensor:
        """The group's tokens, one row each, as R x L x H. No gradient flows from padding: let nothing depend on it."""
        x_RLxH = x_TxH if self.source_RL is None else _Pad.apply(x_TxH, self.source_RL, self.place_T)  # type: ignore[no-untyped-call]
        return x_RLxH.view(self.rows, self.length, *x_TxH.shape[1:])

    def unpad(self, x_RxLxH: Tensor) -> Tensor:
        """The inverse of `pad`."""
        x_RLxH = x_RxLxH.flatten(0, 1)
        return x_RLxH if self.place_T is None else _Unpad.apply(x_RLxH, self.place_T)  # type: ignore[no-untyped-call]

    def by_head(self, x_TxAxD: Tensor) -> Tensor:
        """The group's tokens as R x A x L x D: `pad`, and each head's rows together, in one go."""
        heads = x_TxAxD.shape[1]
        if self.source_RL is None:
            return x_TxAxD.view(self.rows, self.length, *x_TxAxD.shape[1:]).transpose(1, 2)
        x_RALxD: Tensor = _Pad.apply(x_TxAxD.flatten(0, 1), *self._places(heads))  # type: ignore[no-untyped-call]
        return x_RALxD.view(self.rows, heads, self.length, -1)

    def from_heads(self, x_RxAxLxD: Tensor) -> Tensor:
        """The inverse of `by_head`."""
        heads = x_RxAxLxD.shape[1]
        if self.place_T is None:
            return x_RxAxLxD.transpose(1, 2).flatten(0, 1)
        x_TAxD: Tensor = _Unpad.apply(x_RxAxLxD.flatten(0, 2), self._places(heads)[1])  # type: ignore[no-untyped-call]
        return x_TAxD.view(-1, heads, x_RxAxLxD.shape[-1])

    def _places(self, heads: int) -> tuple[Tensor, Tensor]:
        """`source_RL` and `place_T` for `by_head`: a token and head each, int64[R A L] and int64[T A]."""
        if heads not in self._by_head:
            assert self.source_RL is not None
            assert self.place_T is not None
            head_A = torch.arange(heads, device=self.place_T.device)
            source_RxAxL = self.source_RL.view(self.rows, 1, self.length) * heads + head_A[:, None]
            row_T, at_T = self.place_T // self.length, self.place_T % self.length
            place_TxA = (row_T[:, None] * heads + head_A) * self.length + at_T[:, None]
            self._by_head[heads] = source_RxAxL.flatten(), place_TxA.flatten()
        return self._by_head[heads]

    def real(self, device: torch.device) -> Tensor:
        """bool, R x L: where there is a token and no padding."""
        real_RL = torch.ones(self.rows * self.length, dtype=torch.bool, device=device)
        if self.place_T is not None:
            real_RL = torch.zeros_like(real_RL).index_fill_(0, self.place_T, True)
        return real_RL.view(self.rows, self.length)

    def bias(self, window: int | None, device: torch.device, *, causal: bool = False) -> Tensor | None:
        """What to add to attention's scores, R x 1 x L x L or a shape that broadcasts to it; None for nothing.

        A token sees the tokens of its row that are fewer than `window` away, and with `causal` none that come after it,
        so that it never sees padding, which comes last. Padding sees itself at least, so that its softmax, which
        nothing reads, is a number.
        """
        if window is not None and window >= self.length:
            window = None
        if (window, causal) not in self._bias:
            seen: Tensor | None = None
            if self.place_T is not None and not causal:
                seen = self.real(device)[:, None, None, :]
            if window is not None or causal:
                at_L = torch.arange(self.length, device=device)
                before_LxL = at_L[:, None] - at_L
                near_LxL = (before_LxL >= 0) if causal else torch.ones_like(before_LxL, dtype=torch.bool)
                if window is not None:
                    near_LxL &= before_LxL.abs() < window
                seen = near_LxL if seen is None else (seen & near_LxL) | (before_LxL == 0)
            bias = None if seen is None else torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)
            self._bias[window, causal] = bias
        return self._bias[window, causal]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Group":
        """The group with its tensors changed: moved, pinned."""
        source_RL, place_T = (None if index is None else change(index) for index in (self.source_RL, self.place_T))
        return replace(self, source_RL=source_RL, place_T=place_T, _bias={}, _by_head={})


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a batch's rows lie in its flat row of T tokens."""

    position_T: Tensor
    """int64, the place of each token in its own row, from 0."""
    groups: tuple[Group, ...]
    lengths: tuple[int, ...]
    """Tokens of each row."""
    bounds_R1: Tensor
    """int32[R + 1], where each row begins, and where the last one ends."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Packing":
        """The packing with its tensors changed: moved, pinned."""
        groups = tuple(group.map(change) for group in self.groups)
        return replace(self, position_T=change(self.position_T), bounds_R1=change(self.bounds_R1), groups=groups)


def pack(lengths: Sequence[int], *, grouped: bool = True, multiple: int = 1) -> Packing:
    """The packing of rows of these lengths in this order, best sorted by length.

    `grouped=False` makes one group of all of them, for a model that must see its batch padded. `multiple`: padded
    lengths are rounded up to it.
    """
    groups: list[Group] = []
    first = start = 0
    while first < len(lengths):
        last, low, high = first, lengths[first], lengths[first]
        while last < len(lengths) and (not grouped or low >= _SIMILAR * high - _SLACK):
            last += 1
            if last < len(lengths):
                low, high = min(low, lengths[last]), max(high, lengths[last])
        groups.append(_group(np.array(lengths[first:last]), start, multiple))
        first, start = last, groups[-1].stop
    position_T = np.concatenate([np.arange(length) for length in lengths])
    return Packing(
        position_T=torch.from_numpy(position_T),
        groups=tuple(groups),
        lengths=tuple(lengths),
        bounds_R1=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
    )


def _group(lengths_R: Any, start: int, multiple: int) -> Group:
    longest = -(-int(lengths_R.max()) // multiple) * multiple
    stop = start + int(lengths_R.sum())
    source_RL = place_T = None
    if (lengths_R < longest).any():
        real_RxL = np.arange(longest) < lengths_R[:, None]
        place = np.flatnonzero(real_RxL)
        source = np.zeros(real_RxL.size, np.int64)
        source[place] = np.arange(len(place))
        source_RL, place_T = torch.from_numpy(source), torch.from_numpy(place)
    return Group(start=start, stop=stop, rows=len(lengths_R), length=longest, source_RL=source_RL, place_T=place_T)


class _Pad(torch.autograd.Function):
    """Rows of `x` by `source`; the gradient comes back by `place`, which leaves out padding. Both only gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return gradient.index_select(0, place), None, None


class _Unpad(torch.autograd.Function):
    """Rows of `x` by `place`, of which no two are the same, so that the gradient is copied instead of added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.rows = x.shape[0]
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.rows, *gradient.shape[1:]).index_copy_(0, place, gradient), None


def packed_attention(
    module: nn.Module,
    query_1xAxTxD: Tensor,
    key_1xAxTxD: Tensor,
    value_1xAxTxD: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention inside each row of a packed batch, as an attention function of transformers.

    It is causal where `is_causal` says so, or else the module. Several heads may share one key and value (grouped query
    attention, Ainslie et al. 2023). A token after the last row attends to itself. Returns 1 x T x A x D. Without a
    `packing` it is transformers' own scaled dot product attention. Raises ValueError for what it does not know, such as
    sinks or a cap on the scores.
    """
    if packing is None:
        return sdpa_attention_forward(
            module,
            query_1xAxTxD,
            key_1xAxTxD,
            value_1xAxTxD,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            is_causal=is_causal,
            **kwargs,
        )
    if unknown := [name for name, value in kwargs.items() if value is not None and name not in _HARMLESS]:
        raise ValueError(f"attention with {', '.join(unknown)} is not known to minilm")
    states = [x[0].transpose(0, 1) for x in (query_1xAxTxD, key_1xAxTxD, value_1xAxTxD)]
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    shared = states[0].shape[1] // states[1].shape[1]
    states[1:] = [x if shared == 1 else x.repeat_interleave(shared, dim=1) for x in states[1:]]
    if _takes_rows_of_any_length(states[0], dropout):
        return _attend_at_once(packing, states, causal, sliding_window, scaling)[None], None
    sizes, parts = [group.stop - group.start for group in packing.groups], []
    sizes.append(states[0].shape[0] - sum(sizes))
    # torch.split, in place of slices: their gradients would each be as long as the batch.
    split = [torch.split(x_TxAxD, sizes) for x_TxAxD in states]
    for group, *own in zip(packing.groups, *split, strict=False):
        query, key, value = (group.by_head(x_TxAxD) for x_TxAxD in own)
        attended_RxAxLxD = _attend(group, query, key, value, causal, sliding_window, scaling, dropout)
        parts.append(group.from_heads(attended_RxAxLxD))
    parts.append(split[2][-1])  # a token that attends to itself alone gets its own value
    return torch.cat(parts)[None], None


def _takes_rows_of_any_length(query_TxAxD: Tensor, dropout: float) -> bool:
    """Whether FlashAttention takes these: on a GPU from Ampere on, in half precision, without dropout."""
    return (
        query_TxAxD.device.type == "cuda"
        and query_TxAxD.dtype in (torch.float16, torch.bfloat16)
        and query_TxAxD.shape[-1] % 8 == 0
        and query_TxAxD.shape[-1] <= 256
        and dropout == 0
        and torch.version.cuda is not None
        and "window_size" in inspect.signature(varlen_attn).parameters  # torch 2.11 has another way to say it
        and torch.cuda.get_device_capability(query_TxAxD.device) >= (8, 0)
    )


def _attend_at_once(
    packing: Packing, states: Sequence[Tensor], causal: bool, window: int | None, scaling: float | None
) -> Tensor:
    """What `packed_attention` computes, by one kernel for rows of any lengths.

    states: queries, keys and values, each T x A x D, as is what is returned.
    """
    near, longest = -1 if window is None else window - 1, max(packing.lengths)
    query_TxAxD, key_TxAxD, value_TxAxD = states
    attended: Any = varlen_attn(
        query_TxAxD,
        key_TxAxD,
        value_TxAxD,
        cu_seq_q=packing.bounds_R1,
        cu_seq_k=packing.bounds_R1,
        max_q=longest,
        max_k=longest,
        scale=scaling,
        window_size=(near, 0 if causal else near),
    )
    attended_TxAxD: Tensor = attended
    return attended_TxAxD


def _attend(
    group: Group,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    window: int | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """softmax(query key^T scaling + the group's bias) value, each R x A x L x D."""
    if query.device.type != "cpu" or group.length > _SHORT:
        plain = causal and (window is None or window >= group.length)  # the kernel then skips what is not seen
        bias = None if plain else group.bias(window, query.device, causal=causal)
        bias = bias if bias is None else bias.to(query.dtype)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout, is_causal=plain, scale=scaling
        )
    bias = group.bias(window, query.device, causal=causal)
    scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    weights = drop(scores.softmax(-1), dropout, training=dropout > 0)
    return weights.to(value.dtype) @ value


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
