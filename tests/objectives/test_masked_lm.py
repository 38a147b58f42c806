"""Masked LM: the statistics of the masks, what they depend on and what not, and the loss against transformers' own."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minilm.config import MaskedLM
from minilm.data.micro_batch import MicroBatch, loss_sum, target_losses
from minilm.models.sparse_head import SparseHead
from minilm.objectives.factory import build_objective
from minilm.objectives.masking import MaskedLMCollator
from tests.reference import NO_EXAMPLES, pad_rows

Rows = list[NDArray[np.int64]]
RATE = 0.15


def _z(count: float, trials: int, probability: float) -> float:
    """Return how many standard deviations a binomial count is above its mean."""
    return (count - trials * probability) / math.sqrt(trials * probability * (1 - probability))


def _within(count: float, trials: int, probability: float) -> bool:
    """Return whether a binomial count lies within four standard deviations of its mean."""
    return abs(_z(count, trials, probability)) < 4


def _z_uniform(counts: NDArray[np.int64]) -> float:
    """How many of its standard deviations Pearson's chi-square of counts that should be equal is above its mean."""
    freedom = len(counts) - 1
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return float((chi_square - freedom) / math.sqrt(2 * freedom))


def _collator(
    tokenizer: PreTrainedTokenizerBase, seed: int = 0, rate: float = RATE, padded: bool = False, multiple: int = 1
) -> MaskedLMCollator:
    return build_objective(MaskedLM(rate=rate)).collator(
        tokenizer, NO_EXAMPLES, seed=seed, padded=padded, multiple=multiple
    )


def _chosen(batch: MicroBatch, rows: int) -> NDArray[np.bool_]:
    """Which tokens are targets, B x L, of so many rows of one length."""
    chosen_T = np.zeros(len(batch.input_ids_T), bool)
    chosen_T[batch.target_index_N.numpy()] = True
    return chosen_T.reshape(rows, -1)


@pytest.fixture(scope="module")
def special(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return sorted(tokenizer.all_special_ids)


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerBase, special: list[int]) -> Rows:
    """2,200 rows of 500 tokens, 1,100,000 in all: a tenth special, the others uniform over the ordinary ids."""
    rng = np.random.default_rng(0)
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), special)
    ids_BxL = rng.choice(ordinary, (2200, 500))
    return list(np.where(rng.random(ids_BxL.shape) < 0.1, rng.choice(special, ids_BxL.shape), ids_BxL))


@pytest.fixture(scope="module")
def batch(tokenizer: PreTrainedTokenizerBase, rows: Rows) -> MicroBatch:
    return _collator(tokenizer)(rows, np.arange(len(rows)), 0)


@pytest.mark.scorecard(8)
def test_the_rate_is_kept_and_no_special_token_is_chosen(
    batch: MicroBatch, rows: Rows, special: list[int], figure: Callable[[str], None]
) -> None:
    ordinary_BxL = ~np.isin(rows, special)
    chosen_BxL = _chosen(batch, len(rows))
    assert not (chosen_BxL & ~ordinary_BxL).any()
    z_score = _z(chosen_BxL.sum(), ordinary_BxL.sum(), RATE)
    assert abs(z_score) < 4
    assert len(batch.input_ids_T) > ordinary_BxL.sum() > 950_000
    figure(f"{len(batch.input_ids_T):,} tokens, no special token masked; z-scores: masking rate {z_score:+.1f}")


@pytest.mark.scorecard(8)
def test_80_10_10(
    batch: MicroBatch, tokenizer: PreTrainedTokenizerBase, special: list[int], figure: Callable[[str], None]
) -> None:
    new_N = batch.input_ids_T[batch.target_index_N]
    masked, same = int((new_N == tokenizer.mask_token_id).sum()), int((new_N == batch.target_ids_N).sum())
    by_chance = 0.1 / (len(tokenizer) - len(special))  # a replacement that happens to be the same token
    expected = ((masked, 0.8), (batch.target_count - masked - same, 0.1 - by_chance), (same, 0.1 + by_chance))
    z_scores = [_z(count, batch.target_count, share) for count, share in expected]
    assert max(map(abs, z_scores)) < 4
    figure("80/10/10 " + ", ".join(f"{z:+.1f}" for z in z_scores))


@pytest.mark.scorecard(8)
def test_replacements_are_uniform_over_the_ordinary_tokens(
    batch: MicroBatch, tokenizer: PreTrainedTokenizerBase, special: list[int], figure: Callable[[str], None]
) -> None:
    new_N = batch.input_ids_T[batch.target_index_N].numpy()
    drawn = new_N[(new_N != batch.target_ids_N.numpy()) & (new_N != tokenizer.mask_token_id)]
    counts = np.bincount(drawn, minlength=len(tokenizer))
    assert counts[special].sum() == 0
    assert np.delete(counts, special).all()
    z_score = _z_uniform(np.delete(counts, special))
    assert abs(z_score) < 4
    figure(f"uniform replacements {z_score:+.1f}, no special token drawn")


def test_every_position_and_example_is_chosen_alike(batch: MicroBatch, rows: Rows, special: list[int]) -> None:
    chosen_BxL, ordinary_BxL = _chosen(batch, len(rows)), ~np.isin(rows, special)
    for axis in (0, 1):
        hits, trials = chosen_BxL.sum(axis), ordinary_BxL.sum(axis)
        z_score = (hits - trials * RATE) / np.sqrt(trials * RATE * (1 - RATE))
        assert abs((z_score**2).sum() - len(hits)) < 4 * math.sqrt(2 * len(hits))


def test_targets_are_the_original_ids_and_everything_else_is_left_alone(batch: MicroBatch, rows: Rows) -> None:
    restored = batch.input_ids_T.clone()
    restored[batch.target_index_N] = batch.target_ids_N
    assert np.array_equal(restored.reshape(len(rows), -1), rows)


@pytest.mark.parametrize(
    ("seed", "epoch", "example", "position"),
    [
        (1, 0, 0, 0),
        (2**63 - 1, 0, 0, 0),
        (None, 0, 0, 0),
        (0, 1, 0, 0),
        (1, -1, 0, 0),
        (0, 0, 1, 0),
        (0, 1, -1, 0),
        (0, 0, 0, 1),
        (0, 0, 1, -1),
    ],
    ids=str,
)
def test_masks_of_another_seed_epoch_example_or_position_are_independent(
    tokenizer: PreTrainedTokenizerBase, seed: int | None, epoch: int, example: int, position: int
) -> None:
    rows, examples = list(np.full((1000, 512), len(tokenizer) - 1)), np.arange(1000) + 1
    first = _chosen(_collator(tokenizer)(rows, examples, 1), 1000)
    other = build_objective(MaskedLM(rate=RATE)).collator(tokenizer, NO_EXAMPLES, seed=seed, padded=False, multiple=1)
    second = np.roll(_chosen(other(rows, examples + example, 1 + epoch), 1000), position, axis=1)
    assert _within(second.sum(), second.size, RATE)
    assert _within((first & second).sum(), first.size, RATE**2)


def test_a_mask_does_not_depend_on_the_rest_of_its_batch(tokenizer: PreTrainedTokenizerBase, rows: Rows) -> None:
    lengths = np.random.default_rng(1).integers(3, 90, 64)
    short = [row[:length] for row, length in zip(rows, lengths, strict=False)]
    examples = np.arange(64) + 10**9

    def fates(
        order: NDArray[np.int64], micro_batch: int, padded: bool, multiple: int
    ) -> dict[int, tuple[list[int], ...]]:
        found: dict[int, tuple[list[int], ...]] = {}
        collator = _collator(tokenizer, padded=padded, multiple=multiple)
        for ids in np.split(order, range(micro_batch, len(order), micro_batch)):
            batch = collator([short[i] for i in ids], examples[ids], 3)
            at_N, stop = batch.target_index_N.numpy(), 0
            for i in ids:
                start, stop = stop, stop + lengths[i]
                own = (start <= at_N) & (at_N < stop)
                inputs = batch.input_ids_T[start:stop].tolist()
                found[int(i)] = (inputs, (at_N[own] - start).tolist(), batch.target_ids_N.numpy()[own].tolist())
            assert stop == len(batch.input_ids_T)
        return found

    alone = fates(np.arange(64), 1, False, 1)
    for micro_batch, padded, multiple in ((64, False, 1), (64, True, 8), (7, True, 1), (7, False, 1), (5, False, 64)):
        assert fates(np.random.default_rng(micro_batch).permutation(64), micro_batch, padded, multiple) == alone


def test_evaluation_masks_are_the_same_in_every_run_and_belong_to_none(tokenizer: PreTrainedTokenizerBase) -> None:
    rows, examples = list(np.full((100, 512), len(tokenizer) - 1)), np.arange(100)

    def evaluation(objective: MaskedLM) -> MicroBatch:
        return build_objective(objective).collator(tokenizer, NO_EXAMPLES, seed=None, padded=False, multiple=1)(
            rows, examples, 0
        )

    first, second = evaluation(MaskedLM(eval_rate=0.3)), evaluation(MaskedLM(rate=0.5, eval_rate=0.3))
    assert torch.equal(first.input_ids_T, second.input_ids_T)
    assert torch.equal(first.target_index_N, second.target_index_N)
    assert _within(first.target_count, 100 * 512, 0.3)


@pytest.mark.parametrize(("padded", "multiple"), [(False, 1), (False, 8), (True, 1), (True, 8)])
@pytest.mark.parametrize("lengths", [(16, 16), (16, 3), (5, 11, 2)])
def test_rows_follow_each_other_and_are_padded_to_the_longest_if_padded_is_set(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, lengths: tuple[int, ...], padded: bool, multiple: int
) -> None:
    own = [row[:length] for row, length in zip(rows, lengths, strict=False)]
    batch = _collator(tokenizer, padded=padded, multiple=multiple)(own, np.arange(len(own)), 0)
    restored = batch.input_ids_T.index_copy(0, batch.target_index_N, batch.target_ids_N)
    assert restored.tolist() == np.concatenate(own).tolist()
    assert batch.packing.position_T.tolist() == [position for length in lengths for position in range(length)]
    groups = batch.packing.groups
    assert [group.start for group in groups] == [0, *(group.stop for group in groups)][:-1]
    assert groups[-1].stop == sum(lengths)
    if padded:
        (group,) = groups
        width = math.ceil(max(lengths) / multiple) * multiple
        assert (group.rows, group.length) == (len(lengths), width)
        assert torch.equal(group.token_mask(torch.device("cpu")), torch.arange(width) < torch.tensor(lengths)[:, None])
        assert (group.place_T is None) == ({*lengths} == {width})


@pytest.mark.parametrize("padded", [False, True])
def test_a_batch_moves_with_all_that_it_holds(tokenizer: PreTrainedTokenizerBase, rows: Rows, padded: bool) -> None:
    own = [row[:length] for row, length in zip(rows, (20, 19, 3), strict=False)]
    moved = _collator(tokenizer, padded=padded)(own, np.arange(3), 0).to(torch.device("meta"))
    values = [*vars(moved).values(), *vars(moved.packing).values()]
    values += [value for group in moved.packing.groups for value in vars(group).values()]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6 + (2 if padded else 3)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_tokenizer_without_a_mask_token_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1}))
    maskless = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")
    with pytest.raises(ValueError, match=r"^the tokenizer has no mask token[^\n]*--tokens.name\Z"):
        _collator(maskless)


@pytest.fixture(scope="module")
def bert(tokenizer: PreTrainedTokenizerBase) -> BertForMaskedLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes)).eval()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("lengths", [(40, 40), (100, 7, 33)])
def test_the_loss_is_that_of_transformers_times_the_number_of_targets(
    bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerBase, rows: Rows, lengths: tuple[int, ...], padded: bool
) -> None:
    own = [row[:length] for row, length in zip(rows, lengths, strict=False)]
    batch = _collator(tokenizer, rate=0.4, padded=padded)(own, np.arange(len(own)), 0)
    labels_T = torch.full_like(batch.input_ids_T, -100)
    labels_T[batch.target_index_N] = batch.target_ids_N
    labels_RxL, mask_RxL = pad_rows(labels_T, lengths, -100)
    ids_RxL, _ = pad_rows(batch.input_ids_T, lengths, tokenizer.pad_token_id)
    reference = bert(input_ids=ids_RxL, attention_mask=mask_RxL, labels=labels_RxL).loss
    head = SparseHead(bert)
    assert batch.target_count > 10
    assert target_losses(head, batch).shape == (batch.target_count,)
    torch.testing.assert_close(loss_sum(head, batch), reference * batch.target_count, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("padded", "multiple"), [(False, 1), (False, 8), (True, 1), (True, 8)])
def test_a_batch_without_rows_has_no_loss_and_a_gradient_of_zero(
    bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerBase, padded: bool, multiple: int
) -> None:
    batch = _collator(tokenizer, padded=padded, multiple=multiple)([], np.zeros(0, np.int64), 0)
    assert batch.input_ids_T.tolist() == [tokenizer.pad_token_id]
    assert [(group.rows, group.length) for group in batch.packing.groups] == [(1, multiple)]
    assert batch.target_count == 0
    bert.zero_grad()
    loss = loss_sum(SparseHead(bert), batch)
    loss.backward()
    assert loss.item() == 0
    assert all(weight.grad is not None and not weight.grad.any() for weight in bert.parameters())
