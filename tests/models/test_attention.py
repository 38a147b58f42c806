"""Attention on a packed batch equals attention on one row at a time, with each kernel."""

import itertools
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
from minilm.data.packing import pack
from minilm.models import short_row_attention as short_rows
from minilm.models.attention import packed_attention
from minilm.models.sparse_head import SparseHead
from minilm.models.windowed_attention import chunk_size, gather_chunk_contexts
from tests.data.test_packing import LAYOUTS, MIXED, starts


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
        minilm.models.attention, "_products_are_faster", lambda group, query: products
    )  # the fused kernel is what GPUs take in any case
    words["packing"] = words["packing"].map(torch.clone)
    inputs = (nn.Module(), query, key[:, : 3 // shared], value[:, : 3 // shared], None)
    grouped, _ = packed_attention(*inputs, **words)
    monkeypatch.setattr(minilm.models.attention, "varlen_attn", flash, raising=False)
    monkeypatch.setattr(minilm.models.attention, "short_rows", short_rows, raising=False)  # on CPUs it is not there
    monkeypatch.setattr(minilm.models.attention, "_flash_attention_fits", lambda query, dropout: True)
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
    assert minilm.models.attention._flash_attention_fits(SimpleNamespace(**some), some["dropout"]) is taken
