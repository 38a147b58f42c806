"""The string under each field of the settings, which Python itself drops."""

import ast
import contextlib
import dataclasses
import inspect
from itertools import pairwise
from types import MappingProxyType

from minilm.config import settings


def read_field_help() -> dict[str, dict[str, str]]:
    """Return the string under each field of `minilm.config.settings`, on one line, by class and then by field.

    A class also has the fields of its base class. Raise OSError if the source file is missing.
    """
    classes = [node for node in ast.parse(inspect.getsource(settings)).body if isinstance(node, ast.ClassDef)]
    own = {
        owner.name: {
            ast.unparse(field.target): " ".join(ast.literal_eval(text.value).split())
            for field, text in pairwise(owner.body)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
        }
        for owner in classes
    }
    bases = {name: [base.__name__ for base in getattr(settings, name).__mro__[-2::-1]] for name in own}
    return {name: {field: text for base in bases[name] for field, text in own[base].items()} for name in own}


def attach_field_help() -> None:
    """Write the string under each field of the settings to the places where `help` and tyro look for it.

    `help` shows the docstring of the constructor. tyro looks at the metadata of a field; without it, tyro would parse
    the source file once for each class. Do nothing if only compiled files are installed.
    """
    with contextlib.suppress(OSError):
        for name, texts in read_field_help().items():
            owner = getattr(settings, name)
            owner.__init__.__doc__ = "\n".join(f"{field}: {text}" for field, text in texts.items()) or None
            for field in dataclasses.fields(owner):
                if field.name in texts:
                    field.metadata = MappingProxyType({"help": texts[field.name]})
