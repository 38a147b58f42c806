"""`python -m tests.flags_page` writes docs/flags.md: the flags of minilm/config, and those of other programs."""

import dataclasses
import inspect
import typing
from typing import Any, Literal

from minilm.config import Config, ObjectiveSettings, Phase
from minilm.config.field_help import read_field_help
from minilm.config.foreign_flags import FOREIGN_FLAGS
from minilm.config.objective_class import find_builtin_classes
from tests.launch import ROOT

PAGE = ROOT / "docs" / "flags.md"
HEADER = """# Flags

Every recipe takes these flags. `python RECIPE --help` shows them with the recipe's own defaults; the defaults below are
those of `minilm.Config`. `python -m tests.flags_page` writes this page from the docstrings in
`minilm/config`.

| flag of every recipe | what it does |
|---|---|
| `--dry-run` | Run a few steps, print what the whole run would do and need, and leave the output folder alone. |
| `--from-run FILE` | Take the settings of an earlier run from its `run.json`. Other flags change them. |
| `--seeds 0 1 2` | Train once per seed, each into `seed-<n>` of the output folder. `seeds.json` there has the means. |
| `--debug` | Show tracebacks in place of one-line errors. |

`--data.source` sets the other `--data` flags of a recipe back to their defaults, except `--data.document` and
`--data.eval-fraction`. The [last section](#flags-of-other-programs) lists the flags of Trainer, litgpt, torchtitan and
nanoGPT with those of minilm.
"""
FOREIGN_HEADER = """## Flags of other programs

These are flags of transformers' `TrainingArguments` and example scripts, litgpt, torchtitan and nanoGPT. If you type
one of them, the error message has the text on the right. A flag of minilm without its group, such as `--seed`, is
answered too.

| flag | in minilm |
|---|---|
"""
# The arguments of transformers' Trainer in Python. A test checks that the names of minilm exist.
TRAINER_ARGUMENTS = {
    "train_dataset": "`documents` of `minilm.train.train`",
    "eval_dataset": "`eval_documents` of `minilm.train.train`",
    "optimizers": "`optimizer` and `learning_rate` of `minilm.train.train`",
    "callbacks": "`after_step` of `minilm.train.train`",
    "compute_metrics": "`metrics` of `minilm.Objective`",
    "compute_loss_func": "`loss` of `minilm.Objective`",
    "data_collator": "`collator` of `minilm.Objective`",
}
TRAINER_HEADER = """In Python, these arguments of `Trainer` have counterparts ([fork.md](fork.md)):

| argument | in minilm |
|---|---|
"""


def describe_values(kind: Any) -> str:
    """Return what a user may write after a flag of this type; nothing for a switch."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is bool:
        return ""
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin is tuple:
        return f"{describe_values(parts[0])} …" if parts[-1] is ... else " ".join(map(describe_values, parts))
    if origin is dict:
        return ""
    if parts:
        return " | ".join(dict.fromkeys(describe_values(part) for part in parts if part is not type(None)))
    if kind is Phase:
        return "PHASE"
    return {"int": "INT", "float": "FLOAT", "str": "STR"}[kind.__name__]


def format_default(field: dataclasses.Field[Any]) -> str:
    """Return the default as a user would write it; empty for None, False and empty values."""
    value = field.default_factory() if field.default is dataclasses.MISSING else field.default
    if value is None or value is False or value in ((), {}):
        return ""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def escape(text: str) -> str:
    """Return the text for a cell of a table, with characters escaped that Markdown would take for markup."""
    return text.replace("*", r"\*").replace("<", r"\<").replace("|", r"\|")


def build_section(group: str, kind: type) -> str:
    """Return the flags of one group as a table."""
    texts = read_field_help()[kind]
    types = typing.get_type_hints(kind)
    lines = [
        f"## {group}",
        "",
        " ".join((inspect.getdoc(kind) or "").split()),
        "",
        "| flag | default | what it does |",
        "|---|---|---|",
    ]
    for field in dataclasses.fields(kind):
        flag = f"--{group.split()[0]}.{field.name.replace('_', '-')}"
        values = describe_values(types[field.name]).replace("|", "\\|")
        if flag == "--model.config":
            flag, values = "--model.config.FIELD", "VALUE"
        cell = f"{flag} {values}".rstrip()
        lines.append(f"| `{cell}` | {format_default(field)} | {escape(texts[field.name])} |")
    return "\n".join(lines) + "\n"


def build_foreign_section() -> str:
    """Return the flags of other programs as a table. Flags with the same answer share a row."""
    rows: dict[str, list[str]] = {}
    for name, answer in FOREIGN_FLAGS.items():
        rows.setdefault(answer, []).append(f"`--{name}`")
    lines = [f"| {', '.join(names)} | {escape(answer)} |\n" for answer, names in rows.items()]
    arguments = [f"| `{name}` | {answer} |\n" for name, answer in TRAINER_ARGUMENTS.items()]
    return "".join([FOREIGN_HEADER, *lines, "\n", TRAINER_HEADER, *arguments])


def build_page() -> str:
    """Return the whole page."""
    parts = [HEADER]
    for group, kind in typing.get_type_hints(Config).items():
        if kind is ObjectiveSettings:
            parts += [build_section(f"{group} of {name}", choice) for name, choice in find_builtin_classes().items()]
        else:
            parts.append(build_section(group, kind))
    parts.append(build_foreign_section())
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(build_page(), encoding="utf-8")
