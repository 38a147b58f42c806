"""What a model, its tokenizer and the examples must agree on, checked before the first step."""

import inspect
import logging
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilm.data.corpus import Examples, PreparedData
from minilm.data.special_ids import SPECIAL_ROLES, count_embedding_rows, encode_placeholder
from minilm.models.embeddings import find_embedding
from minilm.models.head import Head
from minilm.models.temporary_changes import evaluation_mode

log = logging.getLogger("minilm")

_PART = 2**22  # ids that are looked at in one go


def check_compatibility(head: Head, prepared: PreparedData) -> None:
    """Raise ValueError for examples that the model would read otherwise than transformers does, or not at all.

    Warns of special tokens that the model's configuration and the tokenizer name differently, of an end of text whose
    embedding is not trained, and of token types that a language model does not read.
    """
    _compare_special_ids(head.model, prepared.tokenizer)
    if prepared.labels is None:
        _warn_of_types(head.model, prepared.tokenizer)
    parts = {"training texts": prepared.train, "evaluation texts": prepared.eval}
    if prepared.train is prepared.eval:
        parts = {"texts": prepared.eval}
    for part, examples in parts.items():
        _check_types(head.model, examples)
        for id in getattr(head.model, "read_before_padding", ()) if len(examples) else ():
            _check_ends(head.model, prepared.tokenizer, part, examples, id)
        for id in head.misread_ids if len(examples) else ():
            _check_inside(head, prepared.tokenizer, part, examples, id)


def _compare_special_ids(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    config = network.config.get_text_config()
    other = []
    for role in SPECIAL_ROLES:
        ours, theirs = getattr(tokenizer, f"{role}_token_id"), getattr(config, f"{role}_token_id", None)
        # A tokenizer without a token for padding pads with the end of a text.
        if ours is None or theirs is None or (role == "pad" and ours == tokenizer.eos_token_id):
            continue
        if ours != theirs and not (isinstance(theirs, list) and ours in theirs):
            other.append(f"{role}_token_id is {theirs} and {ours}")
    if other:
        log.warning(
            f"the model's configuration and the tokenizer name other special tokens ({', '.join(other)}): the model "
            "keeps its own"
        )
    padding = getattr(find_embedding(network), "padding_idx", None)
    if padding is not None and padding == tokenizer.eos_token_id:
        log.warning(
            f"{tokenizer.eos_token}, which ends texts, is padding in the model's configuration (pad_token_id "
            f"{padding}): its row of the embedding is not trained"
        )


def _check_types(network: PreTrainedModel, examples: Examples) -> None:
    known = getattr(network.config.get_text_config(), "type_vocab_size", None)
    if examples.type_ids is None or not isinstance(known, int) or known < 1:
        return
    largest = max(int(types.max(initial=0)) for types in _parts(examples.type_ids))
    if largest >= known:
        raise ValueError(
            f"the tokenizer gives token types up to {largest} and {type(network).__name__} knows {known}: take the "
            "tokenizer that the model was trained with, or for a new model pass --model.config.type-vocab-size "
            f"{largest + 1}"
        )


def _warn_of_types(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn where the model would read a row otherwise with the types that the tokenizer gives to a single text."""
    named = "token_type_ids" in tokenizer.model_input_names
    if not named or "token_type_ids" not in inspect.signature(network.forward).parameters:
        return
    known = getattr(network.config.get_text_config(), "type_vocab_size", None)
    types = sorted({*encode_placeholder(tokenizer).type_ids})
    # Without types these models take all to be 0, but for those that look types up elsewhere, as GPT-2 among its words.
    if known is None or (known > 0 and any(types)):
        log.warning(
            f"the tokenizer gives texts the token types {', '.join(map(str, types))}, which a language model is "
            "trained and evaluated without here: to use the saved model so too, take token_type_ids out of "
            "model_input_names in its tokenizer_config.json"
        )


def _check_inside(head: Head, tokenizer: PreTrainedTokenizerBase, part: str, examples: Examples, id: int) -> None:
    """Raise ValueError for a text with the id in it; rows that are classified may all have it equally often."""
    count_E = np.concatenate([*_counts(examples, id)])
    usual = 0 if examples.labels is None else int(np.bincount(count_E).argmax())
    name, token = (
        type(head.model).__name__,
        tokenizer.convert_ids_to_tokens(id) if id < count_embedding_rows(tokenizer) else "",
    )
    if usual == 0 and not _can_read(head.model, examples[int(count_E.argmin())]):
        raise ValueError(
            f"{name} reads the class of a text at the token that ends it, by its configuration {token} (eos_token_id "
            f"{id}), and the tokenizer puts none there: take the tokenizer that the model was trained with; a run "
            "can take another one with --tokens.name"
        )
    if (others := np.flatnonzero(count_E != usual)).size:
        first = _name_first(tokenizer, examples, id, int(others[0]))
        raise ValueError(
            f"{len(others):,} of the {part} hold the special token {token} (id {id}), by which {name} finds "
            f"where a row ends; the first of them{first}: take it out of the text"
        )


def _check_ends(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, part: str, examples: Examples, id: int
) -> None:
    """Raise ValueError for a row of several tokens that ends with the id, by which the model looks for the last one."""
    holding = np.flatnonzero(np.concatenate([*_counts(examples, id)]).astype(bool) & (examples.lengths > 1))
    ended = [int(index) for index in holding if examples[int(index)][-1] == id]
    if not ended:
        return
    first = _name_first(tokenizer, examples, id, ended[0])
    token = tokenizer.convert_ids_to_tokens(id) if id < count_embedding_rows(tokenizer) else ""
    raise ValueError(
        f"{len(ended):,} of the {part} end with the token {token} (id {id}), which is padding for "
        f"{type(network).__name__} in a batch: it would read their class at the token before; the first of "
        f"them{first}. Take the token off the end of the text, or name a token that ends no text as pad_token in "
        "the tokenizer's tokenizer_config.json"
    )


def _name_first(tokenizer: PreTrainedTokenizerBase, examples: Examples, id: int, example: int) -> str:
    """The number and the beginning of the first text with the special id, or else what the tokens of `example` say."""
    number, text = examples.special_tokens.get(id, (0, ""))
    # A text that is classified is one example.
    if number and (examples.labels is None or number == example + 1):
        return f", number {number:,}, begins {text!r}"
    middle = examples.ids[examples.start[example] : examples.stop[example]]
    said = "" if examples.labels is None else f", number {example + 1:,},"
    return f"{said} begins {str(tokenizer.decode(middle)).strip()[:40]!r} by its tokens"


def _can_read(network: PreTrainedModel, row: NDArray[np.int64]) -> bool:
    try:
        with evaluation_mode(network):
            network(input_ids=torch.from_numpy(row)[None].to(network.device))
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


def _counts(examples: Examples, id: int) -> Iterator[NDArray[np.int64]]:
    """How often each example's text holds the id, some examples at a time."""
    at = 0
    while at < len(examples):
        stop = max(at + 1, int(np.searchsorted(examples.stop, examples.start[at] + _PART)))
        first = int(examples.start[at])
        hits = np.append(0, np.cumsum(examples.ids[first : int(examples.stop[stop - 1])] == id))
        yield hits[examples.stop[at:stop] - first] - hits[examples.start[at:stop] - first]
        at = stop


def _parts(flat: object) -> Iterator[NDArray[np.uint8]]:
    for at in range(0, len(flat), _PART):  # type: ignore[arg-type]
        yield flat[at : at + _PART]  # type: ignore[index]
