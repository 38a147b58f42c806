"""Settings: the checks of their values, round trips through JSON, and the flags of the command line."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm.config import Batch, CausalLM, Config, Data, MaskedLM, Model, Optim, Run, Tokens
from minilm.config.command_line import parse_flags
from minilm.config.field_help import read_field_help
from minilm.config.serialization import from_dict, to_dict
from tests.jobs import launched

GROUPS = {name: MaskedLM if name == "objective" else kind for name, kind in typing.get_type_hints(Config).items()}
FIELDS = {f"{name}.{field.name}": field for name, kind in GROUPS.items() for field in dataclasses.fields(kind)}
CHOICES = sorted(flag for flag, field in FIELDS.items() if typing.get_origin(field.type) is typing.Literal)
INFINITY, NAN = float("inf"), float("nan")


def _with(flag: str, value: object) -> Config:
    group, name = flag.split(".")
    return Config(**{group: GROUPS[group](**{name: value})})


BAD = [
    *(("data.source", value) for value in ("", (), ("a", ""))),
    *(("data.weights", value) for value in ((1.0, 1.0), (0.0,), (-1.0,), (NAN,), (INFINITY,))),
    *(("data.eval_fraction", value) for value in (0, 1, -0.1, 1.5, NAN)),
    *(("tokens.vocab_size", value) for value in (299, 2**24)),
    *((f"objective.{name}", value) for name in ("rate", "final_rate", "eval_rate") for value in (0, -0.1, 1.01, NAN)),
    *((f"objective.{name}", value) for name in ("masked", "replaced") for value in (-0.1, 1.01, NAN)),
    ("objective.masked", 0.91),
    ("tokens.extend", -1),
    ("batch.examples", 0),
    ("batch.max_length", 7),
    ("batch.micro_tokens", 0),
    ("batch.workers", -1),
    *(("optim.lr", value) for value in (0, -1, NAN, INFINITY)),
    *(
        (f"optim.{name}", value)
        for name in ("warmup", "decay", "final_lr", "weight_decay", "max_grad_norm")
        for value in (-1e-9, NAN)
    ),
    ("optim.final_lr", 1.01),
    *(("optim.betas", value) for value in ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9))),
    *(("optim.eps", value) for value in (0, -1e-8, INFINITY)),
    *(("optim.muon_momentum", value) for value in (-0.1, 1.0, NAN)),
    ("optim.muon_iterations", 0),
    *(("optim.muon_scale", value) for value in (0, INFINITY, NAN)),
    *((f"optim.{name}", INFINITY) for name in ("warmup", "decay", "weight_decay")),
    *(("run.epochs", value) for value in (0, -1, NAN, INFINITY)),
    ("run.max_steps", 0),
    ("run.eval_every", 0),
    *(("run.timeout", value) for value in (0, 2**31)),
    *(("run.seed", value) for value in (-1, 2**63)),
    *(("run.push_to_hub", value) for value in ("", "a/b/c", "a b", "--x", "me/model.git")),
    *(("run.license", value) for value in ("", "Apache 2.0", "mit\n")),
    *((flag, "nonsense") for flag in CHOICES),
]


@pytest.mark.parametrize(("flag", "value"), BAD)
def test_a_bad_value_is_refused_in_one_line_that_begins_with_its_flag(flag: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{flag} [^\n]+\Z"):
        _with(flag, value)


EDGES = [
    ("tokens.vocab_size", 300),
    ("objective.rate", 1.0),
    ("objective.final_rate", 1.0),
    ("objective.masked", 0.9),
    ("objective.replaced", 0.2),
    ("tokens.extend", 0),
    ("batch.examples", 1),
    ("batch.max_length", 8),
    ("batch.micro_tokens", 1),
    ("batch.workers", 0),
    ("optim.betas", (0.0, 0.0)),
    ("optim.muon_momentum", 0),
    ("optim.muon_iterations", 1),
    *((f"optim.{name}", 0) for name in ("warmup", "decay", "weight_decay", "max_grad_norm")),
    *(("optim.final_lr", value) for value in (0, 1)),
    ("run.seed", 2**63 - 1),
    *((flag, choice) for flag in CHOICES for choice in typing.get_args(FIELDS[flag].type)),
]


@pytest.mark.parametrize(("flag", "value"), EDGES)
def test_a_value_at_the_edge_of_its_range_is_accepted(flag: str, value: object) -> None:
    group, name = flag.split(".")
    assert getattr(getattr(_with(flag, value), group), name) == value


def test_a_configuration_cannot_be_changed_after_its_checks() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Run().seed = -1  # type: ignore[misc]


words = st.text()
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
shares = st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True)
counts = st.integers(min_value=8)
values = st.booleans() | st.integers() | st.floats(allow_nan=False) | words | st.lists(words)


def _choices(flag: str) -> st.SearchStrategy[str]:
    return st.sampled_from(typing.get_args(FIELDS[flag].type))


configs = st.builds(
    Config,
    data=st.builds(
        Data,
        source=st.text(min_size=1) | st.lists(st.text(min_size=1), min_size=1).map(tuple),
        column=words,
        eval_split=st.none() | words,
        eval_fraction=shares,
        document=_choices("data.document"),
    ),
    tokens=st.builds(
        Tokens, name=st.none() | words, vocab_size=st.integers(300, 2**24 - 1), kind=_choices("tokens.kind")
    ),
    model=st.builds(Model, type=words, config=st.dictionaries(words, values)),
    objective=st.builds(MaskedLM, rate=shares, eval_rate=shares) | st.builds(CausalLM),
    batch=st.builds(Batch, examples=counts, max_length=counts, layout=_choices("batch.layout")),
    optim=st.builds(Optim, lr=positive, betas=st.tuples(shares, shares), schedule=_choices("optim.schedule")),
    run=st.builds(
        Run,
        epochs=positive,
        max_steps=st.none() | counts,
        seed=st.integers(0, 2**63 - 1),
        samples=st.lists(words).map(tuple),
    ),
)


@settings(deadline=None, max_examples=50)
@given(configs)
def test_a_configuration_survives_json(config: Config) -> None:
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("tree", "hint"),
    [
        ({"bacth": {}}, "'bacth': did you mean 'batch'?"),
        ({"batch": {"exmaples": 3}}, "batch.'exmaples': did you mean 'examples'?"),
        ({"run": {"zzz": 1}}, "run.'zzz'. There are: "),
        ({"objective": {"name": "CausalML"}}, "objective.name 'CausalML': did you mean 'CausalLM'?"),
        (
            {"objective": {"name": "CausalLM", "rate": 0.1}},
            "objective.'rate'. There are: label_smoothing, teacher, teacher_temperature, teacher_weight, z_loss.",
        ),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(tree: dict[str, Any], hint: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+\Z") as refusal:
        from_dict(tree)
    assert hint in str(refusal.value)


RECIPE = Config(
    data=Data(source="some/hub", split="train[:5]", column="answers.text", eval_fraction=0.2),
    model=Model(type="bert", config={"hidden_size": 128, "hidden_dropout_prob": 0.1, "layer_types": ["full"]}),
    run=Run(output_dir="out/first", samples=("one [MASK]",)),
)


def _change(config: Config, group: str, /, **fields: object) -> Config:
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **fields)})


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", RECIPE),
        ("--batch.micro-tokens 77", _change(RECIPE, "batch", micro_tokens=77)),
        ("--optim.betas 0.5 0.75", _change(RECIPE, "optim", betas=(0.5, 0.75))),
        ("--run.samples a b", _change(RECIPE, "run", samples=("a", "b"))),
        ("--run.max-steps 9", _change(RECIPE, "run", max_steps=9)),
        ("--run.overwrite", _change(RECIPE, "run", overwrite=True)),
        (
            "--model.config.hidden-size 64 --model.config.layer-types full sliding",
            _change(
                RECIPE, "model", config={**RECIPE.model.config, "hidden_size": 64, "layer_types": ["full", "sliding"]}
            ),
        ),
        (
            "--model.config.a-size 64 --model.config.rate=1e-3 --batch.micro-tokens 77 --model.config.b no "
            "--model.config.c True --model.config.d x y",
            _change(
                _change(RECIPE, "batch", micro_tokens=77),
                "model",
                config={**RECIPE.model.config, "a_size": 64, "rate": 1e-3, "b": "no", "c": True, "d": ["x", "y"]},
            ),
        ),
        ("--data.column body", _change(RECIPE, "data", column="body")),
        ("--data.source a.txt", dataclasses.replace(RECIPE, data=Data(source="a.txt", eval_fraction=0.2))),
        ("--data.source=a.txt", dataclasses.replace(RECIPE, data=Data(source="a.txt", eval_fraction=0.2))),
        (
            "--data.source a.txt b.csv --data.weights 1 0.5",
            dataclasses.replace(RECIPE, data=Data(source=("a.txt", "b.csv"), weights=(1.0, 0.5), eval_fraction=0.2)),
        ),
        (
            "--data.column b --data.source a",
            dataclasses.replace(RECIPE, data=Data(source="a", column="b", eval_fraction=0.2)),
        ),
    ],
)
def test_flags_change_their_fields_and_data_source_resets_the_other_data_flags(flags: str, expected: Config) -> None:
    assert parse_flags(RECIPE, arguments=flags.split()) == expected


@pytest.mark.parametrize("source", ["some/hub", ("a.txt", "b.csv")])
def test_from_run_repeats_a_run_into_another_output_folder(tmp_path: Path, source: str | tuple[str, ...]) -> None:
    file = tmp_path / "run.json"
    recipe = _change(RECIPE, "data", source=source)
    file.write_text(json.dumps({"config": to_dict(recipe), "versions": {}}))
    repeated = parse_flags(Config(), arguments=["--run.seed", "5", "--from-run", str(file), "--batch.examples", "3"])
    assert repeated == _change(_change(recipe, "run", output_dir=None, seed=5), "batch", examples=3)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "{",
        "[]",
        "{}",
        '{"config": 3}',
        '{"config": {"batch": {"exmaples": 3}}}',
        '{"config": {"run": {"seed": -1}}}',
    ],
)
def test_from_run_refuses_a_file_that_is_not_a_run_json_and_names_it(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "run.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=r"^--from-run [^\n]*run\.json[^\n]*\Z"):
        parse_flags(Config(), arguments=["--from-run", str(file)])


@pytest.mark.parametrize("words", [["--model.config", "hidden_size", "64"], ["--model.config=hidden_size"]])
def test_a_field_of_the_model_without_its_name_in_the_flag_is_refused(words: list[str]) -> None:
    for default in (Config(), RECIPE):
        with pytest.raises(ValueError, match=r"type --model\.config\.FIELD VALUE\Z"):
            parse_flags(default, arguments=words)


def test_from_run_without_a_file_is_refused() -> None:
    with pytest.raises(ValueError, match="--from-run needs the path"):
        parse_flags(Config(), arguments=["--from-run"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch.exampels", "3"], "--batch.examples"),
        (["--batch.layout", "rows"], "documents"),
        (["--optim.lr", "-1"], "optim.lr must be positive"),
        (["--batch.examples", "many"], "--batch.examples"),
        (["--batch.examples"], "--batch.examples"),
    ],
)
@pytest.mark.parametrize("rank", [None, 0, 1])
def test_a_bad_flag_exits_with_status_2_and_only_the_first_process_prints(
    flags: list[str],
    message: str,
    rank: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in launched(rank).items() if rank is not None else ():
        monkeypatch.setenv(name, value)
    stderr = sys.stderr
    with pytest.raises(SystemExit) as end:
        parse_flags(Config(), arguments=flags)
    output = capsys.readouterr()
    assert end.value.code == 2
    assert sys.stderr is stderr
    assert output.out == ""
    assert (output.err == "") if rank == 1 else (message in output.err)


def test_a_fraction_of_epochs_gives_the_exact_number_of_steps() -> None:
    for epochs, per_epoch, steps in (
        (1.1, 100, 110),
        (2.2, 25, 55),
        (0.3, 10, 3),
        (0.5, 3, 2),
        (1e-9, 10, 1),
        (3.0, 7, 21),
    ):
        assert Run(epochs=epochs).count_steps(per_epoch) == steps
    assert Run(epochs=1.1, max_steps=5).count_steps(100) == 5


def test_help_is_the_string_under_each_field_without_a_search_of_the_source_for_each_class() -> None:
    script = """
import docstring_parser
from minilm.config import Config
from minilm.config.command_line import parse_flags
parse = docstring_parser.parse_from_object
docstring_parser.parse_from_object = lambda kind: print("PARSED", kind.__name__) or parse(kind)
parse_flags(Config(), arguments=["--help"])
"""
    environment = {**os.environ, "COLUMNS": "1000"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    output = " ".join(re.sub("[│╭╮╰╯─]", " ", done.stdout).split())
    # tyro looks for strings under the groups in Config, and there are none.
    assert set(re.findall(r"PARSED (\w+)", output)) <= {"Config"}
    texts = [text for kind in (Data, MaskedLM, Run) for text in read_field_help()[kind].values()]
    assert [text for text in texts if text not in output] == []
