"""The embedding of a model's tokens: find it, measure it, add rows to it."""

import sys
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_ROWS_MULTIPLE = 64  # an extended embedding has a multiple of this number of rows, which GPUs compute faster


def find_embedding(model: PreTrainedModel) -> nn.Module | None:
    """Return the module that embeds the token ids, or None if the model has no single one, like CANINE."""
    with suppress(NotImplementedError):
        embedding: nn.Module | None = model.get_input_embeddings()
        return embedding
    return None


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of token ids that the model reads: its embedding's rows, or else its configuration's number."""
    embedding = find_embedding(model)
    if isinstance(embedding, nn.Embedding):
        return embedding.num_embeddings
    # Perceiver's inputs are latents, and I-BERT's embedding is quantized. CANINE hashes code points, without a table.
    return int(getattr(model.config.get_text_config(), "vocab_size", sys.maxunicode + 1))


def extend_embedding(model: PreTrainedModel, trained_rows: int, rows: int) -> None:
    """Give the input and output embeddings at least `rows` rows, and fill all rows from `trained_rows` on.

    The new rows are the mean of the trained ones (Hewitt 2021, "Initializing new word embeddings for pretrained
    language models"). The logit of the mean is the mean of the logits, so a new token is never the likeliest before
    training. Rows that only fill up the multiple belong to no token and are never a target.
    """
    if rows > vocabulary_size(model):
        model.resize_token_embeddings(rows, pad_to_multiple_of=_ROWS_MULTIPLE, mean_resizing=False)
        head: Any = model.get_output_embeddings()
        if not model.config.tie_word_embeddings and getattr(head, "bias", None) is not None:
            # transformers ties this bias to another one and would save only the other.
            head.bias = nn.Parameter(head.bias.detach().clone())
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for weight in layer.parameters() if layer is not None else ():
                weight[trained_rows:] = weight[:trained_rows].mean(0)
