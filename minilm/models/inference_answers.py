"""Use a trained model for question answering: find the answer to a question in a context.

Axes: T tokens of a context in a window, L tokens of a window, W tokens of an answer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForQuestionAnswering, PreTrainedModel, PreTrainedTokenizerBase

from minilm.data.windows import encode_windows
from minilm.models.inference import load_pretrained
from minilm.models.input_length import longest_input

# The windows of transformers' own question-answering pipeline (until its version 4).
_MAX_LENGTH = 384
_STRIDE = 128


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A part of a context that answers a question. An empty text stands for no answer."""

    text: str
    score: float
    """The probability of the start times that of the end, among all tokens of the window that it comes from."""
    start: int
    """The character of the context at which the answer starts, and the one after its last. Both are 0 for no answer."""
    stop: int


def load_question_answerer(name: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model for question answering in evaluation mode, and its tokenizer.

    Raise ValueError if `name` does not hold one.
    """
    return load_pretrained(name, AutoModelForQuestionAnswering, "model for question answering")


def find_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    contexts: Sequence[str],
    *,
    top_k: int = 1,
    no_answer: bool = False,
    max_answer: int = 30,
) -> list[list[Answer]]:
    """Return the `top_k` best answers to the question in each context, the best first.

    A context that is too long is read in windows of at most 384 tokens, which share 128.

    no_answer: whether no answer counts as an answer. Its score is the lowest over the windows.
    max_answer: the maximum length of an answer in tokens.

    Raise ValueError for a context without a token, and for a question that leaves no room for the context.
    """
    length = min(longest_input(model) or _MAX_LENGTH, _MAX_LENGTH)
    where = [f"the context {context[:40]!r}" for context in contexts]
    encoded = encode_windows(
        tokenizer, [question] * len(where), contexts, where, max_length=length, stride=min(_STRIDE, length // 4)
    )
    results = []
    for context, text in zip(encoded, contexts, strict=True):
        # Tokens that stand for parts of one character give the same text.
        best: dict[tuple[int, int], float] = {}
        null_score = float("inf")
        for window in context.windows:
            scores_Lx2 = _compute_log_probabilities(model, window.ids, window.type_ids)
            null_score = min(null_score, float(scores_Lx2[window.null].sum()))
            offsets = context.offsets_Tx2[window.start : window.stop].tolist()
            own_Tx2 = scores_Lx2[window.first : window.first + len(offsets)]
            visible = [bool(text[start:stop].strip()) for start, stop in offsets]
            for score, first, last in find_best_spans(own_Tx2, visible, max_answer, count=top_k):
                span = offsets[first][0], offsets[last][1]
                best[span] = max(score, best.get(span, score))
        answers = [_make_answer(text, *span, score) for span, score in best.items()]
        if no_answer:
            answers.append(Answer(text="", score=math.exp(null_score), start=0, stop=0))
        results.append(sorted(answers, key=lambda each: -each.score)[:top_k])
    return results


def _compute_log_probabilities(model: PreTrainedModel, ids: list[int], type_ids: list[int] | None) -> Tensor:
    """Return log p of the start and of the end at each token of a row, float32[L, 2]."""
    ids_1xL = torch.tensor([ids], device=model.device)
    types = {} if type_ids is None else {"token_type_ids": torch.tensor([type_ids], device=model.device)}
    with torch.inference_mode():
        output = model(input_ids=ids_1xL, attention_mask=torch.ones_like(ids_1xL), **types)
    return torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1).float().cpu().log_softmax(0)


def _make_answer(context: str, start: int, stop: int, score: float) -> Answer:
    """Return the answer between two characters. White space around it, which some tokens hold, is left out."""
    text = context[start:stop]
    start += len(text) - len(text.lstrip())
    text = text.strip()
    return Answer(text=text, score=math.exp(score), start=start, stop=start + len(text))


def find_best_spans(
    scores_Tx2: Tensor, visible: Sequence[bool], max_tokens: int, *, count: int
) -> list[tuple[float, int, int]]:
    """Return the best spans of at most `max_tokens` tokens: the score, the first token and the last.

    The score of a span is that of a start at its first token plus that of an end at its last. Every span is compared,
    not only those of the best starts and ends.

    scores_Tx2: the scores of a start and of an end at each token.
    visible: for each of T tokens, whether a span may begin or end there. One that stands for a space may not.
    count: the maximum number of spans to return, the best first.
    """
    width = min(max_tokens, len(scores_Tx2))
    scores_Tx2 = scores_Tx2.masked_fill(~torch.tensor(visible)[:, None], -torch.inf)
    ends_TxW = F.pad(scores_Tx2[:, 1], (0, width - 1), value=-torch.inf).unfold(0, width, 1)
    scores_TW = (scores_Tx2[:, :1] + ends_TxW).flatten()
    best = scores_TW.topk(min(count, len(scores_TW)))
    spans = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [(score, place // width, place // width + place % width) for score, place in spans if score > -torch.inf]
