"""The assistant's tokens of chats, beside transformers' own mask for the same templates with tags."""

import copy
import random
from itertools import groupby
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from minilm.data.chat_templates import CHAT_TEMPLATES
from minilm.data.chats import ChatEncoder
from minilm.data.rows import Row
from minilm.data.tokenizer_training import train_tokenizer

# In the style of templates of the hub. @ stands for the beginning and # for the end of what the assistant writes.
TEMPLATES = {
    "chatml": """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}@{{ m.content }}<|im_end|>#{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}\
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "a default system message": """{% if messages[0].role != 'system' %}<|im_start|>system
You are a helpful assistant<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}@{{ m.content }}<|im_end|>#{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}\
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "llama3, which strips": """{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>

{% if m.role == 'assistant' %}@{{ m.content | trim }}<|eot|>#{% else %}{{ m.content | trim }}<|eot|>{% endif %}\
{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>

{% endif %}""",
    "mistral": """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}@ {{ m.content }}{{ eos_token }}#\
{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}""",
    "gemma": """{{ bos_token }}{% for m in messages %}<|start|>{{ 'model' if m.role == 'assistant' else 'user' }}
{% if m.role == 'assistant' %}@{{ m.content | trim }}<|end|>#{% else %}{{ m.content | trim }}<|end|>{% endif %}
{% endfor %}{% if add_generation_prompt %}<|start|>model
{% endif %}""",
    "no generation prompt": """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}@{{ m.content }}<|im_end|>#{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}\
{% endfor %}""",
    "no special tokens": """{% for m in messages %}{% if m.role == 'assistant' %}Assistant:@ {{ m.content }}
#{% else %}User: {{ m.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}""",
}
# What the assistant writes for the content of a message.
WRITTEN = {
    "chatml": "{}<|im_end|>",
    "a default system message": "{}<|im_end|>",
    "llama3, which strips": "{}<|eot|>",
    "mistral": " {}[EOS]",
    "gemma": "{}<|end|>",
    "no generation prompt": "{}<|im_end|>",
    "no special tokens": " {}\n",
}
TOKENS = ("<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>")
PIECES = (
    *("The fox", " ", "  ", "\n", "\n\n", "jumps", ".", "é", "日本", "🦊"),
    *("assistant", "user", "m", "<|", "[INST]", "0", "1"),
)


def with_tags(template: str) -> str:
    return template.replace("@", "{% generation %}").replace("#", "{% endgeneration %}")


def without_tags(template: str) -> str:
    return template.replace("@", "").replace("#", "")


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def chat_tokenizer(request: pytest.FixtureRequest, documents: Dataset) -> PreTrainedTokenizerBase:
    texts = [*documents["text"], "".join(PIECES), "\n \n\n  \n User: Assistant: [INST] [/INST] system helpful"]
    tokenizer = train_tokenizer(Dataset.from_dict({"text": texts}), request.param, 500, causal=True)
    tokenizer.add_tokens([*TOKENS, "[BOS]", "[EOS]"], special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token = "[BOS]", "[EOS]"
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, template: str, *chats: Any, everything: bool = False) -> list[Any]:
    tokenizer.chat_template = template
    rows = [Row({}, f"chats.jsonl, line {number}") for number in range(1, len(chats) + 1)]
    return ChatEncoder(tokenizer).encode(rows, chats, everything=everything)


def draw_chat(draw: random.Random) -> list[dict[str, str]]:
    def content() -> str:
        return "".join(draw.choices(PIECES, k=draw.randint(1, 8)))

    roles = ["user", "assistant"] * draw.randint(1, 3)
    return [{"role": role, "content": content()} for role in roles]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_targets_are_those_of_transformers_for_the_template_with_tags(
    name: str, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    draw = random.Random(0)
    chats = [draw_chat(draw) for _ in range(100)]
    ours = encode(chat_tokenizer, without_tags(TEMPLATES[name]), *chats)
    for chat, (ids, marks) in zip(chats, ours, strict=True):
        expected = chat_tokenizer.apply_chat_template(
            chat,
            chat_template=with_tags(TEMPLATES[name]),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert ids == expected["input_ids"]
        assert [*map(int, marks)] == expected["assistant_masks"], chat
    assert encode(chat_tokenizer, with_tags(TEMPLATES[name]), *chats) == ours


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_targets_are_the_contents_with_their_end(name: str, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [
        {"role": "user", "content": "A short one."},
        {"role": "assistant", "content": "assistant"},
        {"role": "user", "content": "The lazy dog?"},
        {"role": "assistant", "content": "Jumps\n\nover the fox. "},
    ]
    if "m.role != 'system'" in TEMPLATES[name]:
        chat.insert(0, {"role": "system", "content": "Be brief."})
    ((ids, marks),) = encode(chat_tokenizer, without_tags(TEMPLATES[name]), chat)
    runs = [[id for id, _ in run] for mark, run in groupby(zip(ids, marks, strict=True), lambda pair: pair[1]) if mark]
    contents = [message["content"] for message in chat if message["role"] == "assistant"]
    if "trim" in TEMPLATES[name]:
        contents = [content.strip() for content in contents]
    decoded = [chat_tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]
    written = [WRITTEN[name].format(content) for content in contents]
    if chat_tokenizer.backend_tokenizer.model.__class__.__name__ == "Unigram":
        # Its decoder takes a space from the beginning of a text.
        decoded, written = [text.lstrip(" ") for text in decoded], [text.lstrip(" ") for text in written]
    assert decoded == written


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_the_named_templates_mark_the_contents_with_their_end(name: str, documents: Dataset) -> None:
    tokenizer = train_tokenizer(documents, "bpe", 500, causal=True)
    tokenizer.add_tokens([*CHAT_TEMPLATES[name].tokens], special_tokens=True)
    chat = [
        {"role": "user", "content": "A short one."},
        {"role": "assistant", "content": "The fox."},
        {"role": "user", "content": "The dog?"},
        {"role": "assistant", "content": "The dog."},
    ]
    if name != "gemma":
        chat.insert(0, {"role": "system", "content": "Be brief."})
    ((ids, marks),) = encode(tokenizer, CHAT_TEMPLATES[name].text, chat)
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
    end = ends.get(name, tokenizer.eos_token)
    space = " " * (name in ("mistral", "plain"))
    written = tokenizer.decode([id for id, mark in zip(ids, marks, strict=True) if mark])
    assert written == f"{space}The fox.{end}{space}The dog.{end}"
    # What is generated after the prompt is what was learned.
    prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False)
    assert ids[: len(prompt)] == prompt
    answer = [id for id, mark in zip(ids[len(prompt) :], marks[len(prompt) :], strict=True) if mark]
    assert tokenizer.decode(answer) == f"{space}The dog.{end}"


def test_everything_is_the_whole_chat(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    template = without_tags(TEMPLATES["chatml"])
    chat = [{"role": "user", "content": "The fox"}]
    ((ids, marks),) = encode(chat_tokenizer, template, chat, everything=True)
    assert (ids, marks) == (chat_tokenizer.apply_chat_template(chat, return_dict=False), [True] * len(ids))


# A template that leaves thoughts out of all turns but the last, as reasoning models do.
FORGETFUL = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# A prompt that begins the answer with a text that is not in all answers.
THOUGHTFUL = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
GOOD = [{"role": "user", "content": "The fox"}, {"role": "assistant", "content": "jumps"}]
THOUGHT = [GOOD[0], {"role": "assistant", "content": "<think>a</think>jumps"}]


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (FORGETFUL, [*THOUGHT, *GOOD], "up to message 1 in another way when other messages follow it"),
        (THOUGHTFUL, GOOD, "up to message 1 in another way"),
        ("{{ raise_exception('no') }}", GOOD, "the chat template refuses the chat: no; change the row"),
        ("{{ messages[9].content }}", GOOD, "the chat template refuses the chat: "),
        (FORGETFUL, [GOOD[1], GOOD[0]], "the chat begins with the assistant"),
        (FORGETFUL, [], "holds an empty list where a chat is expected"),
        (FORGETFUL, "hello", "holds str where a chat is expected"),
        (FORGETFUL, ["hello"], "message 0 is str, not an object with a role"),
        (FORGETFUL, [{"from": "human", "value": "The fox"}], "message 0 has no role (its keys: from, value)"),
    ],
)
def test_a_chat_without_certain_targets_is_refused_by_its_row(
    template: str, chat: Any, message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=r"^chats.jsonl, line 2: ") as error:
        ChatEncoder(tokenizer).encode([Row({}, "chats.jsonl, line 2")], [chat], everything=False)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
