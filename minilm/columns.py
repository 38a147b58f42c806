"""From rows of any shape to documents: the columns `text`, `pair` and `label`, each by its own dotted path."""

import logging
import math
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, LargeList, List, Value
from datasets.fingerprint import Hasher

from minilm.checks import closest

log = logging.getLogger("minilm")
_FLAGS = {"text": "--data.column", "pair": "--data.pair-column", "label": "--data.label-column"}


def take_columns(
    rows: Dataset,
    source: str,
    text: str,
    pair: str | None = None,
    label: str | None = None,
    kept: Path | None = None,
) -> Dataset:
    """`rows` reduced to `text`, and `pair` and `label` where they are asked for, each read from a dotted path.

    Texts are strings; a list of strings inside a nested column is joined with a space. A label keeps its type: an
    integer, a float, a string, a truth value or a list of them, and of a ClassLabel the names. Where labels are asked
    for, no row may lack one or have a blank text. The result is memory-mapped: in the folder `kept`, else beside the
    rows. Raises ValueError that names the column or the row.
    """
    paths = {role: path.split(".") for role, path in (("text", text), ("pair", pair), ("label", label)) if path}
    for role, (name, *_) in paths.items():
        if name not in rows.column_names:
            raise ValueError(f"{source}: no column {closest(name, rows.column_names)} Pass {_FLAGS[role]}")
    sibling = text.removesuffix("1") + "2"
    if label and not pair and text.endswith("1") and sibling in rows.column_names:
        log.warning(f"WARNING: there is {sibling} too, which is not read; for pairs pass --data.pair-column {sibling}")
    names = list(dict.fromkeys(name for name, *_ in paths.values()))

    def extract(*columns_and_indices: list[Any]) -> dict[str, list[Any]]:
        *columns, indices = columns_and_indices
        cells = dict(zip(names, columns, strict=True))
        return {
            role: [
                _value(role, cell, path, source, row, labelled=bool(label))
                for row, cell in zip(indices, cells[path[0]], strict=True)
            ]
            for role, path in paths.items()
        }

    features = {role: Value("string") for role in paths}
    if label:
        features["label"] = _feature(rows.features, paths["label"])
    key = Hasher.hash((rows._fingerprint, source, text, pair, label))
    return rows.map(
        extract,
        input_columns=names,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=Features(features),
        cache_file_name=str(kept / f"documents-{key}.arrow") if kept else None,
        desc="text",
    )


def _value(role: str, cell: Any, path: list[str], source: str, row: int, *, labelled: bool) -> Any:
    """What a cell of the column `path[0]` gives a document of this row as its text, its second text or its label."""
    column, keys, flag = ".".join(path), path[1:], _FLAGS[role]
    where = f"{source}: row {row} of column {column!r}"
    if role == "label":
        return _label(_reach(cell, keys, f"{source}: column {column!r}", flag), where)
    text = text_of(cell, keys, source, column, row, flag)
    if labelled and not text.strip():
        raise ValueError(f"{where} holds no text; give it one or take the row out")
    return text


def _reach(value: Any, keys: list[str], where: str, flag: str) -> Any:
    """What lies under the keys in nested objects; of a list of objects, what lies under them in each."""
    for at, key in enumerate(keys):
        if isinstance(value, list):
            return [_reach(item, keys[at:], where, flag) for item in value]
        if isinstance(value, dict) and key not in value:
            raise ValueError(f"{where} has no field {closest(key, list(value))} Pass {flag}")
        value = value[key] if isinstance(value, dict) else None
    return value


def _feature(feature: Any, path: list[str]) -> Any:
    """The type of what `_reach` finds."""
    for at, key in enumerate(path):
        if isinstance(feature, List | LargeList):
            return List(_feature(feature.feature, path[at:]))
        feature = feature[key]
    return feature


def text_of(value: Any, keys: list[str], source: str, column: str, row: int, flag: str = _FLAGS["text"]) -> str:
    """The text under the keys in a cell; a list of strings in there is joined with a space."""
    value = _reach(value, keys, f"{source}: column {column!r}", flag)
    if keys and isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = " ".join(value)
    if not isinstance(value, str):
        raise ValueError(
            f"{source}: row {row} of column {column!r} holds {type(value).__name__} where text is expected; "
            f"change the row, or pass another {flag}"
        )
    return value


def _label(value: Any, where: str) -> Any:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{where} holds no label; give it one or take the row out")
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, bool | int | str) or (isinstance(item, float) and math.isfinite(item)):
            continue
        what = "None in a list" if item is None else repr(value)[:40]
        raise ValueError(f"{where} holds {what} where a label is expected: a number, a name, or a list of them")
    return value
