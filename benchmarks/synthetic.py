"""Synthetic documents with words by Zipf's law and log-normal lengths, and a tokenizer for them."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from minilm.config import Data, Tokens

_MASKED = {
    role: f"[{role[:-6].upper()}]" for role in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
}
_CAUSAL = dict.fromkeys(("pad_token", "unk_token", "bos_token", "eos_token"), "[END]")
_CHUNK = 100_000  # documents made at a time


def write_corpus(
    folder: Path, documents: int, *, vocabulary: int, median: float, sigma: float, causal: bool = False
) -> tuple[Data, Tokens]:
    """Write a text file with this many documents, one per line, and a tokenizer whose tokens are their words.

    vocabulary: the number of tokens, special ones included.
    median, sigma: the length of a document in words is exp(normal(log(median), sigma)), at least 1.

    The share of the word of rank r is proportional to 1 / (r + 2.7) (Mandelbrot 1953). The same arguments give the same
    documents.
    """
    folder.mkdir(parents=True, exist_ok=True)
    special = _CAUSAL if causal else _MASKED
    names = list(dict.fromkeys(special.values()))
    words = np.array([f"w{rank}" for rank in range(vocabulary - len(names))], object)
    ids = {token: index for index, token in enumerate([*names, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if not causal:
        around = [(name, ids[name]) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "tokenizer")

    rng = np.random.default_rng(0)
    shares = np.cumsum(1 / (np.arange(len(words)) + 2.7))
    with (folder / "documents.txt").open("w", encoding="utf-8") as file:
        for first in range(0, documents, _CHUNK):
            count = min(_CHUNK, documents - first)
            lengths = np.maximum(1, rng.lognormal(np.log(median), sigma, count).astype(np.int64))
            stops = np.cumsum(lengths)
            drawn = words[np.searchsorted(shares, rng.random(int(stops[-1])) * shares[-1])]
            for start, stop in zip(stops - lengths, stops, strict=True):
                file.write(" ".join(drawn[start:stop]) + "\n")
    tokens = Tokens(name=str(folder / "tokenizer"), overflow="truncate")
    return Data(source=str(folder / "documents.txt")), tokens
