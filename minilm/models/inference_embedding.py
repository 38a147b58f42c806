"""Use a trained model of sentence embeddings."""

import logging
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from minilm.data.encoding_errors import locate_encoding_errors
from minilm.models.inference import load_pretrained
from minilm.models.input_length import longest_input
from minilm.models.sentence_files import EmbeddingFormat, TextPooling, read_embedding_format

log = logging.getLogger("minilm")


def load_embedding_model(
    name: str | Path, pooling: TextPooling | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, EmbeddingFormat]:
    """Return a model in evaluation mode, its tokenizer, and how its embeddings are made.

    pooling: the default is what the files of sentence-transformers in the folder say.

    Raises ValueError if `name` does not hold a model, or if it does not say how embeddings are pooled.
    """
    model, tokenizer = load_pretrained(name, AutoModel, "sentence embedding model", unused="pooler")
    if pooling is not None:
        return model, tokenizer, EmbeddingFormat(pooling=pooling, normalized=True, max_length=None)
    found = read_embedding_format(name)
    if found is None:
        raise ValueError(
            f"{str(name)!r} does not say how embeddings are pooled, since it has no modules.json: pass --pooling"
        )
    return model, tokenizer, found


def find_pooling(name: str | Path) -> TextPooling:
    """Return the pooling of a folder or hub id; the mean if it is not one of sentence-transformers."""
    found = read_embedding_format(name)
    return "mean" if found is None else found.pooling


def embed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    embedding: EmbeddingFormat,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
) -> Tensor:
    """Return the embedding of each text, float32[N, H], on the CPU.

    They are those of `SentenceTransformer(...).encode`. Texts that are longer than the model's input are cut, and a
    warning counts them. A batch holds texts of equal length, because padding changes the outputs of some models. Raises
    ValueError for a text without tokens.
    """
    if not texts:
        return torch.zeros(0, model.config.get_text_config().hidden_size)
    # A tokenizer without a limit names a huge number.
    limits = (embedding.max_length, longest_input(model), tokenizer.model_max_length)
    longest = min(limit for limit in limits if limit is not None)
    with locate_encoding_errors(tokenizer, texts):
        encoded = tokenizer([*texts], truncation=True, max_length=longest, verbose=False)
    if cut := sum(bool(row.overflowing) for row in encoded.encodings):
        log.warning(f"{cut:,} of {len(texts):,} texts are longer than the model's {longest} tokens and are cut")
    rows = [{name: encoded[name][index] for name in encoded} for index in range(len(texts))]
    lengths = [len(row["input_ids"]) for row in rows]
    if not all(lengths):
        raise ValueError(f"the text {texts[lengths.index(0)]!r} has no tokens: give another one")
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    runs = [[*run] for _, run in groupby(order, key=lengths.__getitem__)]
    vectors: list[Tensor] = [torch.zeros(0)] * len(texts)
    for ids in (run[start : start + batch_size] for run in runs for start in range(0, len(run), batch_size)):
        batch = tokenizer.pad([rows[index] for index in ids], padding=False, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            hidden_NxLxH = model(**batch).last_hidden_state.float()
        if embedding.pooling == "mean":
            pooled_NxH = hidden_NxLxH.mean(1)
        else:
            pooled_NxH = hidden_NxLxH[:, 0 if embedding.pooling == "first" else -1]
        for index, vector_H in zip(ids, pooled_NxH.cpu(), strict=True):
            vectors[index] = F.normalize(vector_H, dim=0) if embedding.normalized else vector_H
    return torch.stack(vectors)
