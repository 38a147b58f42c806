"""Add words of documents to the vocabulary of an existing tokenizer."""

import json
import logging
from collections import Counter

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minilm.data.document_texts import Documents, iterate_texts
from minilm.data.special_ids import count_embedding_rows

log = logging.getLogger("minilm")


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, documents: Documents, size: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer with `size` more tokens: the most frequent words that it splits into several tokens.

    The new ids follow the old ones, which keep their meaning. A word is what the tokenizer itself takes for one,
    including the space before it where the tokenizer makes it part of the word. Only words of letters and digits are
    added. Byte-level BPE uses a new token for a whole word, WordPiece also at the beginning of a longer word, and
    Unigram wherever it is the likeliest. Raises ValueError if the documents hold too few such words, or if the
    tokenizer has another model.
    """
    backend, first_id = tokenizer.backend_tokenizer, count_embedding_rows(tokenizer)
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] not in ("BPE", "WordPiece", "Unigram") or backend.pre_tokenizer is None:
        raise ValueError(
            "tokens.extend adds whole words to BPE, WordPiece and Unigram tokenizers that split texts into words. This "
            "tokenizer does not. Leave tokens.extend out."
        )
    if model["type"] == "Unigram" and first_id > len(tokenizer):
        raise ValueError(
            "tokens.extend needs a Unigram tokenizer without gaps between its ids, and this one has gaps. Leave "
            "tokens.extend out."
        )
    log.info("finding words that the tokenizer splits …")
    words = _find_split_words(backend, documents)
    if len(words) < size:
        raise ValueError(
            f"tokens.extend={size}, but the documents hold {len(words)} words that occur more than once and that the "
            "tokenizer splits. Lower tokens.extend, or give more documents."
        )
    if model["type"] == "Unigram":
        scores = dict(model["vocab"])
        lowest = min(scores.values())
        # The id of a piece is its place in the list. So the added tokens after the pieces become pieces too.
        added = sorted((index, token) for token, index in tokenizer.get_added_vocab().items())
        model["vocab"] += [[token, lowest] for index, token in added if index >= len(model["vocab"])]
        for word in words[:size]:
            # A new piece must be likelier than its parts together, and the more so the longer it is.
            parts = sum(scores.get(piece.value, lowest) for piece in backend.model.tokenize(word))
            model["vocab"].append([word, parts + 0.1 * len(word)])
    else:
        model["vocab"] |= {word: first_id + number for number, word in enumerate(words[:size])}
    if model["type"] == "BPE":
        # A word that is in the vocabulary becomes one token, although no merges lead to it.
        model["ignore_merges"] = True
    roles = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        chat_template=tokenizer.chat_template,
        **roles,
    )


def _find_split_words(backend: Tokenizer, documents: Documents) -> list[str]:
    """Return the words that occur more than once and are several tokens, the most frequent first.

    Only words of letters and digits count.
    """
    counts: Counter[str] = Counter()
    for text in iterate_texts(documents):
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        for word, (start, stop) in backend.pre_tokenizer.pre_tokenize_str(text):
            if text[start:stop].replace("\u2581", " ").strip().isalnum():
                counts[word] += 1
    repeated = sorted((word for word, count in counts.items() if count > 1), key=lambda word: (-counts[word], word))
    return [word for word in repeated if len(backend.model.tokenize(word)) > 1]
