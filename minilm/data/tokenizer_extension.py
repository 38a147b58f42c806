"""Add words of documents to the vocabulary of an existing tokenizer."""

import json
from collections import Counter

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minilm.data.document_texts import Documents, iterate_texts
from minilm.data.special_ids import count_embedding_rows


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, documents: Documents, size: int) -> PreTrainedTokenizerFast:
    """The tokenizer with `size` tokens more: the most frequent words of the documents that it splits into several.

    The new ids follow the old ones, which keep their meaning, and a word is what the tokenizer itself takes for one,
    with the space before it where it is of the token, if only letters and digits are in it. Byte-level BPE finds a new
    token where it is a whole word; WordPiece also at the beginning of one, and Unigram wherever it is the likeliest.
    Raises ValueError when there are fewer such words, or the tokenizer is of another kind.
    """
    backend, known = tokenizer.backend_tokenizer, count_embedding_rows(tokenizer)
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] not in ("BPE", "WordPiece", "Unigram") or backend.pre_tokenizer is None:
        raise ValueError(
            "tokens.extend adds whole words to BPE, WordPiece and Unigram tokenizers that split texts into words; this "
            "one does not: leave it out"
        )
    if model["type"] == "Unigram" and known > len(tokenizer):
        raise ValueError("tokens.extend numbers the pieces of a Unigram tokenizer, whose ids have holes: leave it out")
    words = _split_words(backend, documents)
    if len(words) < size:
        raise ValueError(
            f"tokens.extend={size}, but the documents hold {len(words)} words, twice or more, that the tokenizer "
            "splits: lower it, or give more documents"
        )
    if model["type"] == "Unigram":
        scores = dict(model["vocab"])
        unlikely = min(scores.values())
        beside = sorted((index, token) for token, index in tokenizer.get_added_vocab().items())
        model["vocab"] += [[token, unlikely] for index, token in beside if index >= len(model["vocab"])]
        for word in words[:size]:  # a little likelier than its parts, and the more so the longer it is
            parts = sum(scores.get(piece.value, unlikely) for piece in backend.model.tokenize(word))
            model["vocab"].append([word, parts + 0.1 * len(word)])
    else:
        model["vocab"] |= {word: known + number for number, word in enumerate(words[:size])}
    if model["type"] == "BPE":
        model["ignore_merges"] = True  # a word that is a token is one, whatever merges there are
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


def _split_words(backend: Tokenizer, documents: Documents) -> list[str]:
    """The words of letters and digits that occur more than once and are several tokens, the most frequent first."""
    found: Counter[str] = Counter()
    for text in iterate_texts(documents):
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        for word, (start, stop) in backend.pre_tokenizer.pre_tokenize_str(text):
            if text[start:stop].replace("\u2581", " ").strip().isalnum():
                found[word] += 1
    often = sorted((word for word, count in found.items() if count > 1), key=lambda word: (-found[word], word))
    return [word for word in often if len(backend.model.tokenize(word)) > 1]
