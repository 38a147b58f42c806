"""The string under each field of the settings, which Python itself drops."""

import ast
import inspect
from itertools import pairwise

from minilm.config import settings


def read_field_help() -> dict[str, dict[str, str]]:
    """Return the string under each field of `minilm.config.settings`, on one line, by class and then by field.

    Raise OSError if the source file is missing.
    """
    classes = [node for node in ast.parse(inspect.getsource(settings)).body if isinstance(node, ast.ClassDef)]
    return {
        owner.name: {
            ast.unparse(field.target): " ".join(ast.literal_eval(text.value).split())
            for field, text in pairwise(owner.body)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
        }
        for owner in classes
    }
