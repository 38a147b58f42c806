"""Texts for classification are cached by everything that decides their ids."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from minilm.data.text_pairs import encode_pairs


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "truncation_side", "left"),
        lambda tokenizer: setattr(tokenizer, "model_input_names", ["input_ids", "token_type_ids"]),
        lambda tokenizer: setattr(tokenizer, "split_special_tokens", True),
    ],
)
def test_the_cache_distinguishes_the_settings_that_decide_ids_and_types(
    tokenizer: PreTrainedTokenizerBase, cache: Path, change: Callable[[Any], None]
) -> None:
    documents = Dataset.from_dict({"text": ["A [MASK].", "The quick"], "pair": ["Another.", "It jumps over. " * 5]})

    def rows(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        examples = encode_pairs(documents, tokenizer, np.zeros(2), max_length=20, name="documents")
        types = [examples.token_type_ids(i).tolist() for i in range(2)] if examples.type_ids is not None else []
        return [examples[i].tolist() for i in range(2)] + types

    changed = copy.deepcopy(tokenizer)
    change(changed)
    before = rows(tokenizer)
    expected = changed(documents["text"][:], documents["pair"][:], truncation=True, max_length=20)
    assert rows(changed) == expected["input_ids"] + expected.get("token_type_ids", [])
    assert rows(changed) != before
    assert rows(tokenizer) == before


def test_pairs_and_single_texts_of_the_same_content_have_different_cache_entries(
    tokenizer: PreTrainedTokenizerBase, cache: Path
) -> None:
    pair, single = {"text": ["one"], "pair": ["two"]}, {"text": ["one", "two"]}
    for rows in (pair, single):
        documents, labels = Dataset.from_dict(rows), np.zeros(len(rows["text"]))
        assert len(encode_pairs(documents, tokenizer, labels, max_length=20, name="documents")) == len(labels)
