"""The files of sentence-transformers beside a model: how the embedding of a text is made from its hidden states.

All versions of sentence-transformers since 2 read the files that `describe_embedding` writes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers.utils.hub import cached_file

TextPooling = Literal["mean", "first", "last"]
"""What becomes the embedding: the mean of the hidden states of all tokens, or that of the first or the last one."""

# For each pooling, the name in older folders of sentence-transformers and the name in newer ones.
_POOLINGS: dict[TextPooling, tuple[str, str]] = {
    "mean": ("pooling_mode_mean_tokens", "mean"),
    "first": ("pooling_mode_cls_token", "cls"),
    "last": ("pooling_mode_lasttoken", "lasttoken"),
}
_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True, kw_only=True)
class EmbeddingFormat:
    """How the embedding of a text is made."""

    pooling: TextPooling
    normalized: bool
    """Whether an embedding is scaled to length 1."""
    max_length: int | None
    """The most tokens of a text that are read, special tokens included. None: as many as the model reads."""


def describe_embedding(pooling: str, width: int, max_length: int) -> dict[str, str]:
    """Return the text of each file that makes a saved model a model of sentence-transformers, with length 1.

    width: the size of an embedding. max_length: the most tokens of a text.
    """
    folders = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": index, "name": str(index), "path": folder, "type": f"sentence_transformers.models.{name}"}
        for index, (folder, name) in enumerate(zip(folders, _MODULES, strict=True))
    ]
    modes = {older: name == pooling for name, (older, _) in _POOLINGS.items()}
    contents: dict[str, Any] = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": width, **modes},
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
    }
    return {name: json.dumps(content, indent=2) + "\n" for name, content in contents.items()}


def read_embedding_format(name: str | Path) -> EmbeddingFormat | None:
    """Return the format of the embeddings of a folder or hub id of sentence-transformers, or None if it is not one.

    Raises ValueError for a model with other modules or another pooling.
    """
    modules = _read_json(name, "modules.json")
    if modules is None:
        return None
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    if kinds not in ([*_MODULES], [*_MODULES[:2]]):
        raise ValueError(f"{name}: modules.json lists {', '.join(kinds)}, of which minilm reads {', '.join(_MODULES)}")
    settings = _read_json(name, f"{modules[1]['path']}/config.json") or {}
    if "pooling_mode" in settings:
        modes = settings["pooling_mode"]
        chosen = modes if isinstance(modes, list) else [modes]
    else:
        chosen = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
    pooling = [name for name, modes in _POOLINGS.items() if chosen in ([modes[0]], [modes[1]])]
    if not pooling:
        raise ValueError(f"{name}: minilm cannot pool by {', '.join(map(str, chosen))}, but by {', '.join(_POOLINGS)}")
    limits = _read_json(name, "sentence_bert_config.json") or {}
    return EmbeddingFormat(
        pooling=pooling[0], normalized=len(kinds) == len(_MODULES), max_length=limits.get("max_seq_length")
    )


def _read_json(name: str | Path, file: str) -> Any:
    """Return the content of a JSON file of a folder or hub id, or None if the file is missing."""
    path = cached_file(
        str(name),
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy the model's folder again") from error
