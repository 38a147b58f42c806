"""Load the tokenizer of a run. Train one on the documents if there is none, or extend one by words of the documents."""

import hashlib
import json
from collections.abc import Callable

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from minilm.config import Tokens
from minilm.data.document_texts import Documents, find_text_columns, fingerprint_documents
from minilm.data.tokenizer_extension import extend_tokenizer
from minilm.data.tokenizer_state import serialize_tokenizer
from minilm.data.tokenizer_training import train_tokenizer
from minilm.utils.cache import explain_cache_errors, open_entry
from minilm.utils.hub import explain_loading_errors


def load_tokenizer(
    tokens: Tokens, model_name: str | None, documents: Documents, *, causal: bool = False
) -> PreTrainedTokenizerBase:
    """Return the tokenizer `tokens.name`, else the model's, else one that is trained on the texts of `documents`.

    With `tokens.extend`, a loaded tokenizer gets that many words of the documents. Trained and extended tokenizers are
    cached. Code that comes with a tokenizer is not run. Raises ValueError if the tokenizer cannot be loaded or
    extended, or lacks a token that the objective needs: the end of a text for a `causal` LM, else padding.
    """
    name = tokens.name or model_name
    if name is None:
        if tokens.extend:
            raise ValueError(
                "tokens.extend adds to a tokenizer that exists, but this run trains one. Set tokens.vocab_size instead."
            )
        return _open_cached(
            lambda: train_tokenizer(documents, tokens.kind, tokens.vocab_size, causal=causal),
            documents,
            *(tokens.kind, tokens.vocab_size, causal),
        )
    with explain_loading_errors(name, f"tokenizer {name!r} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer {name!r} exists only in Python, without the fast form that minilm needs. A run can take "
            "another tokenizer with --tokens.name."
        )
    # GPT-2 and Llama have no padding token. To classify with them, the token that ends texts serves as padding.
    if tokenizer.pad_token_id is None and not causal:
        tokenizer.pad_token = tokenizer.eos_token
    role, field = ("end-of-text", "eos_token") if causal else ("padding", "pad_token")
    if getattr(tokenizer, field) is None:
        raise ValueError(
            f"tokenizer {name!r} has no {role} token. Name one as {field} in its tokenizer_config.json. A run can also "
            "take another tokenizer with --tokens.name."
        )
    if not tokens.extend:
        return tokenizer
    return _open_cached(
        lambda: extend_tokenizer(tokenizer, documents, tokens.extend),
        documents,
        *(serialize_tokenizer(tokenizer), tokens.extend),
    )


def store_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a folder of the cache that holds the tokenizer."""
    state = json.dumps(serialize_tokenizer(tokenizer), default=str)
    key = hashlib.blake2b(state.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
    with explain_cache_errors():
        return str(open_entry(f"tokenizer-{key}", lambda folder: tokenizer.save_pretrained(folder)))


def _open_cached(
    build: Callable[[], PreTrainedTokenizerBase], documents: Documents, *settings: object
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that `build` makes of `documents` and `settings`, from the cache if it is there."""
    key = fingerprint_documents(documents, *settings, columns=find_text_columns(documents))
    folder = open_entry(f"tokenizer-{key}", lambda folder: build().save_pretrained(folder))
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
