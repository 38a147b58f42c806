"""docs/flags.md has every flag, with the help that `--help` shows."""

import dataclasses

from minilm.config import Batch, Optim, Run
from tests.flags_page import PAGE, default_of, documented, page, values_of


def test_the_page_is_that_of_the_configuration() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.flags_page writes it anew"


def test_a_row_has_the_values_the_default_and_the_docstring() -> None:
    fields = {field.name: field for kind in (Batch, Optim, Run) for field in dataclasses.fields(kind)}
    assert [default_of(fields[name]) for name in ("examples", "betas", "seed", "overwrite")] == [
        "32",
        "0.9 0.999",
        "0",
        "",
    ]
    assert values_of(int | None) == "INT"
    assert documented(Run)["seed"] == "Seed of the initial weights, the order, the masks and dropout."
    assert "| `--batch.examples INT` | 32 | Examples in an optimizer step" in page()
