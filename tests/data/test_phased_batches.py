"""The plan of a run with phases: a later phase changes no earlier step, and a larger step continues the epoch."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minilm import Batch, Config, Phase, Run
from minilm.config.phases import list_periods
from minilm.data.batch_plan import Plan, Step
from minilm.data.corpus import Examples, PreparedData
from minilm.data.phased_batches import JoinedExamples, RunPlan
from minilm.runs.session import plan_batches

STEPS = 30
DOCUMENTS = np.random.default_rng(0).integers(1, 60, 37)


def cut(max_length: int, weights: tuple[float, ...]) -> Examples:
    """Return examples of at most `max_length` ids. The id of each of them says which examples they belong to."""
    sizes = np.concatenate([np.full(-(-size // max_length), max_length) for size in DOCUMENTS])
    sizes = np.tile(sizes, int(weights[0]) if weights else 1)
    stop = np.cumsum(sizes)
    none = np.zeros(0, np.int64)
    return Examples(ids=np.full(stop[-1], max_length), start=stop - sizes, stop=stop, prefix=none, suffix=none)


def build(config: Config, processes: int = 1) -> tuple[RunPlan, JoinedExamples]:
    found: dict[Any, Examples] = {}
    keys = [(period.config.batch.max_length, period.config.data.weights) for period in list_periods(config)]
    for key in ((config.batch.max_length, config.data.weights), *keys):
        found.setdefault(key, cut(*key))
    tokenizer: Any = None
    train = found[config.batch.max_length, config.data.weights]
    prepared = PreparedData(tokenizer=tokenizer, train=train, eval=train, periods=tuple(found[key] for key in keys))
    run: Any = SimpleNamespace(
        config=config,
        prepared=prepared,
        accelerator=SimpleNamespace(num_processes=processes, device=torch.device("cpu")),
    )
    head: Any = SimpleNamespace(padding_free=True)
    return plan_batches(run, head), JoinedExamples(prepared)


def configuration(phases: tuple[Phase, ...], **batch: Any) -> Config:
    batch = {"examples": 4, "max_length": 16, "micro_tokens": 50, **batch}
    return Config(batch=Batch(**batch), run=Run(max_steps=STEPS, phases=phases))


def told(step: Step) -> tuple[int, list[int]]:
    return step.epoch, step.examples.tolist()


changes = st.fixed_dictionaries(
    {"start": st.integers(0, STEPS)},
    optional={
        "max_length": st.sampled_from([8, 16, 24]),
        "examples": st.integers(2, 9),
        "weights": st.sampled_from([(1.0,), (2.0,)]),
        "mask_rate": st.sampled_from([0.1, 0.2]),
    },
).filter(lambda fields: len(fields) > 1)
phases = st.lists(changes, max_size=4).map(
    lambda found: tuple(Phase(**fields) for fields in sorted(found, key=lambda fields: fields["start"]))
)
layouts = st.sampled_from(["documents", "packed"])
groups = st.sampled_from(["step", "epoch"])


@given(early=phases, first=phases, second=phases, layout=layouts, group=groups)
@settings(deadline=None, max_examples=60)
def test_a_later_phase_changes_no_earlier_step(
    early: tuple[Phase, ...], first: tuple[Phase, ...], second: tuple[Phase, ...], layout: str, group: str
) -> None:
    known = int(max((phase.start for phase in early), default=0))
    later = [tuple(phase for phase in some if phase.start > known) for some in (first, second)]
    assume(later[0] != later[1])
    plans, rows = zip(
        *(build(configuration((*early, *some), layout=layout, group=group)) for some in later), strict=True
    )
    changed = min(phase.start for some in later for phase in some)
    for index in range(min(STEPS, int(changed))):
        one, other = (plan.step(index) for plan in plans)
        assert told(one) == told(other)
        for example in one.examples:
            assert np.array_equal(rows[0][int(example)], rows[1][int(example)])
        assert plans[0].epochs_after(index) == plans[1].epochs_after(index)


@given(some=phases, layout=layouts, group=groups)
@settings(deadline=None, max_examples=40)
def test_a_step_has_its_settings_whatever_the_number_of_processes(
    some: tuple[Phase, ...], layout: str, group: str
) -> None:
    config = configuration(some, layout=layout, group=group)
    (plan, rows), (spread, _) = build(config), build(config, processes=2)
    periods = list_periods(config)
    for index in range(STEPS):
        step = plan.step(index)
        assert told(step) == told(spread.step(index))
        current = [period for period in periods if period.start <= index][-1].config.batch
        if layout == "documents":
            assert 0 < len(step.examples) <= current.examples
        # The ids of an example name the length at which the documents were cut.
        assert {int(rows[int(example)][0]) for example in step.examples} == {current.max_length}


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    group=groups,
    row_tokens=st.sampled_from([None, 90]),
)
@settings(deadline=None, max_examples=60)
def test_steps_of_another_size_continue_the_epoch(
    sizes: list[int], lengths: list[int], group: str, row_tokens: int | None
) -> None:
    tokens = np.random.default_rng(1).integers(1, 30, 41)
    plans: list[tuple[int, Plan]] = []
    seen: Counter[tuple[int, int]] = Counter()
    first_epoch, units = 0, None
    for size, steps in zip(sizes, [*lengths, *([4] * len(sizes))], strict=False):
        plan = Plan(
            tokens,
            examples=size,
            micro_tokens=64,
            group=group,
            row_tokens=row_tokens,
            first_epoch=first_epoch,
            first_units=units,
        )
        plans.append((steps, plan))
        first_epoch, units = plan.continue_after(steps, same_examples=True)
    for steps, plan in plans:
        for index in range(steps):
            step = plan.step(index)
            seen.update((step.epoch, int(example)) for example in step.examples)
    # No example comes twice in an epoch, and no epoch begins before the last one has ended.
    assert set(seen.values()) == {1}
    epochs = Counter(epoch for epoch, _ in seen)
    assert [epochs[epoch] for epoch in range(max(epochs))] == [len(tokens)] * max(epochs)


def test_other_examples_begin_a_new_epoch_and_keep_their_numbers_for_good() -> None:
    config = configuration((Phase(start=3, max_length=8), Phase(start=6, max_length=16), Phase(start=9, examples=2)))
    plan, rows = build(config)
    assert [plan.step(index).epoch for index in (0, 2, 3, 6, 9)] == [0, 0, 1, 2, 2]
    count = len(cut(16, ()))
    assert all((plan.step(index).examples < count).all() for index in (0, 1, 2, 6, 7, 8, 9, 10))
    assert all((plan.step(index).examples >= count).all() for index in (3, 4, 5))
    assert {len(rows[int(example)]) for example in plan.step(4).examples} == {8}
    again = {int(example) for index in range(6, 12) for example in plan.step(index).examples}
    assert len(again) == 3 * 4 + 3 * 2


def test_no_epoch_is_left_out_where_a_phase_begins_with_an_epoch() -> None:
    steps = build(configuration(()))[0].steps_per_epoch
    plan, _ = build(configuration((Phase(start=steps, max_length=8),)))
    assert [plan.step(index).epoch for index in (steps - 1, steps)] == [0, 1]


def test_a_mask_rate_leaves_the_order_alone() -> None:
    plain, _ = build(configuration(()))
    masked, _ = build(configuration((Phase(start=5, mask_rate=0.4),)))
    assert [told(plain.step(index)) for index in range(STEPS)] == [told(masked.step(index)) for index in range(STEPS)]


def test_a_step_smaller_than_the_number_of_processes_is_refused() -> None:
    config = configuration((Phase(start=5, examples=1),))
    with pytest.raises(ValueError, match=r"batch\.examples=1 is less than the 2 processes"):
        build(replace(config), processes=2)
