"""The ids of labels. A checkpoint's ids are used if the data have its labels. Otherwise the data decide them."""

import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from minilm.data.label_column import WHOLE_NUMBER


@dataclass(frozen=True, kw_only=True)
class LabelIds:
    """The id of each label of the data, and the name of each id in the model."""

    ids: dict[str, int]
    names: tuple[str, ...]
    same_as_checkpoint: bool = False
    """Whether the ids are those of the checkpoint, so that its head is used unchanged."""
    renamings: tuple[tuple[str, str], ...] = ()
    """(label in the data, name in the checkpoint), for each label whose names differ."""


def match_labels(
    data_labels: Collection[str], class_names: Sequence[str], model_labels: Sequence[str], places: int | None = None
) -> LabelIds:
    """Return names and ids for the labels that occur in the data.

    class_names: those of the data's ClassLabel, if any.
    model_labels: a checkpoint's labels by id. Its names and ids are used if the data have the same names, whatever
        their case and spacing. They are used too if the data have the ids instead and the names are not numbers. If the
        names are only LABEL_0, LABEL_1 and so on, and there are as many `class_names`, these get the checkpoint's ids.
    places: the length of multi-hot lists, which give each label a place but no name.
    """
    if places is not None:
        numbers = tuple(map(str, range(places)))
        if len(model_labels) == places:
            return _use_model_labels(numbers, range(places), model_labels)
        return _number_labels(numbers)
    if by_name := _match_names(data_labels, model_labels):
        names = [*by_name, *model_labels]
        return _use_model_labels(names, [*by_name.values(), *range(len(model_labels))], model_labels)
    if class_names:
        if len(model_labels) == len(class_names) and _are_generic(model_labels):
            match = _use_model_labels(class_names, range(len(model_labels)), model_labels)
            return replace(match, names=tuple(class_names))
        return _number_labels(class_names)
    # If the checkpoint's names are numbers, numbers in the data could only mean these names, and they did not match.
    by_number = all(map(WHOLE_NUMBER.fullmatch, data_labels)) and not all(map(WHOLE_NUMBER.fullmatch, model_labels))
    if by_number and all(0 <= int(name) < len(model_labels) for name in data_labels):
        ids = range(len(model_labels))
        return _use_model_labels([*map(str, ids)], ids, model_labels)
    return _number_labels(sort_names(data_labels))


def sort_names(names: Collection[str]) -> tuple[str, ...]:
    """Return the names in the order of their ids: whole numbers and LABEL_<number> by number, others alphabetically."""
    for prefix in ("", "LABEL_"):
        if all(name.startswith(prefix) and WHOLE_NUMBER.fullmatch(name.removeprefix(prefix)) for name in names):
            return tuple(sorted(names, key=lambda name: int(name.removeprefix(prefix))))
    return tuple(sorted(names))


def normalize_name(name: str) -> str:
    """Return a form of the name that ignores case, spacing and Unicode composition, for comparisons."""
    return " ".join(unicodedata.normalize("NFKC", name).split()).casefold()


def format_names(names: Sequence[str], count: int = 10) -> str:
    """Return the first `count` names, separated by commas."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def quote_names(names: Sequence[str]) -> str:
    """Return the first ten names in quotes, separated by commas."""
    return format_names([*map(repr, names)])


def _use_model_labels(names: Sequence[str], ids: Iterable[int], model_labels: Sequence[str]) -> LabelIds:
    """Return the labels of a checkpoint. The data write the label with the id `ids[i]` as `names[i]`."""
    pairs = dict(zip(names, ids, strict=True))
    renamings = tuple((name, model_labels[index]) for name, index in pairs.items() if name != model_labels[index])
    return LabelIds(ids=pairs, names=tuple(model_labels), same_as_checkpoint=True, renamings=renamings)


def _number_labels(names: Sequence[str]) -> LabelIds:
    """Return labels whose ids are their places in `names`."""
    return LabelIds(ids={name: index for index, name in enumerate(names)}, names=tuple(names))


def _match_names(data_labels: Collection[str], model_labels: Sequence[str]) -> dict[str, int]:
    """Return the checkpoint's id of each label; empty if the checkpoint lacks a label, or if a label fits two."""
    for simplify in (str, normalize_name):
        theirs = {simplify(name): index for index, name in enumerate(model_labels)}
        ours = {name: theirs.get(simplify(name)) for name in sort_names(data_labels)}
        if len(theirs) == len(model_labels) and len(set(ours.values())) == len(ours) and None not in ours.values():
            return {name: index for name, index in ours.items() if index is not None}
    return {}


def _are_generic(model_labels: Sequence[str]) -> bool:
    """Return whether a checkpoint has only the names that transformers invents: LABEL_0, LABEL_1, and so on."""
    return tuple(model_labels) == tuple(f"LABEL_{index}" for index in range(len(model_labels)))
