"""Perplexity through a cache has the errors of decoding token by token; and the flags that choose a cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax.cli import main
from any4_jax.evaluation import Perplexity, divergence, perplexity
from any4_jax.kv_cache import DenseCache, Kivi
from any4_jax.models.tiny import random_llama

SEQLEN = 20
COARSE = Kivi(2, group_size=8, residual=8)


def test_each_token_has_the_error_of_decoding(rng: np.random.Generator) -> None:
    model, ids = random_llama(), rng.integers(0, 128, 2 * SEQLEN)
    measured = divergence(model, model, ids, seqlen=SEQLEN, cache=COARSE)
    rows = jnp.asarray(ids.reshape(2, SEQLEN))

    @jax.jit
    def step(model: Any, tokens: jax.Array, caches: Any, first: Any) -> tuple[jax.Array, Any]:
        x, caches = model.decode(tokens, caches, jnp.full((2, 1), first, jnp.int32))
        return model.head(x)[:, 0], caches

    # A prompt of one token is exact to itself in any case.
    caches, losses = model.init_cache(2, SEQLEN, cache=COARSE), []
    for t in range(SEQLEN - 1):
        logits, caches = step(model, rows[:, t : t + 1], caches, np.int32(t))
        losses.append(-np.asarray(jax.nn.log_softmax(logits))[[0, 1], rows[:, t + 1]])
    np.testing.assert_allclose(measured.model.window_nll, np.mean(losses, axis=0), rtol=1e-5)
    assert np.abs(measured.model.window_nll - measured.reference.window_nll).min() > 1e-4
    assert measured.kl > 1e-4


def test_a_function_has_no_cache() -> None:
    with pytest.raises(TypeError, match="got a cache for a function, and a Decoder is needed"):
        perplexity(lambda tokens: jnp.zeros((*tokens.shape, 5)), [1, 2, 3], seqlen=2, cache=DenseCache)


FLAGS = ["--cache", "kivi", "--cache-bits", "2", "--cache-value-bits", "4", "--cache-group-size", "64"]
BUILT = Kivi(2, value_bits=4, group_size=64)


@pytest.mark.parametrize(
    ("flags", "wanted"), [([], None), (["--cache", "dense"], DenseCache), (FLAGS, BUILT), (["--cache", "kivi"], Kivi())]
)
def test_flags_of_generate_and_chat(
    flags: list[str], wanted: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used: list[Any] = []

    def record(*_: Any, cache: Any, **__: Any) -> Any:
        used.append(cache)
        return iter([[[]]])

    monkeypatch.setattr("any4_jax.cli.sampling.generate_tokens", record)
    monkeypatch.setattr("any4_jax.cli.chat.Chat", record)
    tokenizer = SimpleNamespace(chat_template="", encode_chat=lambda _: [1], encode=lambda _: [1], decode=lambda _: "")
    for command in ("generate", "chat"):
        model = SimpleNamespace(tokenizer=tokenizer)
        monkeypatch.setattr(f"any4_jax.cli.{command}.open_model", lambda *_, model=model: model)
    monkeypatch.setattr("any4_jax.cli.chat._lines", lambda: iter([]))
    assert main(["generate", "tiny", "--prompt", "Hello", *flags]) == 0
    assert main(["chat", "tiny", *flags]) == 0
    assert used == [wanted, wanted]


def test_flags_of_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    used: list[Any] = []

    def record(*_: Any, cache: Any, **__: Any) -> Perplexity:
        used.append(cache)
        return Perplexity(np.ones(2), 8)

    monkeypatch.setattr("any4_jax.cli.eval_texts.perplexity", record)
    text, out = tmp_path / "text", tmp_path / "out.json"
    text.write_text("Once upon a time.")
    assert main(["eval", "tiny", "--text", str(text), "--out", str(out), *FLAGS]) == 0
    assert used == [BUILT]
    assert '"cache": "kivi bits=2 group_size=64 value_bits=4"' in out.read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cache-bits", "2"], "got --cache-bits without --cache kvquant or --cache kivi, whose field it is"),
        (
            ["--cache", "kivi", "--cache-residual", "100"],
            "residual is 100, and a multiple of group_size, 32, is needed",
        ),
        (["--cache", "kivi", "--cache-bits", "3"], "bits is 3, and 4 or 2 is needed"),
        (
            ["--cache", "kvquant", "--cache-residual", "64"],
            "got --cache-residual without --cache kivi, whose field it is",
        ),
        (["--cache", "dense", "--cache-sinks", "2"], "got --cache-sinks without --cache kvquant, whose field it is"),
        (["--cache", "kivi", "--cache-bits", "5"], "argument --cache-bits: got '5', need one of 4, 3, 2"),
        (["--cache", "soft"], "argument --cache: invalid choice: 'soft'"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "tiny", "--prompt", "Hello", *flags]) == 2
    assert words in capsys.readouterr().err
