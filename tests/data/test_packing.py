"""Packed rows equal the same rows padded by hand."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm.data.packing import SHORT_ROW_TOKENS, Packing, RowGroup, pack

CPU = torch.device("cpu")
MIXED = (40, 33, 12, 9, 9, 1, 1)
LAYOUTS = [
    pytest.param((7,), id="one row"),
    pytest.param((1,), id="one token"),
    pytest.param((1, 1, 1), id="single tokens"),
    pytest.param((16, 16, 16), id="equal"),
    pytest.param(MIXED, id="sorted"),
    pytest.param((9, 1, 40, 12, 33, 9, 1), id="unsorted"),
    pytest.param((128, 127, 3), id="up to the fused kernel"),
    pytest.param((150, 141, 129, 128, 20, 1), id="with the fused kernel"),
    pytest.param((300, 256, 256, 230, 150, 30), id="long"),
]
lengths_lists = st.lists(st.integers(1, 60), min_size=1, max_size=30)
long_lengths_lists = st.lists(st.integers(100, 300), min_size=1, max_size=12)


def starts(lengths: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)][:-1]


def rows_of(packing: Packing, lengths: Sequence[int]) -> list[list[int]]:
    """The lengths of the rows of each group."""
    left, own = iter(lengths), []
    for group in packing.groups:
        own.append([])
        while sum(own[-1]) < group.stop - group.start:
            own[-1].append(next(left))
    return own


@settings(deadline=None)
@given(lengths_lists | long_lengths_lists, st.booleans(), st.sampled_from([1, 8]))
def test_pad_puts_each_row_in_its_place_and_unpad_takes_it_back(
    lengths: list[int], grouped: bool, multiple: int
) -> None:
    x_TxH = torch.randn(sum(lengths), 2, dtype=torch.float64)
    packing = pack(lengths, grouped=grouped, multiple=multiple)
    rows, back = iter(x_TxH.split(lengths)), []
    for group, own in zip(packing.groups, rows_of(packing, lengths), strict=True):
        padded_RxLxH, real_RL = group.pad(x_TxH[group.start : group.stop]), group.token_mask(CPU).flatten()
        assert padded_RxLxH.shape == (group.rows, group.length, 2)
        assert group.rows == len(own) if group.owner_RL is None else group.rows <= len(own)
        owner_RL = torch.arange(len(own)).repeat_interleave(group.length) if group.owner_RL is None else group.owner_RL
        for number in range(len(own)):
            (at,) = torch.where((owner_RL == number) & real_RL)
            assert at.tolist() == list(range(at[0], at[0] + len(at)))  # side by side
            assert at[0] // group.length == at[-1] // group.length  # in one of the R
            assert torch.equal(padded_RxLxH.flatten(0, 1)[at], next(rows))
        assert real_RL.sum() == sum(own)
        back.append(group.unpad(padded_RxLxH))
    assert next(rows, None) is None
    assert torch.equal(torch.cat(back), x_TxH)
    assert packing.position_T.tolist() == [at for length in lengths for at in range(length)]


@pytest.mark.parametrize("lengths", [(4, 2, 3), (3, 3), (1, 5)], ids=str)
@pytest.mark.parametrize("multiple", [1, 8])
def test_gradients_pass_pad_and_unpad_as_they_pass_plain_indexing(lengths: tuple[int, ...], multiple: int) -> None:
    (group,) = pack(lengths, grouped=False, multiple=multiple).groups
    real_RxLx1 = group.token_mask(CPU)[..., None]
    x_TxH = torch.randn(sum(lengths), 3, dtype=torch.float64, requires_grad=True)
    y_RxLxH = torch.randn(group.rows, group.length, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: group.pad(x) * real_RxLx1, x_TxH)
    assert torch.autograd.gradcheck(group.unpad, y_RxLxH)

    weight_TxH = torch.randn_like(x_TxH)
    weight_RxLxH = torch.zeros_like(y_RxLxH)
    for row, (start, length) in enumerate(zip(starts(lengths), lengths, strict=True)):
        weight_RxLxH[row, :length] = weight_TxH[start : start + length]
    (pads,) = torch.autograd.grad((group.pad(x_TxH) * weight_RxLxH).sum(), x_TxH)
    (unpads,) = torch.autograd.grad((group.unpad(y_RxLxH) * weight_TxH).sum(), y_RxLxH)
    assert torch.equal(pads, weight_TxH)
    assert torch.equal(unpads, weight_RxLxH)


@pytest.mark.parametrize("lengths", [(4, 2, 3), (3, 3), (1, 5)], ids=str)
@pytest.mark.parametrize("multiple", [1, 8])
def test_pad_by_head_equals_pad_and_a_transposition(lengths: tuple[int, ...], multiple: int) -> None:
    (group,) = pack(lengths, grouped=False, multiple=multiple).groups
    x_TxAxD = torch.randn(sum(lengths), 2, 3, dtype=torch.float64, requires_grad=True)
    y_RxAxLxD = torch.randn(group.rows, 2, group.length, 3, dtype=torch.float64, requires_grad=True)
    real_Rx1xLx1 = group.token_mask(CPU)[:, None, :, None]
    for ours, reference, given_x in (
        (lambda x: group.pad_by_head(x) * real_Rx1xLx1, lambda x: group.pad(x).transpose(1, 2) * real_Rx1xLx1, x_TxAxD),
        (group.unpad_by_head, lambda y: group.unpad(y.transpose(1, 2)), y_RxAxLxD),
    ):
        result, expected = ours(given_x), reference(given_x)
        weight = torch.randn_like(expected)
        assert torch.equal(result, expected)
        gradients = [torch.autograd.grad((out * weight).sum(), given_x)[0] for out in (result, expected)]
        assert torch.equal(*gradients)


@settings(deadline=None)
@given(lengths_lists | long_lengths_lists, st.booleans())
def test_groups_hold_short_rows_or_rows_of_similar_length_and_are_as_large_as_they_can_be(
    lengths: list[int], sort: bool
) -> None:
    def similar(some: Sequence[int]) -> bool:
        return max(some) <= 128 or min(some) >= 0.75 * max(some) - 4

    lengths = sorted(lengths, reverse=True) if sort else lengths
    packing = pack(lengths)
    groups = rows_of(packing, lengths)
    assert list(itertools.chain(*groups)) == lengths
    for group, own in zip(packing.groups, groups, strict=True):
        uneven = min(own) < max(own)
        assert (group.owner_RL is not None) == (uneven and max(own) <= 128)
        assert group.length == (math.ceil(max(own) / 32) * 32 if uneven else max(own))
    assert [(group.start, group.stop - group.start) for group in packing.groups] == [
        (start, sum(group)) for start, group in zip(starts([sum(g) for g in groups]), groups, strict=True)
    ]
    assert all(similar(group) for group in groups)
    assert not any(similar([*group, after[0]]) for group, after in itertools.pairwise(groups))


@settings(deadline=None)
@given(lengths_lists)
def test_the_rows_of_no_two_bins_fit_into_one(lengths: list[int]) -> None:
    (group,) = pack([*lengths, 61, 64]).groups
    assert group.length == 64
    least = sorted(group.token_mask(CPU).sum(1).tolist())[:2]
    assert sum(least) > 64


def test_rows_of_equal_length_are_one_group_that_needs_no_padding() -> None:
    (group,) = pack([20] * 9).groups
    assert (group.rows, group.length, group.source_RL, group.place_T) == (9, 20, None, None)
    assert group.attention_bias(None, torch.empty(0)) is None


@pytest.mark.parametrize("multiple", [1, 8])
def test_ungrouped_rows_form_one_group(multiple: int) -> None:
    (group,) = pack(MIXED, grouped=False, multiple=multiple).groups
    assert (group.start, group.stop, group.rows, group.length) == (0, sum(MIXED), len(MIXED), 40)


@pytest.mark.parametrize("multiple", [8, 64])
def test_lengths_are_rounded_up_to_the_multiple(multiple: int) -> None:
    lengths = (300, 270, *MIXED)
    packing = pack(lengths, multiple=multiple)
    assert rows_of(packing, lengths) == [[300, 270], [*MIXED]]
    for group, longest in zip(packing.groups, (300, 40), strict=True):
        assert group.length == math.ceil(longest / max(32, multiple)) * max(32, multiple)


@pytest.mark.parametrize("window", [None, 4, 10**6])
@pytest.mark.parametrize("lengths", [(20, 20), (20, 18)], ids=["equal", "padded"])
def test_a_tensor_cached_for_one_device_is_not_used_on_another(lengths: tuple[int, ...], window: int | None) -> None:
    (group,) = pack(lengths).groups
    before = group.attention_bias(window, torch.empty(0))
    moved: RowGroup = group.map(lambda tensor: tensor.to("meta"))
    bias = moved.attention_bias(window, torch.empty(0, device="meta"))
    assert (bias is None) == (before is None)
    assert bias is None or bias.device.type == "meta"


@pytest.mark.parametrize("lengths", [(128, 100, 28, 28, 5, 1), (64, 64, 64), (3,), (1,) * 300, (300, 20, 20)])
def test_tiles_hold_whole_rows_and_as_many_as_fit(lengths: tuple[int, ...]) -> None:
    packing = pack(lengths)
    tiles, bounds = packing.tiles_B1.tolist(), packing.bounds_R1.tolist()
    assert tiles[0] == 0
    assert tiles[-1] == sum(lengths)
    assert set(tiles) <= set(bounds)
    assert all(
        stop - start <= SHORT_ROW_TOKENS or (start, stop) == (0, 300) for start, stop in itertools.pairwise(tiles)
    )
    assert all(
        bounds[bounds.index(stop) + 1] - start > SHORT_ROW_TOKENS for start, stop in itertools.pairwise(tiles[:-1])
    )
    assert packing.longest == max(lengths)
