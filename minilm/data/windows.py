"""Windows: the rows of tokens in which a model reads a question with a context that may be longer than its input.

Axes: T tokens of a context.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from minilm.data.encoding_errors import locate_encoding_errors
from minilm.data.special_ids import PairRow, find_pair_template


@dataclass(frozen=True, kw_only=True)
class Window:
    """One row: the question, and the tokens `start` to `stop` of the context."""

    ids: list[int]
    """The token ids, special tokens included."""
    type_ids: list[int] | None
    """The token types, or None if the tokenizer's models take none."""
    start: int
    stop: int
    first: int
    """The place in the row of the context's first token in it."""
    null: int
    """The place in the row that stands for no answer: that of the token which begins a text, such as [CLS]."""

    def place(self, token: int) -> int:
        """Return the place in the row of a token of the context."""
        return self.first + token - self.start


@dataclass(frozen=True, kw_only=True)
class WindowedContext:
    """A question with a context, as windows that together hold each token of the context."""

    offsets_Tx2: NDArray[np.int64]
    """The characters of the context that each of its tokens stands for: int64, from and to."""
    windows: list[Window]

    def find_tokens(self, start: int, stop: int) -> tuple[int, int] | None:
        """Return the first and the last token that stand for a character from `start` to `stop`; None without any."""
        (tokens,) = ((self.offsets_Tx2[:, 0] < stop) & (self.offsets_Tx2[:, 1] > start)).nonzero()
        return (int(tokens[0]), int(tokens[-1])) if len(tokens) else None


def encode_windows(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    contexts: Sequence[str],
    where: Sequence[str],
    *,
    max_length: int,
    stride: int,
) -> list[WindowedContext]:
    """Return each question with its context, as windows of at most `max_length` tokens.

    where: the beginning of an error message about each question.
    stride: the number of tokens of the context that a window shares with the window before it.

    The question comes first if the tokenizer pads at the right, as in transformers' own example. White space around the
    question is left out. Raise ValueError for a context without a token, and for a question that leaves too little room
    for the context.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    with locate_encoding_errors(tokenizer, [*questions, *contexts]):
        asked = backend.encode_batch([question.strip() for question in questions], add_special_tokens=False)
        read = backend.encode_batch([*contexts], add_special_tokens=False)
    template = find_pair_template(tokenizer)
    question_first = tokenizer.padding_side == "right"
    takes_types = "token_type_ids" in tokenizer.model_input_names
    results = []
    for question, context, place in zip(asked, read, where, strict=True):
        room = max_length - len(question.ids) - template.special_count
        count = len(context.ids)
        if not count:
            raise ValueError(f"{place}: the context has no token: write another, or remove the row")
        if room < count and room <= stride:
            raise ValueError(
                f"{place}: the question has {len(question.ids)} tokens, which leaves {max(room, 0)} of {max_length} "
                f"for the context, but windows that share {stride} tokens need more: shorten the question, lower "
                "objective.stride, or raise batch.max_length"
            )
        windows = []
        for start in range(0, max(1, count - stride), room - stride if room < count else count):
            part = context.ids[start : start + room]
            row = template.fill(question.ids, part) if question_first else template.fill(part, question.ids)
            windows.append(
                Window(
                    ids=row.ids,
                    type_ids=row.type_ids if takes_types else None,
                    start=start,
                    stop=start + len(part),
                    first=row.second if question_first else row.first,
                    null=_find_null(tokenizer, row),
                )
            )
        results.append(WindowedContext(offsets_Tx2=np.array(context.offsets, np.int64), windows=windows))
    return results


def _find_null(tokenizer: PreTrainedTokenizerBase, row: PairRow) -> int:
    """Return the place of the special token that begins a text, or of the row's first token if there is none.

    XLNet has it at the end of the row.
    """
    for id in (tokenizer.cls_token_id, tokenizer.bos_token_id):
        for place in row.special_places:
            if row.ids[place] == id:
                return place
    return 0
