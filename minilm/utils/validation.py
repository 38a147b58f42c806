"""Checks of a user's settings. They raise ValueError with one line. This file does not import torch."""

import difflib
import typing
from collections.abc import Sequence
from typing import Any, Literal


def check(condition: bool, message: str) -> None:
    """Raise ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_choices(group: str, settings: Any) -> None:
    """Raise ValueError if a setting of type Literal, or a tuple of such, has a value that its type does not list.

    group: the name of the group of settings, for the message. settings: a dataclass.
    """
    for name, kind in typing.get_type_hints(type(settings)).items():
        if getattr(settings, name) is None:
            continue
        # In a type such as `Literal["a", "b"] | None`, the choices come first.
        kind = typing.get_args(kind)[0] if type(None) in typing.get_args(kind) else kind
        several = typing.get_origin(kind) is tuple
        kind = typing.get_args(kind)[0] if several else kind
        if typing.get_origin(kind) is Literal:
            value, choices = getattr(settings, name), typing.get_args(kind)
            for one in value if several else (value,):
                check(one in choices, f"{group}.{name} must be one of {', '.join(choices)}, not {one}")


def suggest_name(word: str, names: Sequence[str]) -> str:
    """Return the end of an error message about an unknown name: `'wrod': did you mean 'word'? There are: …`"""
    near = difflib.get_close_matches(word, names, n=1)
    hint = f": did you mean {near[0]!r}?" if near else "."
    listed = ", ".join(sorted(names)[:20]) + (", …" if len(names) > 20 else "")
    return f"{word!r}{hint} There are: {listed or 'none'}."


def check_repo_id(setting: str, name: str) -> None:
    """Raise ValueError if `name` cannot be the name of a repository on the Hugging Face hub.

    setting: the setting that holds the name, for the message.
    """
    # huggingface_hub imports slowly, and few runs need it. Its types do not list this public function.
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(
            f"{setting} takes a repository on the hub, NAME or OWNER/NAME, not {name!r}: a name has at most 96 "
            "letters, digits and _, with single - and . between them, and does not end in .git"
        ) from error
