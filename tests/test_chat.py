"""Chat templates: the texts and ids that transformers renders, where templates are found, and what bounds them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from test_special_tokens import entry, folder_of, vocabulary

from any4_jax.models.special_tokens import SETTINGS
from any4_jax.models.tokenizer import VOCABULARY, Tokenizer

transformers = pytest.importorskip("transformers")

TALK = [
    {"role": "system", "content": "be <b> & short "},
    {"role": "user", "content": " a\nb "},
    {"role": "assistant", "content": "ab"},
    {"role": "user", "content": "caf\u00e9 \U0001f408"},
]
CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" ~ date_string ~ "\\n" ~ system_message ~ "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if tools is not none %}{{- tools | tojson(indent=4) }}{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = """{{ bos_token }}{% set ns = namespace(first='') %}
{%- if messages[0].role == 'system' -%}
    {%- set ns.first = messages[0].content + '\\n\\n' -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}{%- set role = "model" -%}
    {%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (ns.first if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}{%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
MISTRAL = """{%- macro turn(text) %}[INST] {{ text }}[/INST]{% endmacro -%}
{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}
{% if message.role == 'user' %}{{ turn(message.content) }}{% elif message.role == 'assistant' %}
{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}{% else %}
{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""
JSON = """{{ messages | tojson }}{{ messages[0] | tojson(indent=2, sort_keys=true) }}{{ unknown_name }}
{%- for m in messages | selectattr('role', 'equalto', 'user') | list %}{{ m.content.split('\\n')[-1] }}{% break %}
{% endfor %}{{ additional_special_tokens | join(',') }}|{{ pad_token }}|{{ strftime_now('%') | length > 0 }}"""
TEMPLATES = {"chatml": CHATML, "llama-3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "json": JSON}
BASE = {
    "tokenizer_class": "LlamaTokenizer",
    "pad_token": entry("<pad>"),
    "additional_special_tokens": ["<|im_end|>", "<|im_start|>"],
}


def tokenizer(template: str | None = None) -> Tokenizer:
    files = {VOCABULARY: vocabulary(("<s>", "</s>")), SETTINGS: {**BASE, "chat_template": template}}
    return Tokenizer.from_files({name: json.dumps(content).encode() for name, content in files.items()})


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_chats_are_those_of_transformers(tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    folder = folder_of(tmp_path, {SETTINGS: {**BASE, "chat_template": template}})
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder)
    assert ours is not None
    for messages in (TALK, TALK[1:], TALK[1:3], TALK[1:2]):
        for prompt in (True, False):
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ours.apply_chat(messages, add_generation_prompt=prompt) == text
            assert ours.encode_chat(messages, add_generation_prompt=prompt) == theirs.apply_chat_template(
                messages, add_generation_prompt=prompt
            )


@pytest.mark.parametrize(
    "files, expected",
    [
        ({SETTINGS: {}}, None),
        ({SETTINGS: {"chat_template": "config"}}, "config"),
        ({SETTINGS: {"chat_template": [{"name": "tool_use", "template": "t"}]}}, None),
        (
            {SETTINGS: {"chat_template": [{"name": "x", "template": "t"}, {"name": "default", "template": "list"}]}},
            "list",
        ),
        ({SETTINGS: {"chat_template": "config"}, "chat_template.jinja": "file"}, "file"),
        ({SETTINGS: {"chat_template": "config"}, "chat_template.json": {"chat_template": "json"}}, "config"),
        ({"chat_template.json": {"chat_template": "json"}}, "json"),
        ({"chat_template.jinja": "file", "chat_template.json": {"chat_template": "json"}}, "file"),
    ],
)
def test_where_the_template_is_found(tmp_path: Path, files: dict[str, Any], expected: str | None) -> None:
    found = Tokenizer.from_folder(folder_of(tmp_path, files))
    assert found is not None and found.chat_template == expected
    assert Tokenizer.from_files(found.files).chat_template == expected
    if expected is None:
        with pytest.raises(ValueError, match="no chat template"):
            found.apply_chat(TALK)


CODE = "{% for i in range(100000) %}{% for j in range(100000) %}"
FAULTS = {
    "raise_exception": ("{{ raise_exception('no system role') }}", "refuses the messages: no system role"),
    "syntax": ("a\n{% for %}", r"no valid Jinja \(line 2: "),
    "unknown tag": ("{% frobnicate %}", "no valid Jinja"),
    "undefined": ("{{ nobody.content }}", "'nobody' is undefined"),
    "wrong type": ("{{ 'a' + 1 }}", "fails"),
    "division": ("{{ 1 / 0 }}", "division by zero"),
    "private": ("{{ messages.__class__.__mro__ }}", "unsafe"),
    "include": ("{% include 'x' %}", "fails"),
    "mutation": ("{{ messages.append(1) }}", "fails"),
    "range": ("{{ range(10**9) | list | length }}", "fails"),
    "loops": (CODE + "{% endfor %}{% endfor %}", "more than 50,000 steps"),
    "macros": ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}", "steps"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails"),
    "repetition": ("{{ 'a' * 10**9 }}", "characters"),
    "list": ("{{ ([0] * 10**9) | length }}", "characters"),
    "doubling": ("{% set s = 'aaaa' %}" + "{% set s = s + s %}" * 60 + "{{ s }}", "characters"),
    "doubling by ~": ("{% set s = 'aaaa' %}" + "{% set s = s ~ s %}" * 60 + "{{ s }}", "characters"),
    "doubling by blocks": ("{% set s = 'a' %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 60, "characters"),
    "writing": ("{% for i in range(99999) %}" + "a" * 9999 + "{% endfor %}", "characters"),
    "width": ("{{ 'a' | center(10**9) }}", "number beyond"),
    "method's width": ("{{ 'a'.ljust(10**9) }}", "number beyond"),
    "format": ("{{ '{:>1000000000}'.format('a') }}", "width beyond"),
    "percent": ("{{ '%1000000000d' % 1 }}", "width beyond"),
    "star": ("{{ '%*d' % (10**9, 1) }}", "number beyond"),
    "power": ("{{ 10 ** (10 ** 9) }}", "64"),
    "squares": ("{% set n = 9 %}" + "{% set n = n * n %}" * 60 + "{{ n }}", "64 bits"),
    "nesting": ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", "fails"),
}


@pytest.mark.parametrize("template, words", FAULTS.values(), ids=FAULTS)
def test_a_template_that_fails_says_so_in_a_sentence(template: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        tokenizer(template).apply_chat(TALK)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "messages, words",
    [
        ("hello", "messages is 'hello', and"),
        ([], "at least 1 item"),
        (["hello"], "messages.0 is 'hello'"),
        ([{"role": "user"}], "messages.0 lacks content"),
        ([{"role": "user", "content": None}], "messages.0.content is None"),
        ([{"role": 1, "content": "a"}], "messages.0.role is 1"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content is"),
        ([{"role": "user", "content": "a", "name": "b"}], "messages.0.name is unknown"),
        ([{"role": "user", "content": "\udce9"}], "'content' of message 0 of the chat holds '.udce9' at character 0"),
        ([{"role": "user", "content": object()}], "plain JSON"),
    ],
)
def test_messages_are_checked(messages: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tokenizer(CHATML).apply_chat(messages)


def test_texts_of_people_pass_the_bounds() -> None:
    long = [{"role": "user", "content": "12345678 {0} %d " * 2_000}] * 100
    text = tokenizer(LLAMA3).apply_chat(long)
    assert text.count("12345678") == 100 * 2_000
    assert tokenizer("{{ messages[0].content | trim }}").apply_chat([{"role": "user", "content": "9" * 99}]) == "9" * 99


def test_no_second_bos() -> None:
    chat = tokenizer("{{ bos_token }}{{ messages[0].content }}")
    assert chat.encode_chat([{"role": "user", "content": "ab"}]).count(chat.bos_id) == 1
    assert tokenizer("{{ messages[0].content }}").encode_chat([{"role": "user", "content": "ab"}])[0] != chat.bos_id
