"""Use a trained model: fill in masks, generate text, classify text."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from minilm.data.encoding_errors import locate_encoding_errors
from minilm.models.forward_checks import check_causal
from minilm.models.input_length import longest_input
from minilm.utils.hub import explain_loading_errors

log = logging.getLogger("minilm")

# The end of a class name of transformers, and the command that uses such a model.
_COMMANDS = {
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "classify",
    "ForTokenClassification": "tag",
    "ForQuestionAnswering": "answer",
    "ForCausalLM": "generate",
    "LMHeadModel": "generate",
}


@dataclass(frozen=True, kw_only=True)
class MaskCandidate:
    """A token that could replace a mask."""

    token: str
    """The token as text on one line, without surrounding spaces."""
    probability: float
    text: str
    """The input with this candidate in place of the mask."""


def load_masked_lm(name: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a masked LM in evaluation mode and its tokenizer. Raise ValueError if `name` does not hold one."""
    return load_pretrained(name, AutoModelForMaskedLM, "masked LM")


def load_classifier(name: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a classifier in evaluation mode and its tokenizer. Raise ValueError if `name` does not hold one."""
    return load_pretrained(name, AutoModelForSequenceClassification, "sequence classifier")


def load_causal_lm(name: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal LM in evaluation mode and its tokenizer. Raise ValueError if `name` does not hold one."""
    model, tokenizer = load_pretrained(name, AutoModelForCausalLM, "causal LM")
    # transformers also loads BERT's weights as a causal LM.
    if advice := _suggest_command(model):
        raise ValueError(f"{str(name)!r} is not a causal LM{advice}")
    check_causal(model)
    return model, tokenizer


def load_pretrained(
    name: str | Path, auto: Any, kind: str, unused: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model of an auto class in evaluation mode and its tokenizer.

    kind: what error messages call such a model. unused: a module that need not have weights.

    Raises ValueError if `name` does not hold such a model.
    """
    with explain_loading_errors(str(name), f"no {kind} can be loaded from {str(name)!r}"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, report = auto.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        missing = sorted(key for key in report["missing_keys"] if key.partition(".")[0] != unused)
        if missing:
            raise ValueError(f"it has no weights for {', '.join(missing)}{_suggest_command(model)}")
    return model.eval(), tokenizer


def _suggest_command(model: PreTrainedModel) -> str:
    """Return the end of an error message, which names the command for the head that the checkpoint has.

    It is empty if the checkpoint has the head of the class that loaded it, or a head without a command.
    """
    saved = " ".join(model.config.architectures or ())
    commands = [command for head, command in _COMMANDS.items() if head in saved and head not in type(model).__name__]
    return f"; for a {saved} use: minilm {commands[0]}" if commands else ""


def check_masks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Raise ValueError for a text without a mask token, or a text that is longer than the model's input."""
    longest = longest_input(model)
    for text in texts:
        with locate_encoding_errors(tokenizer, [text]):
            ids = tokenizer(text, verbose=False)["input_ids"]
        if tokenizer.mask_token_id not in ids:
            raise ValueError(f"there is no {tokenizer.mask_token} in the text {text!r}")
        if longest is not None and len(ids) > longest:
            raise ValueError(
                f"the text {_quote_beginning(text)} is longer than the model's input: it has {len(ids)} tokens, "
                f"and the model reads at most {longest}. Shorten it"
            )


def fill_mask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], *, top_k: int = 5
) -> list[list[list[MaskCandidate]]]:
    """Return the `top_k` most probable tokens for each mask of each text, as `result[text][mask][rank]`.

    Raises ValueError for a text without a mask token, or a text that is longer than the model's input.
    """
    check_masks(model, tokenizer, texts)
    results = []
    for text in texts:
        encoded = tokenizer(text, return_tensors="pt").to(model.device)
        input_ids_L = encoded["input_ids"][0]
        masks_M = (input_ids_L == tokenizer.mask_token_id).nonzero()[:, 0]
        inputs = {key: encoded[key] for key in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            probabilities_MxV = model(**inputs).logits[0, masks_M].float().softmax(-1)
        best = probabilities_MxV.topk(min(top_k, probabilities_MxV.shape[-1]))
        results.append(
            [
                [
                    MaskCandidate(
                        token=escape_line_breaks(str(tokenizer.decode([index])).strip(" ")),
                        probability=probability,
                        text=_fill_in(tokenizer, input_ids_L, int(place), index),
                    )
                    for probability, index in zip(*row, strict=True)
                ]
                for place, *row in zip(masks_M, best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        )
    return results


def escape_line_breaks(text: str) -> str:
    """Return the text with its line breaks written as \\n and \\r."""
    return text.replace("\n", "\\n").replace("\r", "\\r")


def _fill_in(tokenizer: PreTrainedTokenizerBase, input_ids_L: torch.Tensor, place: int, index: int) -> str:
    """Return the text with the token `index` at this place. Of the special tokens, only masks are kept."""
    ids = input_ids_L.tolist()
    ids[place] = index
    keep = [i for i in ids if i == tokenizer.mask_token_id or i not in tokenizer.all_special_ids]
    return str(tokenizer.decode(keep)).strip()


def check_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_new_tokens: int = 1,
    chat: bool = False,
) -> None:
    """Raise ValueError for a text that leaves no room for `max_new_tokens` or has no token to start from.

    chat: the texts are messages of a user, which the tokenizer's chat template must accept.
    """
    longest = longest_input(model)
    for text in texts:
        with locate_encoding_errors(tokenizer, [text]):
            ids = _encode_prompt(tokenizer, text, chat=chat)
        if not ids and _first_id(tokenizer) is None:
            raise ValueError(
                f"the text {text!r} has no tokens, and the tokenizer has no token that begins a document: pass a text "
                "that is not empty"
            )
        if longest is not None and len(ids) + max_new_tokens > longest:
            fewer = f"leave out --max-new-tokens, or pass {longest - len(ids)} or fewer"
            raise ValueError(
                f"the text {_quote_beginning(text)} has {len(ids)} tokens, which with {max_new_tokens} new ones is "
                f"more than the model's {longest} tokens: {fewer if len(ids) < longest else 'shorten it'}"
            )


def _encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool) -> list[int]:
    """Return the ids of a text, or with `chat` those of a chat that begins with this message of the user's."""
    if not chat:
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return ids
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, so that the model reads no chats: leave --chat out to continue a text"
        )
    try:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:
        # A template is a program: it may raise anything.
        reason = " ".join(str(error).split())
        raise ValueError(f"the chat template refuses {_quote_beginning(text)}: {reason}") from error
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _first_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the token that begins a document, or else of the token that ends it, or None."""
    first: int | None = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return first


def _quote_beginning(text: str) -> str:
    """Return the first 40 characters of the text in quotes."""
    return repr(text) if len(text) <= 40 else f"{text[:40]!r}…"


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    stream: bool = False,
    chat: bool = False,
) -> list[str]:
    """Return each text with its continuation, which `model.generate` draws after `torch.manual_seed(seed)`.

    max_new_tokens: the largest number of tokens in a continuation. The default is 100, or less if the model has less
    room.
    temperature: 0 takes the likeliest token. Other values divide the logits before a token is drawn.
    top_k: a token is drawn from this many likeliest tokens (Fan et al. 2018, section 5.4). 0: from all tokens.
    top_p: a token is drawn from the fewest of these, the likeliest first, whose probabilities add up to at least this
    (Holtzman et al. 2020, section 3.1).
    stream: print the tokens as they are drawn.
    chat: each text is the message of a user, written by the tokenizer's chat template; return only the answer.

    An empty text starts with the token that begins documents. A warning counts the tokens of a text that are unknown to
    the tokenizer. Raises ValueError for a text that is too long for the model.
    """
    check_prompts(model, tokenizer, texts, max_new_tokens=max_new_tokens or 1, chat=chat)
    longest = longest_input(model) or math.inf
    drawn = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    choice: dict[str, Any] = drawn if temperature > 0 else {"do_sample": False}
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    draw: Any = model.generate
    results = []
    for text in texts:
        ids_L: list[Any] = _encode_prompt(tokenizer, text, chat=chat) or [_first_id(tokenizer)]
        if unknown := ids_L.count(tokenizer.unk_token_id):
            log.warning(
                f"{unknown} of the {len(ids_L)} tokens of {_quote_beginning(text)} are unknown to the model's tokenizer"
            )
        inputs_1xL = torch.tensor([ids_L], device=model.device)
        torch.manual_seed(seed)
        with torch.inference_mode():
            output_1xL = draw(
                input_ids=inputs_1xL,
                attention_mask=torch.ones_like(inputs_1xL),
                max_new_tokens=max_new_tokens or min(100, longest - len(ids_L)),
                pad_token_id=padding,
                streamer=TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True) if stream else None,
                **choice,
            )
        first = len(ids_L) if chat else 0
        results.append(str(tokenizer.decode(output_1xL[0, first:], skip_special_tokens=True)))
    return results


@dataclass(frozen=True, kw_only=True)
class ScoredLabel:
    """A label and its score."""

    label: str
    score: float
    """The probability of the class, or of this label if a text may have several. For a regression, the number."""


def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    batch_size: int = 32,
) -> list[list[ScoredLabel]]:
    """Return the labels of each text, the likeliest first.

    pairs: the second text of each pair, for a model that classifies pairs.

    The scores are those of transformers' text-classification pipeline. Texts that are longer than the model's input are
    cut, and a warning counts them. A batch holds texts of equal length, because padding changes the logits of some
    models. A text without tokens, such as an empty text for GPT-2, gets an empty list.
    """
    # The tokenizer refuses an empty list.
    if not texts:
        return []
    longest = longest_input(model)
    columns = [list(texts)] if pairs is None else [list(texts), list(pairs)]
    with locate_encoding_errors(tokenizer, [text for column in columns for text in column]):
        encoded = tokenizer(*columns, truncation=longest is not None, max_length=longest, verbose=False)
    if cut := sum(bool(row.overflowing) for row in encoded.encodings):
        log.warning(f"{cut:,} of {len(texts):,} texts are longer than the model's {longest} tokens and are cut")
    rows = [{name: encoded[name][index] for name in encoded} for index in range(len(texts))]
    names: Any = model.config.id2label
    lengths = [len(row["input_ids"]) for row in rows]
    order = sorted((index for index, length in enumerate(lengths) if length), key=lambda index: lengths[index])
    runs = [list(run) for _, run in groupby(order, key=lambda index: lengths[index])]
    results: list[list[ScoredLabel]] = [[] for _ in rows]
    for ids in (run[start : start + batch_size] for run in runs for start in range(0, len(run), batch_size)):
        batch = tokenizer.pad([rows[index] for index in ids], padding=False, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            logits_NxC = model(**batch).logits.float()
        for row, scores in zip(ids, _scores(model, logits_NxC).tolist(), strict=True):
            named = [ScoredLabel(label=names[index], score=score) for index, score in enumerate(scores)]
            results[row] = sorted(named, key=lambda each: -each.score)
    return results


def _scores(model: PreTrainedModel, logits_NxC: torch.Tensor) -> torch.Tensor:
    problem = model.config.problem_type
    if problem == "regression":
        return logits_NxC
    if problem == "multi_label_classification" or logits_NxC.shape[1] == 1:
        return logits_NxC.sigmoid()
    return logits_NxC.softmax(-1)
