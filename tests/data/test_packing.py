"""Packing: rows without padding against the same rows padded by hand, and attention against one row at a time."""

import itertools
import math
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import minilm.models.attention
import minilm.models.windowed_attention
from minilm.data.packing import SHORT_ROW_TOKENS, Packing, RowGroup, pack
from minilm.models import short_row_attention as short_rows
from minilm.models.attention import packed_attention
from minilm.models.sparse_head import SparseHead
from minilm.models.windowed_attention import chunk_size, gather_chunk_contexts

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


def states(tokens: int, dtype: torch.dtype = torch.float32, rows: int = 1) -> list[Tensor]:
    """Queries, keys and values of three heads of size 8, of the scale of a trained model's."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (rows, 3, tokens, 8)
    return [(2 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for _ in range(3)]


def attention_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    scaling: float,
    window: int | None,
    causal: bool = False,
) -> Tensor:
    """1 x T x A x D: each row by itself, softmax written out."""
    attended = []
    for start, length in zip(starts(lengths), lengths, strict=True):
        q, k, v = (x[0, :, start : start + length] for x in (query, key, value))
        scores = torch.einsum("aid,ajd->aij", q, k) * scaling
        at = torch.arange(length)
        if window is not None:
            scores[:, (at[:, None] - at).abs() >= window] = -torch.inf
        if causal:
            scores[:, at[:, None] < at] = -torch.inf
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        attended.append(torch.einsum("aij,ajd->iad", weights / weights.sum(-1, keepdim=True), v))
    return torch.cat(attended)[None]


@pytest.mark.parametrize("scaling", [None, 0.2])
@pytest.mark.parametrize("window", [None, 1, 5, 64, 1000])
@pytest.mark.parametrize("lengths", LAYOUTS)
@pytest.mark.parametrize(
    ("grouped", "multiple"), [(True, 1), (True, 8), (False, 1)], ids=["groups", "groups of 8", "one group"]
)
def test_attention_is_that_of_each_row_by_itself(
    lengths: tuple[int, ...], grouped: bool, multiple: int, window: int | None, scaling: float | None
) -> None:
    ours, theirs = states(sum(lengths)), states(sum(lengths), torch.float64)
    packing = pack(lengths, grouped=grouped, multiple=multiple)
    attended, weights = packed_attention(
        nn.Module(), *ours, torch.empty(1, 1, 1, 1), packing=packing, scaling=scaling, sliding_window=window
    )
    expected = attention_by_row(*theirs, lengths, 8**-0.5 if scaling is None else scaling, window)
    assert weights is None
    assert attended.shape == (1, sum(lengths), 3, 8)
    weight = torch.randn(attended.shape, generator=torch.Generator().manual_seed(0))
    pairs = [
        (attended, expected),
        *zip(
            torch.autograd.grad((attended * weight).sum(), ours),
            torch.autograd.grad((expected * weight).sum(), theirs),
            strict=True,
        ),
    ]
    for x, reference in pairs:
        assert x.isfinite().all()
        assert (x - reference).abs().max() <= 1e-5 * max(1, reference.abs().max())


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(128, 420), min_size=1, max_size=5).map(lambda lengths: sorted(lengths, reverse=True)),
    st.integers(1, 70) | st.sampled_from([16, 17, 18, 33, 65]),
    st.booleans(),
    st.sampled_from([1, 8]),
)
def test_attention_with_a_window_on_long_rows_is_that_of_each_row_by_itself(
    lengths: list[int], window: int, causal: bool, multiple: int
) -> None:
    ours, packing = states(sum(lengths), torch.float64), pack(lengths, multiple=multiple)
    attended, _ = packed_attention(nn.Module(), *ours, None, packing=packing, sliding_window=window, is_causal=causal)
    expected = attention_by_row(*ours, lengths, 8**-0.5, window, causal)
    torch.testing.assert_close(attended, expected)
    weight = torch.randn(attended.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = [torch.autograd.grad((result * weight).sum(), ours) for result in (attended, expected)]
    for found, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(found, reference)


@pytest.mark.parametrize(
    ("window", "length", "size"),
    [
        *((None, 999, None), (3, 127, None), (3, 128, 16), (17, 129, 16), (18, 129, 32)),
        *((34, 128, None), (65, 255, None), (65, 256, 64)),
    ],
)
def test_long_rows_are_cut_into_chunks_that_a_window_does_not_reach_across(
    window: int | None, length: int, size: int | None
) -> None:
    assert chunk_size(window, pack([length]).groups[0]) == size


def test_bins_are_not_cut_into_chunks() -> None:
    assert chunk_size(3, pack([128, 120]).groups[0]) is None


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [3, 17, 22, 33])
def test_chunks_in_bfloat16_see_a_width_with_a_fast_softmax(
    window: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [260, 250]
    ours, packing = states(sum(lengths), torch.bfloat16), pack(lengths)
    (group,) = packing.groups
    size = chunk_size(window, group)
    assert size is not None
    weight = torch.randn(ours[0].transpose(1, 2).shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    widths, results = [], []
    for vector in (32, 1):
        monkeypatch.setattr(minilm.models.windowed_attention, "_VECTOR", vector)
        key = group.pad_by_head(ours[1][0].transpose(0, 1))
        widths.append(gather_chunk_contexts(key, size, window, causal=causal).shape[3])
        words: dict[str, Any] = {"packing": pack(lengths), "sliding_window": window, "is_causal": causal}
        attended, _ = packed_attention(nn.Module(), *ours, None, **words)
        results.append([attended, *torch.autograd.grad((attended * weight).sum(), ours)])
    assert widths[1] == size + (1 if causal else 2) * (window - 1)
    assert widths[0] % 32 == 0
    assert 0 <= widths[0] - widths[1] < 32
    for found, reference in zip(*results, strict=True):
        assert (found - reference).abs().max() <= 2**-8 * reference.abs().max()


def test_queries_and_keys_in_float32_attend_in_the_type_of_autocast() -> None:
    query, key, value = states(260 + 250)
    words: dict[str, Any] = {"packing": pack([260, 250]), "sliding_window": 22, "is_causal": True}
    expected, _ = packed_attention(nn.Module(), query, key, value, None, **words)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = packed_attention(nn.Module(), query, key, value.bfloat16(), None, **words)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() <= 2**-6 * expected.abs().max()


@pytest.mark.parametrize(
    ("dtype", "length", "device", "products"),
    [
        (torch.float32, 128, "cpu", True),
        (torch.float32, 129, "cpu", False),
        (torch.bfloat16, 512, "cpu", True),
        (torch.bfloat16, 513, "cpu", False),
        (torch.bfloat16, 20, "meta", False),
    ],
)
def test_short_rows_are_attended_by_plain_products(
    dtype: torch.dtype, length: int, device: str, products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = []
    monkeypatch.setattr(
        minilm.models.attention.F, "scaled_dot_product_attention", lambda q, *_, **__: fused.append(1) or q
    )
    few = [x.detach().to(device) for x in states(length, dtype)]
    packing = pack([length]).map(lambda tensor: tensor.to(device))
    packed_attention(nn.Module(), *few, None, packing=packing)
    assert fused == ([] if products else [1])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [(5, 4, 1), (131, 130), (520, 515)], ids=str)
def test_attention_in_bfloat16_is_near_and_finite(lengths: tuple[int, ...], window: int | None) -> None:
    ours = states(sum(lengths), torch.bfloat16)
    attended, _ = packed_attention(nn.Module(), *ours, None, packing=pack(lengths), sliding_window=window)
    expected = attention_by_row(*(x.detach().double() for x in ours), lengths, 8**-0.5, window)
    assert attended.dtype == torch.bfloat16
    assert (attended - expected).abs().max() <= 0.02 * expected.abs().max()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(attended.sum(), ours))


@pytest.mark.parametrize(("length", "window"), [(40, None), (150, None), (150, 9)])
def test_dropout_leaves_out_weights_and_keeps_their_mean(length: int, window: int | None) -> None:
    torch.manual_seed(0)
    query, key = (x.detach() for x in states(length)[:2])
    value = torch.ones_like(key)  # so that what comes out is the sum of the weights that are left
    words: dict[str, Any] = {"packing": pack([length]), "sliding_window": window}
    attended, _ = packed_attention(nn.Module(), query, key, value, None, **words, dropout=0.5)
    exact, _ = packed_attention(nn.Module(), query, key, value, None, **words)
    torch.testing.assert_close(exact, torch.ones_like(exact))
    assert attended.std() > 0.1
    assert abs(float(attended.mean()) - 1) < 0.1


@pytest.mark.parametrize("masked", [False, True])
def test_without_a_packing_attention_is_that_of_transformers(masked: bool) -> None:
    query, key, value = states(20, rows=2)
    module = nn.Module()
    module.is_causal = False
    mask = (torch.arange(20) < torch.tensor([20, 11])[:, None])[:, None, None] if masked else None
    words = {"scaling": 0.3, "dropout": 0.0}
    ours, _ = packed_attention(module, query, key, value, mask, sliding_window=4, **words)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, **words)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
@pytest.mark.parametrize("lengths", [(60, 58, 31, 20, 20, 1), (150, 20, 140), (190, 180)], ids=str)
def test_no_token_sees_another_row(kind: str, lengths: tuple[int, ...]) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    local = {"local_attention": 16} if kind == "modernbert" else {}
    special = {f"{role}_token_id": 0 for role in ("pad", "bos", "eos", "cls", "sep")}
    config = AutoConfig.for_model(
        kind, **size, **local, **special, vocab_size=90, max_position_embeddings=200, initializer_range=0.3
    )
    torch.manual_seed(0)
    head = SparseHead(AutoModelForMaskedLM.from_config(config)).eval()
    assert head.padding_free
    ids_T = torch.tensor(random.Random(0).choices(range(5, 90), k=sum(lengths)))
    packing, everywhere = pack(lengths), torch.arange(sum(lengths))
    with torch.no_grad():
        before = head.logits(ids_T, packing, everywhere)
        assert before.isfinite().all()
        for start, length in zip(starts(lengths), lengths, strict=True):
            own = (start <= everywhere) & (everywhere < start + length)
            after = head.logits(torch.where(own, 5 + (ids_T - 4) % 85, ids_T), packing, everywhere)
            assert (after - before)[~own].abs().max() <= 1e-6
            assert (after - before)[own].abs().amax(1).min() > 1e-3


def flash(
    query_TxAxD: Tensor,
    key_TxAxD: Tensor,
    value_TxAxD: Tensor,
    *,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
    window_size: tuple[int, int],
) -> Tensor:
    """What torch.nn.attention.varlen.varlen_attn computes, a row at a time."""
    assert cu_seq_q.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == cu_seq_q.diff().max()
    left, right = (10**6 if side == -1 else side for side in window_size)
    attended = []
    for start, stop in itertools.pairwise(cu_seq_q.tolist()):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query_TxAxD, key_TxAxD, value_TxAxD))
        at_L = torch.arange(stop - start)
        ahead_LxL = at_L - at_L[:, None]
        scores_AxLxL = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores_AxLxL = scores_AxLxL.masked_fill((ahead_LxL > right) | (-ahead_LxL > left), -torch.inf)
        attended.append((scores_AxLxL.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(attended)


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("scaling", [None, 0.2])
@pytest.mark.parametrize("window", [None, 1, 5, 1000])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("products", [True, False], ids=["products", "fused kernel"])
def test_the_variable_length_kernel_gets_arguments_for_the_same_attention(
    products: bool,
    causal: bool,
    window: int | None,
    scaling: float | None,
    shared: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, key, value = states(sum(MIXED))
    words = {"packing": pack(MIXED), "scaling": scaling, "sliding_window": window, "is_causal": causal}
    monkeypatch.setattr(
        minilm.models.attention, "_by_products", lambda group, query: products
    )  # the fused kernel is what GPUs take in any case
    words["packing"] = words["packing"].map(torch.clone)
    inputs = (nn.Module(), query, key[:, : 3 // shared], value[:, : 3 // shared], None)
    grouped, _ = packed_attention(*inputs, **words)
    monkeypatch.setattr(minilm.models.attention, "varlen_attn", flash)
    monkeypatch.setattr(minilm.models.attention, "short_rows", short_rows, raising=False)  # on CPUs it is not there
    monkeypatch.setattr(minilm.models.attention, "_takes_rows_of_any_length", lambda query, dropout: True)
    at_once, weights = packed_attention(*inputs, **words)
    assert weights is None
    torch.testing.assert_close(at_once, grouped, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"device": torch.device("cpu")}, False),
        ({"dtype": torch.float32}, False),
        ({"shape": (5, 2, 12)}, False),
        ({"shape": (5, 2, 264)}, False),
        ({"dropout": 0.1}, False),
        ({"capability": (7, 5)}, False),
    ],
)
def test_when_the_variable_length_kernel_is_used(
    change: dict[str, Any], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "shape": (5, 2, 64)}
    some = {**some, "dropout": 0.0, "capability": (9, 0), **change}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: some["capability"])
    assert minilm.models.attention._takes_rows_of_any_length(SimpleNamespace(**some), some["dropout"]) is taken


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
