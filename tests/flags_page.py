"""The page of flags: `python -m tests.flags_page` writes docs/flags.md from the docstrings of the configuration."""

import ast
import dataclasses
import inspect
import typing
from itertools import pairwise
from typing import Any, Literal

from minilm.config import Config
from tests.launch import ROOT

PAGE = ROOT / "docs" / "flags.md"
HEADER = """# Flags

Every recipe takes these flags. `python RECIPE --help` shows them with the recipe's own defaults; a default below is
that of `minilm.Config`. This page is made from the docstrings in `minilm/config.py` by `python -m tests.flags_page`.

| flag of every recipe | what it does |
|---|---|
| `--dry-run` | Run a few steps, print what the whole run would be and take, and leave the output folder alone. |
| `--from-run FILE` | Start from the settings of an earlier run, its `run.json`. Other flags change them. |
| `--seeds 0 1 2` | Train once per seed, into `seed-<n>` of the output folder, where `seeds.json` has the means. |
| `--debug` | Show tracebacks in place of one-line errors. |

`--data.source` sets the other `--data` flags of a recipe back to their defaults, except `--data.document` and
`--data.eval-fraction`.
"""


def documented(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, on one line."""
    (owner,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(owner, ast.ClassDef)
    return {
        ast.unparse(field.target): " ".join(ast.literal_eval(text.value).split())
        for field, text in pairwise(owner.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def values_of(kind: Any) -> str:
    """What may stand after a flag of this type, or nothing for a switch."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is bool:
        return ""
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin is tuple:
        return f"{values_of(parts[0])} …" if parts[-1] is ... else " ".join(map(values_of, parts))
    if origin is dict:
        return ""
    if parts:
        return " | ".join(dict.fromkeys(values_of(part) for part in parts if part is not type(None)))
    return {"int": "INT", "float": "FLOAT", "str": "STR"}[kind.__name__]


def default_of(field: dataclasses.Field[Any]) -> str:
    """The default as one would type it; empty where there is none to type."""
    value = field.default_factory() if field.default is dataclasses.MISSING else field.default
    if value is None or value is False or value in ((), {}):
        return ""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def escaped(text: str) -> str:
    """The text of a cell, with what Markdown would take for markup kept as it is."""
    return text.replace("*", r"\*").replace("<", r"\<").replace("|", r"\|")


def section(group: str, kind: type) -> str:
    """The flags of one group as a table."""
    texts, types = documented(kind), typing.get_type_hints(kind)
    title = inspect.getdoc(kind)
    lines = [
        f"## {group}",
        "",
        " ".join((title or "").split()),
        "",
        "| flag | default | what it does |",
        "|---|---|---|",
    ]
    for field in dataclasses.fields(kind):
        words = values_of(types[field.name]).replace("|", "\\|")
        flag = f"--{group.split()[0]}.{field.name.replace('_', '-')}" + (
            ".FIELD VALUE" if field.name == "config" and group == "model" else ""
        )
        lines.append(f"| `{flag}{' ' if words else ''}{words}` | {default_of(field)} | {escaped(texts[field.name])} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    parts = [HEADER]
    for group, kind in typing.get_type_hints(Config).items():
        choices = typing.get_args(kind)
        parts += [section(f"{group} of {choice.__name__}", choice) for choice in choices] or [section(group, kind)]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
