"""Checks that a model, its tokenizer and the examples fit each other, before the first step."""

import inspect
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilm.data.corpus import Examples, PreparedData
from minilm.data.special_ids import SPECIAL_ROLES, count_embedding_rows, encode_placeholder
from minilm.data.stream_pieces import split_present
from minilm.models.embeddings import find_embedding
from minilm.models.head import Head
from minilm.models.model_inputs import add_choice_axis
from minilm.models.temporary_changes import evaluation_mode

log = logging.getLogger("minilm")

_PART_IDS = 2**22  # number of ids to read into memory at a time


def check_compatibility(head: Head, prepared: PreparedData) -> None:
    """Raise ValueError for examples that the model cannot read, or would read differently than transformers does.

    Logs a warning if the model's configuration and the tokenizer name different special tokens, if the embedding of the
    token that ends texts is not trained, or if the tokenizer gives token types, which the examples do not hold.
    """
    _compare_special_ids(head.model, prepared.tokenizer)
    if prepared.labels is None and prepared.train.type_ids is None:
        _warn_about_types(head.model, prepared.tokenizer)
    parts = [("training texts", examples) for examples in prepared.all_train]
    parts += [("evaluation texts", prepared.eval)]
    if prepared.train is prepared.eval:
        parts = [("texts", examples) for examples in prepared.all_train]
    for part, examples in parts:
        _check_types(head.model, examples)
        for id in getattr(head.model, "read_before_padding", ()) if len(examples) else ():
            _check_last_tokens(head.model, prepared.tokenizer, part, examples, id)
        for id in head.misread_ids if len(examples) else ():
            _check_misread_ids(head, prepared.tokenizer, part, examples, id)


def _compare_special_ids(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    config = network.config.get_text_config()
    different = []
    for role in SPECIAL_ROLES:
        ours, theirs = getattr(tokenizer, f"{role}_token_id"), getattr(config, f"{role}_token_id", None)
        # A tokenizer without a padding token pads with the token that ends texts.
        if ours is None or theirs is None or (role == "pad" and ours == tokenizer.eos_token_id):
            continue
        if ours != theirs and not (isinstance(theirs, list) and ours in theirs):
            different.append(f"{role}_token_id is {theirs} and {ours}")
    if different:
        log.warning(
            f"the model's configuration and the tokenizer name other special tokens ({', '.join(different)}): the "
            "model keeps its own"
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
    largest = max(int(types.max(initial=0)) for types in _split(examples.type_ids))
    if largest >= known:
        raise ValueError(
            f"the tokenizer gives token types up to {largest} and {type(network).__name__} knows {known}: use the "
            "tokenizer that the model was trained with, or for a new model pass --model.config.type-vocab-size "
            f"{largest + 1}"
        )


def _warn_about_types(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Log a warning if token types that the tokenizer gives to a single text would change how the model reads it."""
    named = "token_type_ids" in tokenizer.model_input_names
    if not named or "token_type_ids" not in inspect.signature(network.forward).parameters:
        return
    known = getattr(network.config.get_text_config(), "type_vocab_size", None)
    types = sorted({*encode_placeholder(tokenizer).type_ids})
    # Without types, most models take all types to be 0. But some have no embedding for types: GPT-2 looks them up among
    # its words, so that type 0 changes its result.
    if known is None or (known > 0 and any(types)):
        log.warning(
            f"the tokenizer gives texts the token types {', '.join(map(str, types))}, but this model is trained and "
            "evaluated without token types: to use the saved model without them too, remove token_type_ids from "
            "model_input_names in its tokenizer_config.json"
        )


def _check_misread_ids(head: Head, tokenizer: PreTrainedTokenizerBase, part: str, examples: Examples, id: int) -> None:
    """Raise ValueError for a text that contains the id. Rows of a classifier may all contain it equally often.

    Also raise it if the model reads the class at this id and the tokenizer does not add the id.
    """
    count_E = np.concatenate([*_count_id(examples, id)])
    usual = 0 if examples.labels is None else int(np.bincount(count_E).argmax())
    name = type(head.model).__name__
    token = tokenizer.convert_ids_to_tokens(id) if id < count_embedding_rows(tokenizer) else ""
    if usual == 0 and not _can_read(head.model, examples[int(count_E.argmin())]):
        raise ValueError(
            f"{name} reads the class of a text at the token that ends it, which is {token} in its configuration "
            f"(eos_token_id {id}), and the tokenizer does not add this token: use the tokenizer that the model was "
            "trained with (--tokens.name)"
        )
    _check_count(tokenizer, name, part, examples, id, count_E != usual)


def check_window(
    tokenizer: PreTrainedTokenizerBase, name: str, misread_ids: Sequence[int], number: int, examples: Examples
) -> None:
    """Raise ValueError if a text of a stream's window contains one of the ids that the model misreads inside a text.

    Each host checks the texts that it has.

    name: the class of the model. number: that of the window, from 0.
    """
    for readable in split_present(examples):
        for id in misread_ids:
            holds_E = np.concatenate([*_count_id(readable, id)]) > 0
            _check_count(tokenizer, name, f"texts of window {number + 1:,} of the stream", readable, id, holds_E)


def _check_count(
    tokenizer: PreTrainedTokenizerBase, name: str, part: str, examples: Examples, id: int, wrong_E: NDArray[np.bool_]
) -> None:
    """Raise ValueError for the examples that contain the id and should not."""
    wrong = np.flatnonzero(wrong_E)
    if wrong.size:
        token = tokenizer.convert_ids_to_tokens(id) if id < count_embedding_rows(tokenizer) else ""
        first = _describe_first(tokenizer, examples, id, int(wrong[0]))
        raise ValueError(
            f"{len(wrong):,} of the {part} hold the special token {token} (id {id}), by which {name} finds "
            f"the end of a row; the first of them{first}: take it out of the text"
        )


def _check_last_tokens(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, part: str, examples: Examples, id: int
) -> None:
    """Raise ValueError for a row of several tokens that ends with the id, which the model takes for padding."""
    holding = np.flatnonzero(np.concatenate([*_count_id(examples, id)]).astype(bool) & (examples.lengths > 1))
    ending = [int(index) for index in holding if examples[int(index)][-1] == id]
    if not ending:
        return
    first = _describe_first(tokenizer, examples, id, ending[0])
    token = tokenizer.convert_ids_to_tokens(id) if id < count_embedding_rows(tokenizer) else ""
    raise ValueError(
        f"{len(ending):,} of the {part} end with the token {token} (id {id}), which "
        f"{type(network).__name__} takes for padding in a batch: it would read their class at the token before; the "
        f"first of them{first}. Remove the token from the end of the text, or set pad_token in the tokenizer's "
        "tokenizer_config.json to a token that no text ends with"
    )


def _describe_first(tokenizer: PreTrainedTokenizerBase, examples: Examples, id: int, example: int) -> str:
    """Describe the first text that contains the special id, or else the example, by its number and its beginning."""
    number, text = examples.special_tokens.get(id, (0, ""))
    # In a classification, each text is one example.
    if number and (examples.labels is None or number == example + 1):
        return f", number {number:,}, begins {text!r}"
    ids = examples.ids[examples.start[example] : examples.stop[example]]
    number_text = "" if examples.labels is None else f", number {example + 1:,},"
    return f"{number_text} begins {str(tokenizer.decode(ids)).strip()[:40]!r} by its tokens"


def _can_read(network: PreTrainedModel, row: NDArray[np.int64]) -> bool:
    try:
        with evaluation_mode(network):
            network(input_ids=add_choice_axis(network, torch.from_numpy(row)[None].to(network.device)))
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


def _count_id(examples: Examples, id: int) -> Iterator[NDArray[np.int64]]:
    """Yield how often each example contains the id, for some examples at a time."""
    at = 0
    while at < len(examples):
        stop = max(at + 1, int(np.searchsorted(examples.stop, examples.start[at] + _PART_IDS)))
        first = int(examples.start[at])
        hits = np.append(0, np.cumsum(examples.ids[first : int(examples.stop[stop - 1])] == id))
        yield hits[examples.stop[at:stop] - first] - hits[examples.start[at:stop] - first]
        at = stop


def _split(values: object) -> Iterator[NDArray[np.uint8]]:
    for at in range(0, len(values), _PART_IDS):  # type: ignore[arg-type]
        yield values[at : at + _PART_IDS]  # type: ignore[index]
