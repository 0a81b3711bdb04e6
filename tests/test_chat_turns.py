"""`any4 chat`: its turns, its commands, and a context that is full."""

import dataclasses
import io
import sys

import pytest

from any4_jax.cli import main
from any4_jax.generate import Chat
from any4_jax.models.tiny import random_llama, tiny


@pytest.fixture
def chat(monkeypatch, capsys):
    """Runs `any4 chat` with these lines on stdin: its exit status, its answers, what it says on stderr; and the
    conversation as it is in the end."""
    kept = []

    class Kept(Chat):
        def __init__(self, *args, **settings) -> None:
            super().__init__(*args, **settings)
            kept.append(self)

    def run(lines: str, *flags: str):
        config = dataclasses.replace(random_llama().config, num_hidden_layers=1, vocab_size=512)
        model = random_llama(config)
        model.tokenizer = tiny().tokenizer
        model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
        monkeypatch.setattr("any4_jax.cli.chat.open_model", lambda name, inputs: model)
        monkeypatch.setattr("any4_jax.cli.chat.Chat", Kept)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8"))
        code = main(["chat", "small", "--max-new-tokens", "5", *flags])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines(), kept[-1]

    return run


def test_chat_keeps_what_was_said(chat) -> None:
    code, answers, _, kept = chat("Once upon\n\n a time \n", "--system", "Be kind.")
    contents = [message["content"] for message in kept.messages]
    assert code == 0 and [contents[i] for i in (0, 1, 3)] == ["Be kind.", "Once upon", "a time"]
    assert "".join(answers) == (contents[2] + contents[4]).replace("\n", "")
    _, again, _, kept = chat("Once upon\na time\n/reset\nOnce upon\n/quit\nnever\n", "--system", "Be kind.")
    assert again[: len(answers)] == answers and "".join(again).endswith(contents[2].replace("\n", ""))
    assert [m["content"] for m in kept.messages] == contents[:3]


def test_chat_says_that_the_context_is_full(chat) -> None:
    code, answers, said, _ = chat("a\na b c d e f g\n/reset\na\n", "--context", "9", "--cache", "kivi")
    assert code == 1 and len(answers) == 2 and answers[0] == answers[1]
    (line,) = (line for line in said if "holds no answer" in line)
    assert "and the context of 9 holds no answer to it; /reset forgets what was said" in line
    _, _, said, _ = chat("a\n", "--context", "6", "--cache", "kivi")
    assert any("the answer ends where the context of 6 tokens is full" in line for line in said)
