"""docs/flags.md has every flag, with the help that `--help` shows."""

import dataclasses

from minilm.config import Batch, Optim, Run
from minilm.config.field_help import read_field_help
from tests.flags_page import PAGE, build_page, describe_values, format_default


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
