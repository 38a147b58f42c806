"""Phases as text, in JSON and on the command line, and the settings of each step."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import CausalLM, Config, Data, MaskedLM, Phase, Run
from minilm.config.command_line import parse_flags
from minilm.config.phases import find_longest, find_unused_phases, list_periods
from minilm.config.serialization import from_dict, to_dict

fractions = st.floats(1e-6, 1, exclude_max=True)
some_phases = st.builds(
    Phase,
    start=st.one_of(fractions, st.integers(0, 10**9)),
    max_length=st.one_of(st.none(), st.integers(8, 10**6)),
    examples=st.integers(1, 10**6),
    mask_rate=st.one_of(st.none(), fractions),
    weights=st.lists(st.floats(1e-3, 1e6), max_size=3).map(tuple),
)


@given(some_phases)
def test_a_phase_is_read_as_it_was_written(phase: Phase) -> None:
    assert Phase.parse(str(phase)) == phase


def test_phases_survive_json_and_the_command_line(tmp_path: Path) -> None:
    phases = (Phase(start=0.5, max_length=256, examples=8), Phase(start=90, mask_rate=0.1, weights=(2.0, 0.5)))
    config = Config(data=Data(source=("a.txt", "b.txt")), run=Run(max_steps=100, phases=phases))
    tree = json.loads(json.dumps(to_dict(config)))
    assert tree["run"]["phases"] == ["start=0.5 max-length=256 examples=8", "start=90 mask-rate=0.1 weights=2,0.5"]
    assert from_dict(tree) == config
    (tmp_path / "run.json").write_text(json.dumps({"config": tree}))
    assert parse_flags(Config(), arguments=["--from-run", str(tmp_path / "run.json")]).run.phases == phases
    words = ["--data.source", "a.txt", "b.txt", "--run.max-steps", "100", "--run.phases", *tree["run"]["phases"]]
    assert parse_flags(Config(), arguments=[*words, "--run.seed", "3"]).run.phases == phases
    assert parse_flags(config, arguments=["--run.seed", "3"]).run.phases == phases
    assert parse_flags(config, arguments=["--run.phases"]).run.phases == ()


def test_another_source_has_no_weights_of_phases() -> None:
    phases = (Phase(start=0.5, weights=(2.0, 1.0)), Phase(start=90, examples=4, weights=(1.0, 1.0)))
    default = Config(data=Data(source=("a.txt", "b.txt")), run=Run(max_steps=100, phases=phases))
    for sources in (["c.txt"], ["c.txt", "d.txt", "e.txt"]):
        config = parse_flags(default, arguments=["--data.source", *sources])
        assert config.run.phases == (Phase(start=90, examples=4),)


def test_each_phase_keeps_what_it_does_not_name() -> None:
    phases = (
        Phase(start=0.25, max_length=512, examples=4),
        Phase(start=60, mask_rate=0.1),
        Phase(start=70, mask_rate=0.1),
        Phase(start=80, max_length=64, weights=(2.0,)),
        Phase(start=100, examples=1),
    )
    config = Config(objective=MaskedLM(rate=0.3, final_rate=0.2), run=Run(max_steps=100, phases=phases))
    periods = list_periods(config)
    assert [(period.start, period.config.batch.max_length, period.config.batch.examples) for period in periods] == [
        (0, 128, 32),
        (25, 512, 4),
        (60, 512, 4),
        (80, 64, 4),
    ]
    objectives = [period.config.objective for period in periods]
    rates = [[kind.rate_at(share) for share in (0.0, 1.0)] for kind in objectives if isinstance(kind, MaskedLM)]
    assert rates == [[0.3, 0.2], [0.3, 0.2], [0.1, 0.1], [0.1, 0.1]]
    assert [period.config.data.weights for period in periods] == [(), (), (), (2.0,)]
    assert all(period.config.run.phases == () for period in periods)
    assert find_longest(config) == 512
    (unused,) = find_unused_phases(config)
    assert "'start=100 examples=1' would begin after 100 steps and the run has 100" in unused


def test_a_phase_from_the_first_step_replaces_the_settings_of_the_configuration() -> None:
    run = Run(max_steps=100, phases=(Phase(start=0, max_length=64), Phase(start=0.5, max_length=128)))
    periods = list_periods(Config(run=run))
    assert [(period.start, period.config.batch.max_length) for period in periods] == [(0, 64), (50, 128)]


def test_a_run_without_phases_is_one_period() -> None:
    (period,) = list_periods(Config())
    assert (period.start, period.config) == (0, Config())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("start=0.5 lenght=512", "'lenght': did you mean 'max-length'"),
        ("max-length=512", "has no start"),
        ("start=0.5", "changes no setting"),
        ("start=half examples=4", "start takes a number, not 'half'"),
        ("start=0.5 examples=4.5", "examples takes a whole number, not '4.5'"),
        ("start=0.5 weights=1;2", "weights takes numbers with commas between them"),
        ("start=0.5 examples=4 examples=8", "has examples twice"),
        ("start=0.5 examples", "is not a list of NAME=VALUE"),
        ("start=1.5 examples=4", "a share below 1 or a whole number of steps, not 1.5"),
        ("start=-1 examples=4", "a share below 1 or a whole number of steps, not -1"),
        ("start=nan examples=4", "a share below 1 or a whole number of steps, not nan"),
        ("start=inf examples=4", "a share below 1 or a whole number of steps, not inf"),
    ],
)
def test_a_phase_that_cannot_be_read_is_refused_in_one_line(text: str, says: str) -> None:
    for read in (
        Phase.parse,
        lambda text: parse_flags(Config(), arguments=["--run.max-steps", "9", "--run.phases", text]),
    ):
        with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
            read(text)
        assert says in str(caught.value)


@pytest.mark.parametrize(
    ("phases", "says"),
    [
        ((Phase(start=0.5, max_length=4),), "the phase 'start=0.5 max-length=4': batch.max_length must be at least 8"),
        ((Phase(start=0.5, examples=0),), "batch.examples must be at least 1, not 0"),
        ((Phase(start=0.5, mask_rate=1.5),), r"objective.rate must lie in \(0, 1\], not 1.5"),
        ((Phase(start=0.5, weights=(1.0, 2.0)),), "data.weights takes one number for each source, but has 2 for 1"),
        ((Phase(start=60, examples=4), Phase(start=0.5, examples=8)), "begins before the phase in front of it"),
        ((Phase(start=600, examples=4), Phase(start=500, examples=8)), "begins before the phase in front of it"),
    ],
)
def test_phases_that_do_not_fit_the_configuration_are_refused(phases: tuple[Phase, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Config(run=Run(max_steps=100, phases=phases))


def test_phases_need_a_number_of_steps_and_the_right_objective() -> None:
    with pytest.raises(ValueError, match=r"run\.phases needs run\.max_steps"):
        Config(run=Run(phases=(Phase(start=0.5, examples=4),)))
    run = Run(max_steps=100, phases=(Phase(start=0.5, mask_rate=0.4),))
    with pytest.raises(ValueError, match="mask-rate is a setting of masked LM"):
        Config(objective=CausalLM(), run=run)
