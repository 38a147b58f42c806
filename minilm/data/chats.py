"""Chats as token ids, and which of the tokens the assistant writes."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from minilm.data.rows import Row

Message = Mapping[str, Any]
EncodedChat = tuple[list[int], list[bool]]
"""The token ids of a chat, and whether each of them is written by the assistant."""

# The tags of transformers around what the assistant writes.
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatEncoder:
    """Encodes chats by the chat template of a tokenizer, as `apply_chat_template` does.

    The assistant writes a message and the token that ends it. If the template has the tags `{% generation %}` of
    transformers, they say what that is. Otherwise the beginnings of the chat are rendered: the text of a turn begins
    where the messages before it and the generation prompt end, and ends where the messages up to it end. A token with
    a character of that text is the assistant's. White space after the last special token of a turn, such as the line
    break after `<|im_end|>`, is the template's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.has_tags = bool(_GENERATION_TAG.search(tokenizer.get_chat_template()))
        self.backend = copy_backend(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self.special = {*tokenizer.all_special_ids, *(id for id, token in added if token.special)}

    def encode(self, rows: Sequence[Row], chats: Sequence[Any], *, everything: bool) -> list[EncodedChat]:
        """Encode the chats of these rows.

        everything: all tokens count as the assistant's.

        Raise ValueError that names the row for a chat that is not a list of messages or that the template refuses, and
        for a chat in which it cannot be said what the assistant writes.
        """
        for row, messages in zip(rows, chats, strict=True):
            check_messages(messages, row.where)
        if self.has_tags and not everything:
            return [self._encode_by_tags(row, messages) for row, messages in zip(rows, chats, strict=True)]
        texts, turns = [], []
        for row, messages in zip(rows, chats, strict=True):
            text = self._render(row, messages)
            texts.append(text)
            turns.append([(0, len(text))] if everything else self._find_turns(row, messages, text))
        encodings = encode_texts(self.backend, rows, texts)
        return [
            (encoding.ids, [True] * len(encoding.ids) if everything else self._mark(encoding, text, spans))
            for encoding, text, spans in zip(encodings, texts, turns, strict=True)
        ]

    def _encode_by_tags(self, row: Row, messages: Sequence[Message]) -> EncodedChat:
        encoded = self._apply(row, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return encoded["input_ids"], [*map(bool, encoded["assistant_masks"])]

    def _find_turns(self, row: Row, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Return where each turn of the assistant begins and ends among the characters of the chat's text."""
        turns = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                raise ValueError(
                    f"{row.where}: the chat begins with the assistant, and its chat template does not say what the "
                    "assistant writes there: begin with another message, or pass --objective.targets all"
                )
            before = messages[:number]
            prompt = self._render(row, before, add_generation_prompt=True)
            end = self._render(row, messages[: number + 1])
            if prompt == self._render(row, before):
                prompt = self._add_header(row, before, message, prompt)
            if not (text.startswith(end) and end.startswith(prompt)):
                raise ValueError(
                    f"{row.where}: the chat template writes the chat up to message {number} in another way when other "
                    "messages follow it, so that it does not say which tokens are the assistant's: pass another "
                    "--objective.template, add the tags {% generation %} to this one, or pass --objective.targets all"
                )
            turns.append((len(prompt), len(end)))
        return turns

    def _add_header(self, row: Row, before: Sequence[Message], message: Message, prompt: str) -> str:
        """Return the text before the assistant's, for a template without a generation prompt.

        What the template writes for two different contents is equal up to the content. White space before it, as in
        Mistral's templates, is the assistant's, since it is not in the prompt.
        """
        texts = [self._render(row, [*before, {**message, "content": content}]) for content in ("0", "1")]
        end = next((at for at, (one, other) in enumerate(zip(*texts, strict=False)) if one != other), 0)
        common = texts[0][:end]
        return common if common[len(prompt) :].strip() else prompt

    def _mark(self, encoding: Encoding, text: str, turns: Sequence[tuple[int, int]]) -> list[bool]:
        """Return which tokens the assistant writes."""
        marks = [False] * len(encoding.ids)
        for start, end in turns:
            places = [
                place
                for place, (first, last) in enumerate(encoding.offsets)
                if (first < end and last > start) or (first == last and start <= first < end)
            ]
            special = [place for place in places if encoding.ids[place] in self.special]
            if special and not text[encoding.offsets[special[-1]][1] : end].strip():
                places = places[: places.index(special[-1]) + 1]
            for place in places:
                marks[place] = True
        return marks

    def _render(self, row: Row, messages: Sequence[Message], **options: Any) -> str:
        return str(self._apply(row, messages, tokenize=False, **options))

    def _apply(self, row: Row, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template([*map(dict, messages)], **options)
        except Exception as error:
            # A template is a program: it may raise anything.
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{row.where}: the chat template refuses the chat: {reason or type(error).__name__}; change the row, "
                "or pass another --objective.template"
            ) from error


def check_messages(messages: Any, where: str) -> None:
    """Raise ValueError that begins with `where` unless `messages` is a list of messages, each with a role."""
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if messages == [] else type(messages).__name__
        raise ValueError(
            f'{where}: the column of messages holds {what} where a chat is expected, such as [{{"role": "user", '
            '"content": "…"}, {"role": "assistant", "content": "…"}]'
        )
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"{where}: message {number} is {type(message).__name__}, not an object with a role")
        if not isinstance(message.get("role"), str):
            keys = ", ".join(message) or "none"
            raise ValueError(f"{where}: message {number} has no role (its keys: {keys}): give it role and content")


def copy_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of the backend that adds no special tokens and cuts nothing, and whose offsets are exact."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # RoBERTa's post-processor moves the ends of tokens that hold spaces.
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def encode_texts(backend: Tokenizer, rows: Sequence[Row], texts: Sequence[str]) -> list[Encoding]:
    """Encode the text of each row. Raise ValueError that names the row of a text that cannot be encoded."""
    try:
        return list(backend.encode_batch([*texts], add_special_tokens=False))
    except Exception:
        # The tokenizers library raises Exception itself, and does not say which text it is.
        for row, text in zip(rows, texts, strict=True):
            try:
                backend.encode(text, add_special_tokens=False)
            except Exception as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"{row.where}: the tokenizer cannot encode the text: {reason}") from error
        raise
