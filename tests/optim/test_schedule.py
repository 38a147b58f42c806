"""The learning rate against closed forms and the schedules of transformers."""

import math
import typing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from minilm.config import Optim
from minilm.optim.schedule import find_schedule_problems, learning_rate

HINTS = typing.get_type_hints(Optim)
SCHEDULES, SHAPES = (typing.get_args(HINTS[name]) for name in ("schedule", "decay_shape"))


def rates(total: int = 20, **fields) -> list[float]:
    optim = Optim(**fields)
    return [learning_rate(optim, step, total) for step in range(total)]


def theirs(schedule, total: int, warmup: int, **options) -> list[float]:
    """The factors of a schedule of transformers, one step earlier in the warm-up: theirs has a first rate of 0."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    factor = schedule(optimizer, num_warmup_steps=warmup, **options).lr_lambdas[0]
    return [factor(step + (step < warmup)) for step in range(total)]


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)],
)
@pytest.mark.parametrize("warmup", [0, 1, 6])
def test_rates_are_those_of_transformers_one_step_earlier_in_the_warmup(schedule, reference, warmup):
    ours = rates(20, lr=1.0, schedule=schedule, warmup=warmup)
    assert ours == pytest.approx(theirs(reference, 20, warmup, num_training_steps=20), abs=1e-15)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_rates_that_end_above_zero_are_those_of_transformers(final):
    ours = rates(20, lr=1.0, schedule="cosine", final_lr=final, warmup=4)
    options = {"num_training_steps": 20, "min_lr_rate": final}
    reference = theirs(get_cosine_with_min_lr_schedule_with_warmup, 20, 4, **options)
    assert ours[4:] == pytest.approx(reference[4:], abs=1e-15)  # their warm-up begins at the last rate
    ours = rates(20, lr=1.0, schedule="linear", final_lr=final, warmup=4)
    if final < 1:  # they refuse 1
        options = {"num_training_steps": 20, "lr_end": final}
        reference = theirs(get_polynomial_decay_schedule_with_warmup, 20, 4, **options)
        assert ours == pytest.approx(reference, abs=1e-15)
    assert min(ours[4:]) >= final


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize(("warmup", "decay"), [(0, 6), (4, 1), (4, 0), (4, 0.3), (0.2, 0.3), (4, 16), (0, 20)])
def test_wsd_is_that_of_transformers(shape, final, warmup, decay):
    ours = rates(20, lr=1.0, schedule="wsd", decay_shape=shape, final_lr=final, warmup=warmup, decay=decay)
    begin, end = (int(length if length >= 1 else 20 * length) for length in (warmup, decay))
    options = {"num_training_steps": 20, "num_decay_steps": end, "decay_type": shape, "min_lr_ratio": final}
    reference = theirs(get_wsd_schedule, 20, begin, **options)
    assert ours[begin:] == pytest.approx(reference[begin:], abs=1e-15)  # their warm-up begins at the last rate
    assert ours[:begin] == pytest.approx([(step + 1) / begin for step in range(begin)])


@pytest.mark.parametrize("warmup", [1, 6])
def test_inverse_sqrt_is_that_of_transformers_down_to_the_final_rate(warmup):
    ours = rates(30, lr=1.0, schedule="inverse-sqrt", warmup=warmup)
    reference = theirs(get_inverse_sqrt_schedule, 30, warmup, timescale=warmup)
    assert ours == pytest.approx(reference, abs=1e-15)
    floored = rates(30, lr=1.0, schedule="inverse-sqrt", warmup=warmup, final_lr=0.5)
    assert floored[warmup:] == pytest.approx([max(0.5, rate) for rate in reference[warmup:]], abs=1e-15)
    assert floored[-1] == 0.5


@pytest.mark.parametrize("fields", [{"decay": 10}, {"decay": 25, "decay_shape": "linear", "final_lr": 0.3}])
def test_before_its_decay_wsd_has_the_same_rates_to_the_bit_whatever_comes_later(fields):
    trunk = rates(1000, lr=3e-3, schedule="wsd", warmup=7, decay=0)
    tail = rates(40, lr=3e-3, schedule="wsd", warmup=7, **fields)
    begin = 40 - fields["decay"]
    assert tail[: begin + 1] == trunk[: begin + 1]
    assert all(rate < 3e-3 for rate in tail[begin + 1 :])


def test_closed_forms():
    assert rates(4, lr=1.0, schedule="linear", warmup=0) == pytest.approx([1, 0.75, 0.5, 0.25])
    half = math.sqrt(0.5) / 2
    assert rates(4, lr=1.0, schedule="cosine", warmup=0) == pytest.approx([1, 0.5 + half, 0.5, 0.5 - half])
    assert rates(6, lr=0.5, schedule="constant", warmup=4) == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    assert rates(6, lr=1.0, schedule="linear", warmup=2) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    assert rates(6, lr=1.0, schedule="wsd", warmup=1, decay=4) == pytest.approx(
        [1, 1, 1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)]
    )
    assert rates(10, lr=3.0, schedule="inverse-sqrt", warmup=1)[4:] == pytest.approx(
        [1.5, 3 / math.sqrt(5), 3 / math.sqrt(6), 3 / math.sqrt(7), 3 / math.sqrt(8), 1.0]
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_share_is_that_many_steps(schedule):
    fields = {"schedule": schedule, "decay": 0.5}
    assert rates(40, warmup=0.1, **fields) == rates(40, warmup=4, **(fields | {"decay": 20}))
    assert rates(40, warmup=0.1, **fields) != rates(40, warmup=5, **fields)


@given(
    schedule=st.sampled_from(SCHEDULES),
    shape=st.sampled_from(SHAPES),
    warmup=st.one_of(st.floats(0.01, 0.5), st.integers(1, 60)),
    decay=st.one_of(st.floats(0, 0.5), st.integers(1, 60)),
    final=st.floats(0, 1),
    total=st.integers(1, 50),
    beyond=st.integers(0, 5),
)
def test_rates_lie_between_zero_and_the_peak_rise_then_fall_and_depend_on_the_step_alone(
    schedule, shape, warmup, decay, final, total, beyond
):
    optim = Optim(lr=1.0, schedule=schedule, warmup=warmup, decay=decay, decay_shape=shape, final_lr=final)
    steps = range(total + beyond)
    ours = [learning_rate(optim, step, total) for step in steps]
    assert ours[::-1] == [learning_rate(optim, step, total) for step in reversed(steps)]
    assert all(0 <= rate <= 1 for rate in ours)
    assert all(rate > 0 for rate in ours[:total])
    peak = ours.index(max(ours))
    assert ours == sorted(ours[:peak]) + sorted(ours[peak:], reverse=True)
    assert all(rate >= final for rate in ours[peak:]) or max(ours) < 1


def test_a_run_too_short_for_its_schedule_is_said():
    assert find_schedule_problems(Optim(warmup=6), 7) == []
    (problem,) = find_schedule_problems(Optim(warmup=7), 7)
    assert problem == "optim.warmup is 7 steps and the run has 7: the learning rate never reaches optim.lr"
    assert find_schedule_problems(Optim(schedule="wsd", warmup=4, decay=6), 10) == []
    (problem,) = find_schedule_problems(Optim(schedule="wsd", warmup=4, decay=7), 10)
    assert problem == "optim.decay is 7 steps and the run has 6 after its warm-up: the decay takes all those"
    assert rates(10, schedule="wsd", warmup=4, decay=7) == rates(10, schedule="wsd", warmup=4, decay=6)
