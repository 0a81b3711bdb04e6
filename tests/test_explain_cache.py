"""`explain` tells which kernel attends over a decoder's caches, as it runs, and why others don't."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx

from any4_jax import explain
from any4_jax.cli import main
from any4_jax.kv_cache import DefaultCache, DenseCache, Kivi, KVQuant, RoundedAttention
from any4_jax.models.hf import from_tensors
from any4_jax.models.mistral import MistralConfig
from any4_jax.models.tiny import random_tensors
from cuda_ffi import registration


@pytest.fixture(scope="module")
def model() -> Any:
    """Two blocks of bfloat16, the second with a window."""
    config = MistralConfig(
        vocab_size=32,
        hidden_size=128,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=256,
        windows=(None, 16),
    )
    return from_tensors(config, random_tensors(config), jnp.bfloat16)


@pytest.mark.parametrize(
    ("cache", "head", "verdicts"),
    [
        (
            None,
            "DenseCache",
            ["cuda: taken", "cudnn: the scores are few", "cpu: it runs on cpu", "xla: could, but 'cuda' comes first"],
        ),
        (Kivi(2), "Kivi(bits=2)", ["cuda: taken", "cpu: it runs on cpu", "xla: could, but 'cuda' comes first"]),
        (
            Kivi(rotated=False),
            "Kivi(rotated=False)",
            ["cuda: the cache holds keys before", "cpu: it runs on", "xla: taken"],
        ),
        (
            KVQuant(3).stand_in(2, 1, 64),
            "KVQuant(bits=3)",
            ["cuda: taken", "cpu: it runs on cpu", "xla: could, but 'cuda' comes first"],
        ),
        (RoundedAttention(8), "RoundedAttention(", ["xla: taken"]),
    ],
)
def test_each_kind_of_block_is_told_once(
    model: Any, cache: Any, head: str, verdicts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "_register", lambda kind: object())
    _, *layers, plain, window = explain(model, cache=cache, platform="cuda").split("\n\n")
    assert "attention over" not in "".join(layers)
    for text, more in ((plain, ""), (window, ", window=16")):
        first, *rest = text.splitlines()
        assert first.startswith(f"attention over {head}")
        assert first.endswith(f"  [2 heads on 1, 64 channels, 256 tokens{more}]")
        for line, words in zip(rest, verdicts, strict=True):
            assert line.strip().startswith(words)


def test_the_models_own_cache_is_told_unless_another_is_named(model: Any) -> None:
    carried = nnx.merge(*nnx.split(model))
    carried.cache = DefaultCache(Kivi(2))
    assert "attention over Kivi(bits=2)" in explain(carried)
    assert "attention over DenseCache" in explain(carried, cache=DenseCache)
    assert "attention over DenseCache" in explain(model)
    with pytest.raises(ValueError, match="got a cache for a dict, need a Decoder"):
        explain({"d": {"kernel": jnp.ones((4, 4))}}, cache=DenseCache)


def test_the_command_takes_a_cache(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, said in ((["--cache", "kvquant", "--cache-bits", "3"], "KVQuant(bits=3)"), ([], "DenseCache")):
        assert main(["explain", "tiny", *flags]) == 0
        assert f"attention over {said}  [8 heads on 4, 8 channels, 512 tokens]" in capsys.readouterr().out
