"""Rows of different lengths without padding: one flat row of tokens, and groups of its rows for attention.

All layers of a transformer except attention work on each token alone. They take all tokens of a batch as one row.
Attention (`minilm.models.attention`) takes one group of rows at a time, as a rectangle, unless one GPU kernel computes
all rows. Short rows of different lengths share bins, in which a mask keeps them apart. So a few large matrix products
replace many small ones. Longer rows form small groups of similar length, which are padded to the longest of the group.

Axes: T tokens of the batch or group, R rows of a group, L padded length, A heads, D size of a head, H any other.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

_T = TypeVar("_T")

SHORT_ROW_TOKENS = 128
"""The length up to which rows share bins."""
# If the rows of a group differ in length, L is a multiple of this, except in a rectangular batch. So there are few
# shapes for which a kernel is compiled, and the softmax in bf16 is fast on CPUs.
_LENGTH_MULTIPLE = 32
# In a group of longer rows, the shortest has at least this share of the tokens of the longest, minus the slack.
_LEAST_SIMILARITY = 0.75
_SLACK_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """Rows that follow each other in the batch, as an R x L rectangle: R rows, or R bins with several rows each."""

    start: int
    """The index of the group's first token in the batch."""
    stop: int
    """The index after the group's last token in the batch."""
    rows: int
    """R."""
    length: int
    """L, at least the length of each row."""
    source_RL: Tensor | None
    """int64, the token of the group at each place of the rectangle. Padding repeats a token. None without padding."""
    place_T: Tensor | None
    """int64, the place of each token of the group in the rectangle. None without padding."""
    owner_RL: Tensor | None
    """int64, the number of the row at each place. Each place of padding has a number of its own. None without bins."""
    _cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def pad(self, x_TxH: Tensor) -> Tensor:
        """Return the group's tokens as R x L x H.

        The caller must ignore the values of padding, because no gradient flows back from them.
        """
        x_RLxH = x_TxH if self.source_RL is None else _Pad.apply(x_TxH, self.source_RL, self.place_T)  # type: ignore[no-untyped-call]
        return x_RLxH.view(self.rows, self.length, *x_TxH.shape[1:])

    def unpad(self, x_RxLxH: Tensor) -> Tensor:
        """Return the inverse of `pad`."""
        x_RLxH = x_RxLxH.flatten(0, 1)
        return x_RLxH if self.place_T is None else _Unpad.apply(x_RLxH, self.place_T)  # type: ignore[no-untyped-call]

    def pad_by_head(self, x_TxAxD: Tensor) -> Tensor:
        """Return the group's tokens as R x A x L x D, as `pad` and a transposition would, but in one copy."""
        heads = x_TxAxD.shape[1]
        if self.source_RL is None:
            return x_TxAxD.view(self.rows, self.length, *x_TxAxD.shape[1:]).transpose(1, 2)
        x_RALxD: Tensor = _Pad.apply(x_TxAxD.flatten(0, 1), *self._places_by_head(heads))  # type: ignore[no-untyped-call]
        return x_RALxD.view(self.rows, heads, self.length, -1)

    def unpad_by_head(self, x_RxAxLxD: Tensor) -> Tensor:
        """Return the inverse of `pad_by_head`."""
        heads = x_RxAxLxD.shape[1]
        if self.place_T is None:
            return x_RxAxLxD.transpose(1, 2).flatten(0, 1)
        x_TAxD: Tensor = _Unpad.apply(x_RxAxLxD.flatten(0, 2), self._places_by_head(heads)[1])  # type: ignore[no-untyped-call]
        return x_TAxD.view(-1, heads, x_RxAxLxD.shape[-1])

    def _places_by_head(self, heads: int) -> tuple[Tensor, Tensor]:
        """Return `source_RL` and `place_T` for each pair of token and head, int64[R A L] and int64[T A]."""
        assert self.source_RL is not None
        assert self.place_T is not None
        source_RL, place_T = self.source_RL, self.place_T

        def make() -> tuple[Tensor, Tensor]:
            head_A = torch.arange(heads, device=place_T.device)
            source_RxAxL = source_RL.view(self.rows, 1, self.length) * heads + head_A[:, None]
            row_T, at_T = place_T // self.length, place_T % self.length
            place_TxA = (row_T[:, None] * heads + head_A) * self.length + at_T[:, None]
            return source_RxAxL.flatten(), place_TxA.flatten()

        return self.cached(("places", heads), make)

    def token_mask(self, device: torch.device) -> Tensor:
        """Return a mask that is True for tokens and False for padding, bool, R x L."""
        real_RL = torch.ones(self.rows * self.length, dtype=torch.bool, device=device)
        if self.place_T is not None:
            real_RL = torch.zeros_like(real_RL).index_fill_(0, self.place_T, True)
        return real_RL.view(self.rows, self.length)

    def attention_bias(self, window: int | None, like: Tensor, *, causal: bool = False) -> Tensor | None:
        """Return the term to add to attention scores, R x 1 x L x L or a shape that broadcasts to it; None for zero.

        It has the dtype and device of `like`. A token sees the tokens of its row that are fewer than `window` places
        away. With `causal` it sees no later token, and so no padding, which comes last. Each place of padding sees at
        least one place, because its softmax would otherwise be NaN.
        """
        if window is not None and window >= self.length:
            window = None
        return self.cached((window, causal, like.dtype), lambda: self._make_bias(window, like, causal))

    def _make_bias(self, window: int | None, like: Tensor, causal: bool) -> Tensor | None:
        visible: Tensor | None = None
        if self.owner_RL is not None:
            owner_RxL = self.owner_RL.view(self.rows, self.length)
            visible = (owner_RxL[:, :, None] == owner_RxL[:, None, :])[:, None]
        elif self.place_T is not None and not causal:
            visible = self.token_mask(like.device)[:, None, None, :]
        if window is not None or causal:
            at_L = torch.arange(self.length, device=like.device)
            before_LxL = at_L[:, None] - at_L
            near_LxL = (before_LxL >= 0) if causal else torch.ones_like(before_LxL, dtype=torch.bool)
            if window is not None:
                near_LxL &= before_LxL.abs() < window
            visible = near_LxL if visible is None else (visible & near_LxL) | (before_LxL == 0)
        return None if visible is None else like.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)

    def cached(self, key: Any, make: Callable[[], _T]) -> _T:
        """Return what `make` returns, and call it only once for each `key`. All layers of a model need the same."""
        if key not in self._cache:
            self._cache[key] = make()
        value: _T = self._cache[key]
        return value

    def map(self, change: Callable[[Tensor], Tensor]) -> "RowGroup":
        """Return the group with `change` applied to its tensors, to move or pin them for example."""
        indices = (self.source_RL, self.place_T, self.owner_RL)
        source_RL, place_T, owner_RL = (None if index is None else change(index) for index in indices)
        return replace(self, source_RL=source_RL, place_T=place_T, owner_RL=owner_RL, _cache={})


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where the rows of a batch are in its flat row of T tokens."""

    position_T: Tensor
    """int64, the place of each token in its own row, from 0."""
    groups: tuple[RowGroup, ...]
    """All rows, in order."""
    lengths: tuple[int, ...]
    """The tokens of each row."""
    longest: int
    """The tokens of the longest row."""
    bounds_R1: Tensor
    """int32[R + 1] for all R rows of the batch, where each row begins, and the end of the last one."""
    tiles_B1: Tensor
    """int32[B + 1], the same for B tiles. A tile holds whole rows that follow each other: together at most
    SHORT_ROW_TOKENS, or one longer row."""
    rows_per_example: tuple[int, ...] | None = None
    """How many rows belong to each example; None if each row is an example."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Packing":
        """Return the packing with `change` applied to its tensors, to move or pin them for example."""
        groups = tuple(group.map(change) for group in self.groups)
        position_T, bounds_R1, tiles_B1 = (change(x) for x in (self.position_T, self.bounds_R1, self.tiles_B1))
        return replace(self, position_T=position_T, groups=groups, bounds_R1=bounds_R1, tiles_B1=tiles_B1)


def pack(lengths: Sequence[int], *, grouped: bool = True, multiple: int = 1) -> Packing:
    """Return the packing of rows of these lengths, in this order.

    lengths: the tokens of each row. If they are sorted, the groups are larger.
    grouped: False puts all rows into one group, for a model that needs a rectangular batch.
    multiple: the padded length of a group is a multiple of this.
    """
    groups: list[RowGroup] = []
    first = start = 0
    while first < len(lengths):
        last, low, high = first, lengths[first], lengths[first]
        while last < len(lengths) and (
            not grouped or high <= SHORT_ROW_TOKENS or low >= _LEAST_SIMILARITY * high - _SLACK_TOKENS
        ):
            last += 1
            if last < len(lengths):
                low, high = min(low, lengths[last]), max(high, lengths[last])
        groups.append(_build_group(np.array(lengths[first:last]), start, multiple, grouped=grouped))
        first, start = last, groups[-1].stop
    position_T = np.concatenate([np.arange(length) for length in lengths])
    return Packing(
        position_T=torch.from_numpy(position_T),
        groups=tuple(groups),
        lengths=tuple(lengths),
        longest=max(lengths),
        bounds_R1=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        tiles_B1=torch.tensor(_bound_tiles(lengths), dtype=torch.int32),
    )


def _bound_tiles(lengths: Sequence[int]) -> list[int]:
    """Return where each tile begins, and the end of the last one."""
    bounds, end = [0], 0
    for length in lengths:
        if end > bounds[-1] and end + length - bounds[-1] > SHORT_ROW_TOKENS:
            bounds.append(end)
        end += length
    return [*bounds, end]


def _build_group(lengths_R: Any, start: int, multiple: int, *, grouped: bool) -> RowGroup:
    """Return the group of rows of these lengths (an int64 array), whose first token is `start`."""
    count, tokens, longest = len(lengths_R), int(lengths_R.sum()), int(lengths_R.max())
    uneven = grouped and tokens < count * longest
    # Rows of one length need no bins.
    in_bins = uneven and longest <= SHORT_ROW_TOKENS
    step = math.lcm(_LENGTH_MULTIPLE, multiple) if uneven else multiple
    length = -(-longest // step) * step
    begin_R, rows = _fill_bins(lengths_R, length) if in_bins else (np.arange(count) * length, count)
    source_RL = place_T = owner_RL = None
    if in_bins or tokens < rows * length:
        first_R = np.cumsum(lengths_R) - lengths_R
        place = np.arange(tokens) + np.repeat(begin_R - first_R, lengths_R)
        source = np.zeros(rows * length, np.int64)
        source[place] = np.arange(tokens)
        source_RL, place_T = torch.from_numpy(source), torch.from_numpy(place)
    if in_bins:
        owner = -1 - np.arange(rows * length)
        owner[place] = np.repeat(np.arange(count), lengths_R)
        owner_RL = torch.from_numpy(owner)
    return RowGroup(
        start=start,
        stop=start + tokens,
        rows=rows,
        length=length,
        source_RL=source_RL,
        place_T=place_T,
        owner_RL=owner_RL,
    )


def _fill_bins(lengths_R: Any, size: int) -> tuple[Any, int]:
    """Return the start of each row in bins of `size` tokens, laid end to end, and the number of bins.

    Best fit decreasing (Johnson et al. 1974): the longest row first, each one into the fullest bin that has room for
    it.
    """
    begin_R = np.zeros_like(lengths_R)
    # For each amount of room, the ends of the bins that have so much room left.
    ends_by_room: list[list[int]] = [[] for _ in range(size + 1)]
    bins = 0
    for row in np.argsort(-lengths_R, kind="stable"):
        length = int(lengths_R[row])
        room = next((room for room in range(length, size) if ends_by_room[room]), size)
        if room == size:
            ends_by_room[size].append(bins * size)
            bins += 1
        begin_R[row] = end = ends_by_room[room].pop()
        ends_by_room[room - length].append(end + length)
    return begin_R, bins


class _Pad(torch.autograd.Function):
    """Select the rows `source` of `x`. The gradient is gathered by `place`, which leaves out padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return gradient.index_select(0, place), None, None


class _Unpad(torch.autograd.Function):
    """Select the rows `place` of `x`. No two places are the same, so that the gradient is copied and not summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.rows = x.shape[0]
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.rows, *gradient.shape[1:]).index_copy_(0, place, gradient), None
