"""Errors for texts that a tokenizer cannot encode.

If a vocabulary has no unknown token, it may lack a letter of a text.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase


@contextmanager
def locate_encoding_errors(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], name: str | None = None, first: int = 1
) -> Iterator[None]:
    """Turn a tokenizer's error into a ValueError that names the first of `texts` that it cannot encode.

    name: what the message calls the documents that hold the texts. Without it, the message quotes the text alone.
    first: the number of the first text among the documents.
    """
    try:
        yield
    except Exception as error:
        # The tokenizers library raises `Exception` itself, not a subclass.
        if type(error) is not Exception:
            raise
        for number, text in enumerate(texts, first):
            try:
                tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
            except Exception as cause:
                which = f"number {number:,} of the {name}, which begins {text[:40]!r}," if name else repr(text[:40])
                raise ValueError(
                    f"the tokenizer cannot encode {which} because its vocabulary lacks a part of the text "
                    f"({' '.join(str(cause).split())}). Take that part out of the text, or give the tokenizer an "
                    "unknown token."
                ) from cause
        raise
