"""Token types: which of two texts each token belongs to, for the models that distinguish this."""

import logging
from typing import Any

from transformers import PreTrainedTokenizerBase

from minilm.config import Model
from minilm.data.special_ids import encode_placeholder
from minilm.models.model_config import count_token_types

log = logging.getLogger("minilm")


def fit_token_types(tokenizer: PreTrainedTokenizerBase, model: Model, auto: Any, *, pair: bool) -> int | None:
    """Make the tokenizer return no token types if the model has only one or none.

    Return how many the model has (`minilm.models.model_config.count_token_types`). Log a warning if the tokenizer gives
    a type other than 0 to a text, or to a `pair` of texts, and the model cannot take it.
    """
    count = count_token_types(model, auto)
    if count not in (0, 1) or "token_type_ids" not in tokenizer.model_input_names:
        return count
    if any(encode_placeholder(tokenizer, pair=pair).type_ids):
        log.warning(
            f"the tokenizer gives token types, but the model takes {'only one' if count else 'none'}: they are left out"
        )
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = names
    # save_pretrained writes this one.
    tokenizer.init_kwargs["model_input_names"] = names
    return count
