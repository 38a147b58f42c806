"""The string under each field of the settings, which Python itself drops."""

import ast
import contextlib
import dataclasses
import inspect
from itertools import pairwise
from types import MappingProxyType

from minilm.config import objective_settings, phases, settings


def read_field_help() -> dict[type, dict[str, str]]:
    """Return the string under each field of minilm's settings, on one line, by class and then by field.

    A class also has the fields of its base class. Raise OSError if a source file is missing.
    """
    own = {}
    for module in (objective_settings, phases, settings):
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.ClassDef):
                own[vars(module)[node.name]] = {
                    ast.unparse(field.target): " ".join(ast.literal_eval(text.value).split())
                    for field, text in pairwise(node.body)
                    if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
                }
    return {
        owner: {field: text for base in owner.__mro__[::-1] for field, text in own.get(base, {}).items()}
        for owner in own
    }


def attach_field_help() -> None:
    """Write the string under each field of the settings to the places where `help` and tyro look for it.

    `help` shows the docstring of the constructor. tyro looks at the metadata of a field; without it, tyro would parse
    the source files once for each class. Do nothing if only compiled files are installed.
    """
    with contextlib.suppress(OSError):
        for owner, texts in read_field_help().items():
            vars(owner)["__init__"].__doc__ = "\n".join(f"{field}: {text}" for field, text in texts.items()) or None
            for field in dataclasses.fields(owner):
                if field.name in texts:
                    field.metadata = MappingProxyType({"help": texts[field.name]})
