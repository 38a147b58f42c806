"""docs/flags.md has every flag, with the help that `--help` shows."""

import dataclasses
import inspect
import re

import minilm
from minilm.config import Batch, Optim, Run
from minilm.config.field_help import read_field_help
from minilm.config.foreign_flags import FOREIGN_FLAGS
from minilm.train import train
from tests.flags_page import PAGE, TRAINER_ARGUMENTS, build_foreign_section, build_page, describe_values, format_default


def test_the_page_is_that_of_the_configuration() -> None:
    assert PAGE.read_text(encoding="utf-8") == build_page(), "python -m tests.flags_page writes it anew"


def test_a_row_has_the_values_the_default_and_the_docstring() -> None:
    fields = {field.name: field for kind in (Batch, Optim, Run) for field in dataclasses.fields(kind)}
    assert [format_default(fields[name]) for name in ("examples", "betas", "seed", "overwrite")] == [
        "32",
        "0.9 0.999",
        "0",
        "",
    ]
    assert describe_values(int | None) == "INT"
    assert read_field_help()[Run]["seed"] == "Seed of the initial weights, the order, the masks and dropout."
    assert "| `--batch.examples INT` | 32 | Examples in an optimizer step" in build_page()


def test_each_flag_of_another_program_has_a_place_in_one_row() -> None:
    rows = [line for line in build_foreign_section().splitlines() if line.startswith("| `--")]
    cells = [line.strip("| ").split(" | ") for line in rows]
    listed = {name: answer for names, answer in cells for name in re.findall(r"`--(\w+)`", names)}
    assert listed == FOREIGN_FLAGS
    assert len({answer for _, answer in cells}) == len(rows)


def test_the_counterparts_of_trainers_arguments_exist() -> None:
    owners = {"minilm.train.train": inspect.signature(train).parameters, "minilm.Objective": vars(minilm.Objective)}
    for text in TRAINER_ARGUMENTS.values():
        *names, owner = re.findall(r"`([\w.]+)`", text)
        assert names
        assert all(name in owners[owner] for name in names), text
