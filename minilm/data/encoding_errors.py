"""Texts that a tokenizer cannot encode: a vocabulary without an unknown token may lack a letter of them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase


@contextmanager
def locate_encoding_errors(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], name: str | None = None, first: int = 1
) -> Iterator[None]:
    """Turn the error of a tokenizer that cannot encode one of `texts` into a ValueError that names the text.

    `name` is what the texts are called as a whole, `first` the number of the first of them there.
    """
    try:
        yield
    except Exception as error:
        # The tokenizers library raises nothing more specific than this class.
        if type(error) is not Exception:
            raise
        for number, text in enumerate(texts, first):
            try:
                tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
            except Exception as cause:
                which = f"number {number:,} of the {name}, which begins {text[:40]!r}," if name else repr(text[:40])
                raise ValueError(
                    f"the tokenizer cannot encode {which} because its vocabulary lacks a part of the text "
                    f"({' '.join(str(cause).split())}): take that part out of the text, or give the tokenizer an "
                    "unknown token"
                ) from cause
        raise
