"""What distinguishes a tokenizer from others, for hashes and for the keys of the cache."""

from typing import Any

from transformers import PreTrainedTokenizerBase

# The settings outside the backend that decide ids or token types, or that a tokenizer from the cache must keep.
_SETTINGS = (
    "chat_template",
    "clean_up_tokenization_spaces",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "special_tokens_map",
    "split_special_tokens",
    "truncation_side",
)


def serialize_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Return everything that distinguishes a tokenizer from others, as JSON types. It is the same in each process."""
    return [serialize_backend(tokenizer), *(getattr(tokenizer, name) for name in _SETTINGS)]


def serialize_backend(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the vocabulary and the rules of a tokenizer as JSON, without truncation and padding.

    Each call of a tokenizer sets these two anew, and the backend keeps those of the last call.
    """
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    state: str = backend.to_str()
    if truncation is not None:
        backend.enable_truncation(**truncation)
    if padding is not None:
        backend.enable_padding(**padding)
    return state
