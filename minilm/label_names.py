"""Names and ids of the labels: those of a checkpoint where the data's labels are its own, else the data's."""

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from minilm.label_column import WHOLE


@dataclass(frozen=True, kw_only=True)
class LabelIds:
    """The id of each label as the data write it, and the name of each id in the model."""

    ids: dict[str, int]
    names: tuple[str, ...]
    kept: bool = False
    """Whether they are a checkpoint's, so that its head knows them."""
    other: tuple[tuple[str, str], ...] = ()
    """Labels as the data write them, each with its other name in the checkpoint."""


def match_labels(
    occurring: Collection[str], class_names: Sequence[str], known: Sequence[str], places: int | None = None
) -> LabelIds:
    """Return names and ids for the labels that occur in the data; `class_names` are those of its ClassLabel, if any.

    `known` are a checkpoint's labels by id. The data's are taken for them where each has the same name (case and space
    around it do not matter), or where they are numbers and the checkpoint's names are not. `places` is the number of
    labels of multi-hot lists, whose labels have a place and no name.
    """
    if places is not None:
        numbers = tuple(map(str, range(places)))
        return _keep(numbers, range(places), known) if len(known) == places else _start(numbers)
    if by_name := _by_name(occurring, known):
        return _keep([*by_name, *known], [*by_name.values(), *range(len(known))], known)
    if class_names:
        if len(known) == len(class_names) and _are_generic(known):
            return replace(_keep(class_names, range(len(known)), known), names=tuple(class_names))
        return _start(class_names)
    # Where a checkpoint's names are numbers themselves, no other numbers can be meant.
    by_number = all(map(WHOLE.fullmatch, occurring)) and not all(map(WHOLE.fullmatch, known))
    if by_number and all(0 <= int(name) < len(known) for name in occurring):
        return _keep([*map(str, range(len(known)))], range(len(known)), known)
    return _start(sort_names(occurring))


def sort_names(names: Iterable[str]) -> tuple[str, ...]:
    """Names in the order of their ids: whole numbers, and LABEL_0 and so on, by number; other names by characters."""
    names = list(names)
    numbers = [re.fullmatch(rf"(?:LABEL_)?({WHOLE.pattern})", name) for name in names]
    if len({name.startswith("LABEL_") for name in names}) == 1 and all(numbers):
        return tuple(sorted(names, key=lambda name: int(name.removeprefix("LABEL_"))))
    return tuple(sorted(names))


def fold(name: str) -> str:
    """The name without what does not tell labels apart: case, space around it, and how Unicode composes it."""
    return " ".join(unicodedata.normalize("NFKC", name).split()).casefold()


def list_names(names: Sequence[str], count: int = 10) -> str:
    """The first names, for a message."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _keep(names: Sequence[str], ids: Iterable[int], known: Sequence[str]) -> LabelIds:
    """The labels of a checkpoint, which the data call `names`."""
    pairs = dict(zip(names, ids, strict=True))
    other = tuple((name, known[index]) for name, index in pairs.items() if name != known[index])
    return LabelIds(ids=pairs, names=tuple(known), kept=True, other=other)


def _start(names: Sequence[str]) -> LabelIds:
    """New labels, numbered in this order."""
    return LabelIds(ids={name: index for index, name in enumerate(names)}, names=tuple(names))


def _by_name(occurring: Collection[str], known: Sequence[str]) -> dict[str, int]:
    """The checkpoint's id of each label; none where a label is not the checkpoint's, or could be two of them."""
    for simplify in (str, fold):
        theirs = {simplify(name): index for index, name in enumerate(known)}
        ours = {name: theirs.get(simplify(name)) for name in sort_names(occurring)}
        if len(theirs) == len(known) and len(set(ours.values())) == len(ours) and None not in ours.values():
            return {name: index for name, index in ours.items() if index is not None}
    return {}


def _are_generic(known: Sequence[str]) -> bool:
    """Whether a checkpoint's labels are transformers' own, for want of names."""
    return tuple(known) == tuple(f"LABEL_{index}" for index in range(len(known)))
