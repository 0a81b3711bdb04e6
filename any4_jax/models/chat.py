"""Turns the messages of a chat into a text, with the Jinja template of a model."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any

import jinja2
from pydantic import ConfigDict, Field

from any4_jax.models.chat_sandbox import Sandbox
from any4_jax.models.special_tokens import SETTINGS
from any4_jax.one_line import one_line
from any4_jax.schema import Schema, check, read_json

TEMPLATE = "chat_template.jinja"
TEMPLATE_JSON = "chat_template.json"
FILES = (TEMPLATE, TEMPLATE_JSON)

_ADVICE = "fetch it again"
_DEFAULT = "default"


class _Template(Schema):
    name: str
    template: str


class _Templates(Schema):
    """The key of tokenizer_config.json and chat_template.json; templates for other uses than a chat have names."""

    chat_template: str | tuple[_Template, ...] | dict[str, str] | None = None


class _Message(Schema):
    model_config = ConfigDict(extra="forbid")

    role: str
    content: str


class _Chat(Schema):
    messages: Annotated[tuple[_Message, ...], Field(min_length=1)]


def template_of(files: Mapping[str, bytes]) -> str | None:
    """The chat template among the files of a tokenizer, or None.

    A chat_template.jinja comes before the settings, as in `transformers`; chat_template.json is the last resort.

    Raises:
        ValueError: a file is no JSON or not UTF-8, or the template is no text.
    """
    if TEMPLATE in files:
        try:
            return files[TEMPLATE].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{TEMPLATE} is not UTF-8 ({error.reason} at byte {error.start}); {_ADVICE}") from None
    for name in (SETTINGS, TEMPLATE_JSON):
        if name in files:
            content = check(_Templates, read_json(files[name], name, _ADVICE), name, _ADVICE).chat_template
            if isinstance(content, tuple):
                content = {entry.name: entry.template for entry in content}
            if isinstance(content, dict):
                content = content.get(_DEFAULT)
            if content is not None:
                return content
    return None


def render(template: str, messages: Sequence[Mapping[str, str]], special: Mapping[str, Any], prompt: bool) -> str:
    """The text that a template makes of messages.

    Args:
        template: Jinja, as `transformers` runs it.
        messages: a list of {"role": str, "content": str}.
        special: further variables, such as "bos_token".
        prompt: whether the text ends with what begins an answer.

    Raises:
        ValueError: the messages have another form, or the template refuses them, is no valid Jinja, fails or takes
            more than a chat can need.
    """
    sandbox = Sandbox()
    sandbox.filters["tojson"] = sandbox.bounded(_tojson)
    sandbox.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    variables = {**special, "messages": _checked(messages), "tools": None, "documents": None}
    try:
        return sandbox.template(template).render(**variables, add_generation_prompt=prompt)
    except _Refused as error:
        raise ValueError(f"the chat template refuses the messages: {one_line(error)}") from None
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"the chat template is no valid Jinja (line {error.lineno}: {one_line(error.message)}); "
            "use another template"
        ) from None
    except Exception as error:  # what a template computes can raise anything
        reason = one_line(error) or type(error).__name__
        raise ValueError(f"the chat template fails ({reason}); use another template, or other messages") from None


def refuse_surrogates(text: str, name: str) -> None:
    """Raises TypeError if `text` is no string, ValueError if it holds what no UTF-8 text can hold."""
    if not isinstance(text, str):
        raise TypeError(f"{name} is a {type(text).__name__}, and a string is needed")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds {text[error.start]!r} at character {error.start}, which is half of a surrogate pair or a "
            "byte that isn't UTF-8, and Unicode characters are needed; convert it to UTF-8"
        ) from None


def _checked(messages: Any) -> list[dict[str, str]]:
    for index, message in enumerate(messages if isinstance(messages, list | tuple) else ()):
        for key, value in message.items() if isinstance(message, Mapping) else ():
            if isinstance(value, str):
                refuse_surrogates(value, f"{key!r} of message {index} of the chat")
    advice = 'give a list of {"role": ..., "content": ...}'
    return [entry.model_dump() for entry in check(_Chat, {"messages": messages}, "the chat", advice).messages]


class _Refused(Exception):
    """A template called raise_exception."""


def _refuse(message: Any) -> None:
    raise _Refused(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes what HTML would read as markup; a model reads plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
