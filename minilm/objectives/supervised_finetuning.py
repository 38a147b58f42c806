"""Supervised fine-tuning: a causal LM learns what the assistant of a chat says, or how a prompt is completed."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import Data, SupervisedFineTuning
from minilm.data.chat_templates import CHAT_TEMPLATES
from minilm.data.chats import ChatEncoder, EncodedChat, copy_backend, encode_texts
from minilm.data.corpus import PreparedData
from minilm.data.example import NO_TARGET, Example, Remark
from minilm.data.rows import Row
from minilm.data.special_ids import find_prefix_and_suffix
from minilm.models.head import Head
from minilm.models.inference import check_prompts, generate
from minilm.objectives.objective import Objective
from minilm.utils.shell import format_command

_SPLIT_BOUNDARY = (
    "rows have a token with the end of the prompt and the beginning of the completion, which a model that is given the "
    "prompt alone will not meet: let the completion, and not the prompt, hold the space between them"
)


@dataclass(frozen=True)
class SupervisedFineTuningObjective(Objective):
    """Supervised fine-tuning of a causal LM. The targets are the tokens of the assistant, or of the completion."""

    settings: SupervisedFineTuning

    auto = AutoModelForCausalLM
    outputs = "next_tokens"
    title = "causal language model"

    def columns(self, data: Data) -> dict[str, str]:
        kind = self.settings.format
        if data.pair_column is not None and kind != "completion":
            raise ValueError("data.pair_column is the column of completions: pass --objective.format completion")
        if kind == "text":
            return {"text": data.column}
        column = None if data.column == Data.column else data.column
        if kind == "messages":
            return {"messages": column or "messages"}
        return {"text": column or "prompt", "pair": data.pair_column or "completion"}

    def adapt_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        name = self.settings.template
        if name is not None:
            template = CHAT_TEMPLATES[name]
            vocabulary = tokenizer.get_vocab()
            tokenizer.add_tokens([token for token in template.tokens if token not in vocabulary], special_tokens=True)
            tokenizer.chat_template = template.text
        elif self.settings.format == "messages" and not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template, which writes a chat as text: pass --objective.template chatml, or "
                f"another one of {', '.join(CHAT_TEMPLATES)}"
            )

    def examples(
        self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]
    ) -> Iterable[Example | Remark]:
        everything = self.settings.targets == "all"
        if self.settings.format == "messages":
            chats = [row["messages"] for row in rows]
            encoded = ChatEncoder(tokenizer).encode(rows, chats, everything=everything)
        else:
            encoded, shared = _encode_plain(rows, tokenizer, everything=everything)
            if shared:
                yield Remark(_SPLIT_BOUNDARY, shared)
        longest = tokenizer.model_max_length
        if self.settings.too_long == "refuse":
            _refuse_long_rows(rows, [len(ids) for ids, _ in encoded], longest)
        for row, (ids, marks) in zip(rows, encoded, strict=True):
            if not any(marks[1:]):
                raise ValueError(
                    f"{row.where}: there is nothing to predict, since no token is the assistant's: remove the row, or "
                    "pass --objective.targets all"
                )
            if len(ids) > longest and not (self.settings.too_long == "cut" and any(marks[1:longest])):
                yield Remark(f"rows are left out: batch.max_length={longest} has no room for {self._what_does_not_fit}")
                continue
            if len(ids) > longest:
                yield Remark(f"rows are cut to batch.max_length={longest} tokens, and lose their ends")
            targets = [id if mark else NO_TARGET for id, mark in zip(ids, marks, strict=True)]
            yield Example(ids=ids[:longest], targets=targets[:longest])

    @property
    def _what_does_not_fit(self) -> str:
        return "the whole of them" if self.settings.too_long == "drop" else "a token to predict"

    def check(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        super().check(network, tokenizer, texts)
        check_prompts(network, tokenizer, texts, chat=self._is_chat)

    def head(self, network: PreTrainedModel, prepared: PreparedData) -> Head:
        # The result stops after its answer, in pipelines too.
        stops = _find_stops(prepared.tokenizer, chat=self._is_chat)
        own = getattr(network.generation_config, "eos_token_id", None)
        known = own if isinstance(own, list) else [own] * (own is not None)
        if network.generation_config is not None and not {*stops} <= {*known}:
            network.generation_config.eos_token_id = [*stops, *(id for id in known if id not in stops)]
        return super().head(network, prepared)

    @property
    def _is_chat(self) -> bool:
        return self.settings.format == "messages"

    @property
    def card_text(self) -> str:
        what = "the assistant's tokens" if self._is_chat else "the completions' tokens"
        if self.settings.targets == "all" or self.settings.format == "text":
            what = "every token but the first"
        return f"The evaluation predicts {what} of rows that training did not see."

    def sample(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        return generate(network, tokenizer, [text], chat=self._is_chat)[0].removeprefix("" if self._is_chat else text)

    def command(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
        return format_command("generate", folder, *["--chat"] * self._is_chat, "…")


def _encode_plain(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, everything: bool
) -> tuple[list[EncodedChat], int]:
    """Encode prompts with their completions, or texts, between the tokens that begin and end a text.

    Also return in how many rows a token has characters of both the prompt and the completion. Such a token and the one
    that ends the text belong to the completion.
    """
    prompts = [row["text"] if "pair" in row else "" for row in rows]
    texts = [row["text"] + row.get("pair", "") for row in rows]
    before, after = ([*map(int, ids)] for ids in find_prefix_and_suffix(tokenizer))
    end = tokenizer.eos_token_id
    results, shared = [], 0
    for row, prompt, encoding in zip(rows, prompts, encode_texts(copy_backend(tokenizer), rows, texts), strict=True):
        if "pair" in row and not row["pair"].strip():
            raise ValueError(f"{row.where}: the completion holds no text; fill it in, or remove the row")
        ids = [*before, *encoding.ids, *after]
        marks = [False] * len(before) + [last > len(prompt) for _, last in encoding.offsets] + [True] * len(after)
        # A text may hold the token that ends it.
        if ids[-1] != end and not after:
            ids, marks = [*ids, end], [*marks, True]
        marks[-1] = True
        shared += any(first < len(prompt) < last for first, last in encoding.offsets)
        results.append((ids, [True] * len(ids) if everything else marks))
    return results, shared


def _refuse_long_rows(rows: Sequence[Row], lengths: Sequence[int], longest: int) -> None:
    """Raise ValueError that names the first row that is too long, and says how many there are."""
    long = [(row, length) for row, length in zip(rows, lengths, strict=True) if length > longest]
    if long:
        row, length = long[0]
        others = f" ({len(long)} of {len(rows)} rows there are longer, up to {max(lengths)} tokens)"
        raise ValueError(
            f"{row.where}: the row has {length} tokens, more than batch.max_length={longest}"
            f"{others * (len(long) > 1)}: raise it, or pass --objective.too-long cut or drop"
        )


def _find_stops(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> list[int]:
    """Return the special tokens that end an answer: the one after the assistant's turn, if a short chat shows it."""
    if not chat:
        return [tokenizer.eos_token_id]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    encoder = ChatEncoder(tokenizer)
    with contextlib.suppress(ValueError):
        ((ids, marks),) = encoder.encode([Row({}, "a chat")], [messages], everything=False)
        last = max((place for place, mark in enumerate(marks) if mark), default=-1)
        if last >= 0 and ids[last] in encoder.special:
            return [ids[last]]
    return []
