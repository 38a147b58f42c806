"""Use a trained model for token classification: find the tagged spans of a text."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from transformers import (
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TokenClassificationPipeline,
)

from minilm.data.encoding_errors import locate_encoding_errors
from minilm.models.inference import load_pretrained
from minilm.models.input_length import longest_input

Strategy: TypeAlias = Literal["none", "simple", "first", "average", "max"]
"""How the tags of tokens become tags of words, as `aggregation_strategy` of transformers' pipeline."""


@dataclass(frozen=True, kw_only=True)
class TaggedSpan:
    """A part of a text with a tag."""

    label: str
    """The tag, without the prefix B- or I- unless the strategy is `none`."""
    score: float
    """The mean over its words, or its tokens, of the probability of their tags."""
    text: str
    start: int
    """The character of the text at which the span starts, and the one after its last."""
    stop: int


def load_token_classifier(name: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a token classifier in evaluation mode and its tokenizer. Raise ValueError if `name` does not hold one."""
    return load_pretrained(name, AutoModelForTokenClassification, "token classifier")


def tag_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], strategy: Strategy = "first"
) -> list[list[TaggedSpan]]:
    """Return the spans of each text whose tag is not O, in their order. They are those of transformers' pipeline.

    A text that is longer than the model's input is read in rows that share a quarter of their tokens. A text without
    tokens has no span. Raise ValueError for a text that the tokenizer cannot encode, and for one that is too long if
    the strategy is `none`.

    strategy: `first` gives a word the tag of its first token, as training does. `simple` and `none` take the tag of
    each token by itself.
    """
    longest = longest_input(model)
    with locate_encoding_errors(tokenizer, texts):
        lengths = [len(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
    settings: dict[str, Any] = {"aggregation_strategy": strategy}
    if longest is not None:
        if strategy != "none":
            settings["stride"] = longest // 4
        elif max(lengths, default=0) > longest:
            text = texts[lengths.index(max(lengths))]
            raise ValueError(
                f"the text {text[:40]!r} has {max(lengths)} tokens, and the model reads at most {longest}: shorten it, "
                "or take another strategy"
            )
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.model_max_length = longest
    pipeline = TokenClassificationPipeline(model=model, tokenizer=tokenizer, device=model.device, **settings)
    with warnings.catch_warnings():
        # The pipeline warns if it takes words to end at spaces, because the tokenizer does not mark the parts of words.
        warnings.filterwarnings("ignore", "Tokenizer does not support real words")
        found = [pipeline(text) if length else [] for text, length in zip(texts, lengths, strict=True)]
    spans_of_texts = [[_make_span(text, entity) for entity in own] for text, own in zip(texts, found, strict=True)]
    # Some tokenizers have tokens for spaces alone, which can have tags too.
    return [[span for span in spans if span.text] for spans in spans_of_texts]


def _make_span(text: str, entity: Mapping[str, Any]) -> TaggedSpan:
    """Return what the pipeline found. White space around it, which some tokens hold, is left out."""
    own = text[entity["start"] : entity["end"]]
    start = entity["start"] + len(own) - len(own.lstrip())
    own = own.strip()
    label = entity["entity"] if "entity" in entity else entity["entity_group"]
    return TaggedSpan(label=label, score=float(entity["score"]), text=own, start=start, stop=start + len(own))
