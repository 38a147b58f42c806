"""The error for a flag of another program names the flag of minilm, in one line."""

import dataclasses
import re
import typing
from importlib.metadata import version
from pathlib import Path

import pytest

from minilm import Classification, Config
from minilm.config import ObjectiveSettings
from minilm.config.command_line import parse_flags
from minilm.config.foreign_flags import FOREIGN_FLAGS
from minilm.config.objective_class import find_builtin_classes
from tests.launch import ROOT


def own_flags() -> set[str]:
    """Return all flags of a configuration, also those of each objective, from its types."""
    flags = set()
    for group, kind in typing.get_type_hints(Config).items():
        for choice in find_builtin_classes().values() if kind is ObjectiveSettings else (kind,):
            flags |= {f"--{group}.{field.name.replace('_', '-')}" for field in dataclasses.fields(choice)}
    return flags


def test_every_flag_that_an_answer_names_exists() -> None:
    launchers = {"--multi_gpu", "--num_processes", "--file"}
    named = {flag for answer in FOREIGN_FLAGS.values() for flag in re.findall(r"--[a-z][a-z_.-]*", answer)}
    assert {flag.rstrip(".") for flag in named} - launchers - {"--model.config."[:-1]} <= own_flags()


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("--learning-rate", "use --optim.lr"),
        ("--learning_rate=1e-4", "use --optim.lr"),
        ("--batch_size", "use --batch.examples"),
        ("--per_device_train_batch_size", "use --batch.examples"),
        ("--train.micro_batch_size", "use --batch.micro-tokens"),
        ("--gradient_accumulation_steps", "not needed"),
        ("--num_train_epochs", "use --run.epochs"),
        ("--max_seq_length", "use --batch.max-length"),
        ("--block_size", "use --batch.max-length"),
        ("--logging_steps", "not needed"),
        ("--lr", "use --optim.lr"),
        ("--output-dir", "use --run.output-dir"),
        ("--batch.batch-size", "use --batch.examples"),
    ],
)
def test_a_foreign_flag_is_answered_with_ours(word: str, answer: str) -> None:
    with pytest.raises(ValueError, match=re.escape(word.split("=")[0]) + ": .*" + answer) as error:
        parse_flags(Config(), "", [word, "3"])
    assert "\n" not in str(error.value)


def test_the_table_has_no_name_that_is_a_field_of_a_single_group() -> None:
    """The error for such a name comes from the configuration, so an entry of the table could only contradict it."""
    names = [flag.rpartition(".")[2].replace("-", "_") for flag in own_flags()]
    assert not [name for name in FOREIGN_FLAGS if names.count(name) == 1]


def test_own_flags_and_their_values_pass() -> None:
    config = parse_flags(Config(), "", ["--optim.lr", "1e-3", "--data.no-streaming", "--batch.max_length=64"])
    assert (config.optim.lr, config.batch.max_length) == (1e-3, 64)
    config = parse_flags(Config(), "", ["--model.config.dropout", "0.5", "--run.samples", "batch_size"])
    assert config.model.config == {"dropout": 0.5}
    assert config.run.samples == ("batch_size",)


def test_a_setting_of_another_objective_is_not_called_foreign(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_flags(Config(objective=Classification()), "", ["--objective.rate", "0.2"])
    assert "--objective.rate" in capsys.readouterr().err


def test_version(run) -> None:
    assert run("--version")[:2] == (0, [f"minilm {version('minilm')}"])


def test_train_lists_the_recipes_and_says_how_to_start_one(run) -> None:
    status, output, error = run("train")
    assert (status, error) == (None, [])
    for recipe in Path(ROOT, "recipes").glob("*.py"):
        assert any(line.split()[:1] == [recipe.name] for line in output)
    assert any(line.startswith("Start one:") and "accelerate launch" in line for line in output)


def test_train_says_where_arguments_belong(run) -> None:
    status, _, error = run("train", "--optim.lr", "1e-3")
    assert status == 2
    assert error == ["error: minilm train takes no arguments: pass --optim.lr 1e-3 to a recipe"]
