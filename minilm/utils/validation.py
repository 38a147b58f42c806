"""Checks of what a user wrote: they raise ValueError with one line. No torch here: `minilm.config` imports this."""

import difflib
import typing
from collections.abc import Sequence
from typing import Any, Literal


def check(holds: bool, message: str) -> None:
    """Raise ValueError with this message unless it holds."""
    if not holds:
        raise ValueError(message)


def check_choices(group: str, settings: Any) -> None:
    """Refuse a value that is not among those of its Literal type, or of the tuple of such."""
    for name, kind in typing.get_type_hints(type(settings)).items():
        several = typing.get_origin(kind) is tuple
        kind = typing.get_args(kind)[0] if several else kind
        if typing.get_origin(kind) is Literal:
            value, choices = getattr(settings, name), typing.get_args(kind)
            for one in value if several else (value,):
                check(one in choices, f"{group}.{name} must be one of {', '.join(choices)}, not {one}")


def closest(word: str, known: Sequence[str]) -> str:
    """`'wrod': did you mean 'word'? There are: …`, the end of an error message about an unknown name."""
    near = difflib.get_close_matches(word, known, n=1)
    hint = f": did you mean {near[0]!r}?" if near else "."
    listed = ", ".join(sorted(known)[:20]) + (", …" if len(known) > 20 else "")
    return f"{word!r}{hint} There are: {listed or 'none'}."


def check_repo_id(setting: str, name: str) -> None:
    """Refuse for `setting` what can be no name of a repository on the Hugging Face hub."""
    # Imports slowly, and few runs ask for it; its types do not say that it is public.
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except ValueError as error:
        allowed = "of letters, digits, _, and single - and . between them, 96 at most"
        raise ValueError(
            f"{setting} takes a repository on the hub, NAME or OWNER/NAME {allowed}, not {name!r}"
        ) from error
