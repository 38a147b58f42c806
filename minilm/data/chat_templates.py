"""Chat templates for base models, whose tokenizers come without one."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A template in the language Jinja, as `tokenizer.apply_chat_template` of transformers reads it."""

    text: str
    tokens: tuple[str, ...] = ()
    """The special tokens that the template writes, besides those that begin and end a text. If the tokenizer does not
    have them, they are added to it."""


_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"""

_GEMMA = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in ('user', 'assistant') -%}
{{ raise_exception('Gemma has the roles user and assistant, and not ' + message['role']) }}
{%- endif -%}
{%- set role = 'model' if message['role'] == 'assistant' else 'user' -%}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

_MISTRAL = """\
{{- bos_token -}}
{%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' -%}
{%- for message in (messages[1:] if system else messages) -%}
{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
{{ raise_exception('Mistral needs user and assistant in turn, after at most one system message') }}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
{%- else -%}
{{ ' ' + message['content'] + eos_token }}
{%- endif -%}
{%- endfor -%}"""

_PLAIN = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}
{%- else -%}
{{ message['role'] | capitalize + ': ' + message['content'] + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"""

CHAT_TEMPLATES = {
    "chatml": ChatTemplate(text=_CHATML, tokens=("<|im_start|>", "<|im_end|>")),
    "llama3": ChatTemplate(text=_LLAMA3, tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": ChatTemplate(text=_MISTRAL),
    "gemma": ChatTemplate(text=_GEMMA, tokens=("<start_of_turn>", "<end_of_turn>")),
    "plain": ChatTemplate(text=_PLAIN),
}
"""The templates by the name that `SupervisedFineTuning.template` takes. `plain` needs no special token but the end of a
text, so that it also suits a tokenizer to which no token may be added."""
