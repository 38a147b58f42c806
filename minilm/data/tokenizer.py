"""Load a run's tokenizer, or train or extend one on its documents, with a cache between runs."""

from collections.abc import Callable
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from minilm.config import Tokens
from minilm.data.document_texts import Documents, find_text_columns, fingerprint_documents
from minilm.data.tokenizer_extension import extend_tokenizer
from minilm.data.tokenizer_training import train_tokenizer
from minilm.utils.cache import open_entry
from minilm.utils.hub import explain_loading_errors

# What a tokenizer is saved with beside its backend, where it decides ids or token types or comes back from the cache.
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


def load_tokenizer(
    tokens: Tokens, model_name: str | None, documents: Documents, *, causal: bool = False
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `tokens.name`, else of the model, else one trained on the texts of `documents`.

    With `tokens.extend`, words of the documents are added to one that was not trained. Raises ValueError when it cannot
    be loaded or extended, or lacks a token that masked or `causal` LM needs. Code that comes with it is not run.
    """
    name = tokens.name or model_name
    if name is None:
        if tokens.extend:
            raise ValueError(
                "tokens.extend adds to a tokenizer that exists; here one is trained: set tokens.vocab_size"
            )
        key = fingerprint_documents(
            documents, tokens.kind, tokens.vocab_size, causal, columns=find_text_columns(documents)
        )
        return _cached(key, lambda: train_tokenizer(documents, tokens.kind, tokens.vocab_size, causal=causal))
    with explain_loading_errors(name, f"tokenizer {name!r} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer {name!r} has no fast form, only one in Python: a run can take another with --tokens.name"
        )
    if tokenizer.pad_token_id is None and not causal:  # GPT-2 and Llama classify so
        tokenizer.pad_token = tokenizer.eos_token
    role, field = ("end-of-text", "eos_token") if causal else ("padding", "pad_token")
    if getattr(tokenizer, field) is None:
        raise ValueError(
            f"tokenizer {name!r} has no {role} token: name one as {field} in its tokenizer_config.json; a run can take "
            "another tokenizer with --tokens.name"
        )
    if not tokens.extend:
        return tokenizer
    key = fingerprint_documents(
        documents, serialize_tokenizer(tokenizer), tokens.extend, columns=find_text_columns(documents)
    )
    return _cached(key, lambda: extend_tokenizer(tokenizer, documents, tokens.extend))


def serialize_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What tells a tokenizer from others, as JSON types."""
    return [tokenizer.backend_tokenizer.to_str(), *(getattr(tokenizer, name) for name in _SETTINGS)]


def _cached(key: str, build: Callable[[], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """What `build` gives, from the cache where it was built before."""
    folder = open_entry(f"tokenizer-{key}", lambda folder: build().save_pretrained(folder))
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
