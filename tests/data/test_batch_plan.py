"""Each step is a pure function of its index, each example comes once an epoch, and there is little padding."""

import itertools
import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from minilm.data.batch_plan import Ids, Plan, Step, cut_into_micro_batches, deal_micro_batches, fill_rows

SKEWED = np.random.default_rng(0).lognormal(3.5, 1.0, 5000).astype(np.int64).clip(3, 512)

thorough = settings(deadline=None, max_examples=150)
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=60).map(lambda values: np.array(values, np.int64))
groups = st.sampled_from(["step", "epoch"])


def _flat(step: Step) -> Ids:
    return np.concatenate([part for parts in step.micro_batches for part in parts])


def _same(a: Step, b: Step) -> bool:
    pairs = itertools.zip_longest(itertools.chain(*a.micro_batches), itertools.chain(*b.micro_batches))
    facts = [(s.epoch, s.tokens, s.padded_tokens, len(s.micro_batches)) for s in (a, b)]
    return facts[0] == facts[1] and all(np.array_equal(x, y) for x, y in pairs)


def _padded(lengths: Ids, micro_batches: list[list[Ids]], multiple: int = 1) -> int:
    """Count the tokens of the collator's tensors. A tensor without examples is a single row of padding."""
    widths = [(max(1, len(p)), max(lengths[p], default=1)) for parts in micro_batches for p in parts]
    return sum(rows * math.ceil(width / multiple) * multiple for rows, width in widths)


@thorough
@given(sizes, st.integers(0, 2**63 - 1), groups, st.booleans(), st.lists(st.integers(0, 200), min_size=1, max_size=6))
def test_any_step_in_any_order_is_the_same(
    lengths: Ids, seed: int, group: str, padded: bool, indices: list[int]
) -> None:
    def plan() -> Plan:
        return Plan(lengths, examples=7, micro_tokens=64, seed=seed, group=group, padded=padded)

    once = plan()
    forward = [once.step(index) for index in indices]
    backward = [once.step(index) for index in reversed(indices)][::-1]
    alone = [plan().step(index) for index in indices]
    assert all(_same(a, b) and _same(a, c) for a, b, c in zip(forward, backward, alone, strict=True))


@thorough
@given(sizes, st.integers(3, 20), st.integers(1, 3), st.integers(1, 200), groups, st.booleans(), st.integers(0, 2))
def test_each_example_comes_exactly_once_an_epoch_whatever_the_sizes(
    lengths: Ids, examples: int, processes: int, micro_tokens: int, group: str, padded: bool, epoch: int
) -> None:
    plan = Plan(lengths, examples=examples, micro_tokens=micro_tokens, processes=processes, group=group, padded=padded)
    steps = [plan.step(epoch * plan.steps_per_epoch + at) for at in range(plan.steps_per_epoch)]
    assert np.array_equal(np.sort(np.concatenate([_flat(step) for step in steps])), np.arange(len(lengths)))
    assert {step.epoch for step in steps} == {epoch}
    assert sorted(len(_flat(step)) for step in steps)[1:] == [examples] * (len(steps) - 1)
    assert group == "epoch" or all(len(_flat(step)) == examples for step in steps[:-1])


@pytest.mark.scorecard(5)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_an_epoch_of_a_prime_number_of_examples_has_each_once(
    processes: int, padded: bool, figure: Callable[[str], None]
) -> None:
    lengths = SKEWED[:4999]
    plan = Plan(lengths, examples=64, micro_tokens=1024, processes=processes, padded=padded)
    taken = np.zeros(len(lengths), np.int64)
    for index in range(plan.steps_per_epoch):
        micro_batches = plan.step(index).micro_batches
        assert len(micro_batches) == processes
        np.add.at(taken, np.concatenate([ids for parts in micro_batches for ids in parts]), 1)
    assert (taken == 1).all()
    figure(f"{processes}: {taken.sum():,} of {len(lengths):,} examples, each once")


@thorough
@given(sizes, st.integers(3, 20), st.integers(0, 99), groups)
def test_the_examples_of_a_step_do_not_depend_on_processes_or_micro_tokens(
    lengths: Ids, examples: int, index: int, group: str
) -> None:
    held = {
        tuple(np.sort(_flat(plan.step(index))))
        for processes in (1, 2, 3)
        for micro_tokens, padded, multiple in (
            (1, True, 1),
            (50, True, 8),
            (10**6, True, 1),
            (1, False, 1),
            (50, False, 8),
        )
        for plan in [
            Plan(
                lengths,
                examples=examples,
                micro_tokens=micro_tokens,
                processes=processes,
                group=group,
                padded=padded,
                multiple=multiple,
            )
        ]
    }
    assert len(held) == 1


@thorough
@given(sizes, st.integers(4, 20), st.integers(2, 4), st.integers(1, 200), st.booleans(), st.data())
def test_an_example_goes_to_a_process_that_can_read_it_and_no_step_has_other_examples(
    lengths: Ids, examples: int, processes: int, micro_tokens: int, padded: bool, data: st.DataObject
) -> None:
    holders = st.sets(st.integers(0, processes - 1), min_size=1)
    readers = np.zeros((processes, len(lengths)), np.bool_)
    for at, ranks in enumerate(data.draw(st.lists(holders, min_size=len(lengths), max_size=len(lengths)))):
        readers[[*ranks], at] = True

    def plan(processes: int, readers: NDArray[np.bool_] | None) -> Plan:
        return Plan(
            lengths,
            examples=examples,
            micro_tokens=micro_tokens,
            processes=processes,
            padded=padded,
            multiple=8,
            readers=readers,
        )

    one, apart, equal = plan(1, None), plan(processes, readers), plan(processes, np.ones_like(readers))
    for index in range(2 * one.steps_per_epoch):
        step = apart.step(index)
        assert np.array_equal(step.examples, one.step(index).examples)
        assert step.tokens == one.step(index).tokens
        assert len(step.micro_batches) == processes
        assert len({len(parts) for parts in step.micro_batches}) == 1
        for rank, parts in enumerate(step.micro_batches):
            assert readers[rank, np.concatenate(parts)].all()
            sizes = [_padded(lengths, [[part]], 8) if padded else lengths[part].sum() for part in parts]
            assert all(len(part) <= 1 or size <= micro_tokens for part, size in zip(parts, sizes, strict=True))
        assert _same(equal.step(index), plan(processes, None).step(index))


def test_processes_that_can_read_the_same_examples_share_them() -> None:
    lengths = SKEWED[:4000]
    first = np.arange(len(lengths)) % 2 == 0
    readers = np.stack([first, first, ~first, ~first])
    plan = Plan(lengths, examples=400, micro_tokens=2048, processes=4, readers=readers)
    for index in range(plan.steps_per_epoch):
        loads = [sum(int(lengths[part].sum()) for part in parts) for parts in plan.step(index).micro_batches]
        assert abs(loads[0] - loads[1]) < 20
        assert abs(loads[2] - loads[3]) < 20


@thorough
@given(sizes, st.integers(1, 300), st.integers(1, 4), st.sampled_from([1, 8]))
@example(np.array([100, *[30] * 6]), 60, 1, 1)  # one that is too long must not make room for others
def test_padded_micro_batches_fit_and_each_process_gets_the_same_number(
    lengths: Ids, micro_tokens: int, processes: int, multiple: int
) -> None:
    ids = np.arange(len(lengths)) * 3  # ids are not positions
    parts = cut_into_micro_batches(ids, lengths, micro_tokens, processes, padded=True, multiple=multiple)
    assert len(parts) == processes
    assert len({len(mine) for mine in parts}) == 1
    flat = [part // 3 for mine in parts for part in mine]
    assert np.array_equal(np.sort(np.concatenate(flat)), np.arange(len(lengths)))
    assert all(len(part) <= 1 or _padded(lengths, [[part]], multiple) <= micro_tokens for part in flat)
    assert all(len(part) for part in flat) or max(map(len, flat)) <= 1


@thorough
@given(sizes, st.integers(1, 300), st.integers(1, 4))
@example(np.array([100, *[30] * 6]), 60, 1)
@example(np.array([5, 6]), 100, 4)
@example(np.array([3, 3, 2]), 4, 1)  # together they would fit into two, but no two fit into one
def test_micro_batches_without_padding_fit_and_are_balanced(lengths: Ids, micro_tokens: int, processes: int) -> None:
    ids = np.arange(len(lengths)) * 3  # ids are not positions
    parts = cut_into_micro_batches(ids, lengths, micro_tokens, processes)
    assert len(parts) == processes
    assert len({len(mine) for mine in parts}) == 1
    flat = [part // 3 for mine in parts for part in mine]
    assert np.array_equal(np.sort(np.concatenate(flat)), np.arange(len(lengths)))
    assert all((np.diff(lengths[part]) <= 0).all() for part in flat)
    tokens = [int(lengths[part].sum()) for part in flat]
    assert all(len(part) <= 1 or held <= micro_tokens for part, held in zip(flat, tokens, strict=True))
    assert max(tokens) - min(tokens) <= lengths.max()
    assert all(len(part) for part in flat) or max(map(len, flat)) <= 1
    again = [part // 3 for mine in cut_into_micro_batches(ids, lengths, micro_tokens, processes) for part in mine]
    assert all(np.array_equal(a, b) for a, b in zip(flat, again, strict=True))


def _fewest_parts(widths: tuple[int, ...], micro_tokens: int, padded: bool) -> int:
    """The smallest number of micro-batches that fit, over every way of dividing the examples."""
    if not widths:
        return 0
    first, rest = widths[0], range(1, len(widths))
    best = len(widths)
    for others in itertools.chain.from_iterable(itertools.combinations(rest, size) for size in range(len(widths))):
        group = [first, *(widths[i] for i in others)]
        if len(group) == 1 or (len(group) * max(group) if padded else sum(group)) <= micro_tokens:
            left = tuple(widths[i] for i in rest if i not in others)
            best = min(best, 1 + _fewest_parts(left, micro_tokens, padded))
    return best


@thorough
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 40), st.integers(1, 3))
def test_no_way_of_cutting_with_padding_needs_fewer_micro_batches(
    widths: list[int], micro_tokens: int, processes: int
) -> None:
    parts = cut_into_micro_batches(np.arange(len(widths)), np.array(widths), micro_tokens, processes, padded=True)
    assert len(parts[0]) == math.ceil(_fewest_parts(tuple(widths), micro_tokens, True) / processes)


@thorough
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 40), st.integers(1, 3))
def test_a_cut_without_padding_is_at_most_one_micro_batch_from_the_best(
    widths: list[int], micro_tokens: int, processes: int
) -> None:
    parts = cut_into_micro_batches(np.arange(len(widths)), np.array(widths), micro_tokens, processes)
    fewest = _fewest_parts(tuple(widths), micro_tokens, False)
    assert math.ceil(fewest / processes) <= len(parts[0]) <= math.ceil((fewest + 1) / processes)


@pytest.mark.parametrize("micro_tokens", [1024, 4096, 16384])
def test_micro_batches_without_padding_are_full(micro_tokens: int) -> None:
    (parts,) = cut_into_micro_batches(np.arange(len(SKEWED)), SKEWED, micro_tokens)
    assert SKEWED.sum() / len(parts) > 0.95 * micro_tokens


@pytest.mark.parametrize(("micro_tokens", "processes", "count"), [(199, 1, 10_000), (299, 3, 1667), (99, 4, 2500)])
def test_a_large_cut_of_equal_lengths_is_found_at_once(micro_tokens: int, processes: int, count: int) -> None:
    start = time.perf_counter()
    parts = cut_into_micro_batches(np.arange(10_000), np.full(10_000, 100), micro_tokens, processes)
    assert time.perf_counter() - start < 2
    assert [len(mine) for mine in parts] == [count] * processes


@pytest.mark.parametrize("padded", [False, True])
def test_an_example_that_is_too_long_is_one_micro_batch_more(padded: bool) -> None:
    (parts,) = cut_into_micro_batches(np.arange(7), np.array([30, 30, 30, 400, 30, 30, 30]), 60, padded=padded)
    assert sorted(map(len, parts)) == [1, 2, 2, 2]
    assert [part.tolist() for part in parts if 3 in part] == [[3]]


@thorough
@given(sizes, st.integers(1, 20), st.integers(1, 3), st.booleans(), st.sampled_from([1, 8]))
def test_the_figures_of_a_step_are_those_of_its_tensors(
    lengths: Ids, examples: int, processes: int, padded: bool, multiple: int
) -> None:
    examples = max(examples, processes)
    plan = Plan(lengths, examples=examples, micro_tokens=60, processes=processes, padded=padded, multiple=multiple)
    for index in range(plan.steps_per_epoch):
        step = plan.step(index)
        own = lengths[_flat(step)]
        assert (step.tokens, step.square_lengths) == (own.sum(), (own**2).sum())
        empty = sum(len(part) == 0 for parts in step.micro_batches for part in parts)
        seen = _padded(lengths, step.micro_batches, multiple) if padded else step.tokens + empty
        assert step.padded_tokens == seen


@thorough
@given(sizes, st.integers(1, 80), st.integers(2, 5), st.integers(1, 2), groups, st.integers(0, 2))
def test_packed_rows_are_full_and_hold_each_example_once_an_epoch(
    lengths: Ids, row_tokens: int, examples: int, processes: int, group: str, epoch: int
) -> None:
    rows = fill_rows(lengths, row_tokens, seed=3)
    held = [int(lengths[row].sum()) for row in rows]
    assert all(len(row) == 1 or tokens <= row_tokens for row, tokens in zip(rows, held, strict=True))
    follows = [int(lengths[row[0]]) for row in rows[1:]]
    assert all(tokens + first > row_tokens for tokens, first in zip(held[:-1], follows, strict=True))
    settings = {"examples": examples, "micro_tokens": 64, "processes": processes, "group": group, "seed": 3}
    plan = Plan(lengths, row_tokens=row_tokens, **settings)
    assert plan.steps_per_epoch == math.ceil(len(rows) / examples)
    steps = [set(_flat(plan.step(epoch * plan.steps_per_epoch + at))) for at in range(plan.steps_per_epoch)]
    assert sorted(itertools.chain(*steps)) == list(range(len(lengths)))
    parts = sorted(sum(step >= set(row) for row in rows) for step in steps)
    assert parts[1:] == [examples] * (len(steps) - 1)


def test_sorting_inside_a_step_saves_most_of_the_padding() -> None:
    plan = Plan(SKEWED, examples=64, micro_tokens=1024, padded=True)
    steps = [plan.step(index) for index in range(20)]
    real = sum(step.tokens for step in steps)
    as_drawn = 0  # the same steps in the same number of micro-batches, in random order
    for step in steps:
        order = np.random.default_rng(step.tokens).permutation(_flat(step))
        as_drawn += _padded(SKEWED, [np.array_split(order, len(step.micro_batches[0]))])
    assert plan.padding_share() == pytest.approx(1 - real / sum(step.padded_tokens for step in steps))
    assert 1 - real / as_drawn > 0.5
    assert plan.padding_share() < 0.25
    assert Plan(SKEWED, examples=64, micro_tokens=1024).padding_share() == 0


def test_grouping_over_the_epoch_pads_almost_nothing_and_still_shuffles_the_steps() -> None:
    plan = Plan(SKEWED, examples=64, micro_tokens=4096, group="epoch", padded=True)
    assert plan.padding_share(plan.steps_per_epoch) < 0.05
    means = np.array([SKEWED[_flat(plan.step(index))].mean() for index in range(plan.steps_per_epoch)])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 4 / math.sqrt(len(means))


@pytest.mark.parametrize("padded", [False, True])
def test_no_process_gets_more_work_than_another(padded: bool) -> None:
    plan = Plan(SKEWED, examples=256, micro_tokens=1024, processes=2, padded=padded)
    steps = [plan.step(index).micro_batches for index in range(19)]
    count = _padded if padded else lambda lengths, step: lengths[np.concatenate(step[0])].sum()
    tokens = np.array([[count(SKEWED, [mine]) for mine in step] for step in steps])
    attention = np.array([[(SKEWED[np.concatenate(mine)] ** 2).sum() for mine in step] for step in steps])
    assert (tokens.max(1) / tokens.mean(1)).max() < (1.08 if padded else 1.02)
    assert (attention.max(1) / attention.mean(1)).mean() < 1.08  # the same process does not always get the longest


def _rank_of_each(plan: Plan, index: int) -> NDArray[np.int64]:
    return np.argsort(np.concatenate([_flat(plan.step(i)) for i in range(index, index + plan.steps_per_epoch)]))


@pytest.mark.parametrize("group", ["step", "epoch"])
def test_epochs_and_seeds_are_shuffled_independently(group: str) -> None:
    plans = [Plan(np.full(2000, 5), examples=10, micro_tokens=50, seed=seed, group=group) for seed in (0, 1)]
    orders = [_rank_of_each(plans[0], 0), _rank_of_each(plans[0], 200), _rank_of_each(plans[1], 0), np.arange(2000)]
    for a, b in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(2000)


def test_a_million_examples_can_be_planned() -> None:
    lengths = np.tile(SKEWED, 200)
    plan = Plan(lengths, examples=999, micro_tokens=8192, processes=3)
    assert plan.steps_per_epoch == 1002
    seen = np.concatenate([_flat(plan.step(2 * 1002 + at)) for at in (0, 500, 501, 1001)])
    assert len(np.unique(seen)) == len(seen) == 3 * 999 + 1_000_000 % 999


def test_fewer_examples_than_processes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^batch\.examples=2 is less than the 3 processes[^\n]*\Z"):
        Plan(SKEWED, examples=2, micro_tokens=100, processes=3)


@pytest.mark.parametrize("padded", [False, True])
def test_the_last_step_gives_a_process_without_examples_an_empty_micro_batch(padded: bool) -> None:
    plan = Plan(np.array([5, 6, 7, 8]), examples=3, micro_tokens=100, processes=3, padded=padded)
    assert [[len(part) for part in mine] for mine in plan.step(1).micro_batches] == [[1], [0], [0]]


@settings(deadline=None, max_examples=50)
@given(sizes, st.integers(1, 200), st.integers(1, 5), st.booleans())
def test_an_evaluation_has_the_same_micro_batches_on_any_number_of_processes(
    lengths: Ids, micro_tokens: int, processes: int, padded: bool
) -> None:
    (alone,) = deal_micro_batches(lengths, micro_tokens, 1, padded=padded)
    dealt = deal_micro_batches(lengths, micro_tokens, processes, padded=padded)
    assert len({len(parts) for parts in dealt}) == 1
    everyones = [part.tolist() for parts in dealt for part in parts if len(part)]
    assert sorted(everyones) == sorted(part.tolist() for part in alone)
    assert sorted(itertools.chain(*everyones)) == list(range(len(lengths)))
