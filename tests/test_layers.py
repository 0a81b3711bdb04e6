"""The layers of decoders: their random keys, and models that are traced without arrays."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from family_goldens import FAMILIES, golden
from flax import errors, nnx

from any4_jax.models import families, layers, read_config
from any4_jax.models.layers import Layers

STREAMS: dict[str, dict[str, int]] = {
    "default": {"default": 0},
    "params": {"params": 1, "dropout": 2},
    "both": {"default": 1, "params": 2},
}


@pytest.mark.parametrize("seeds", STREAMS.values(), ids=STREAMS)
def test_keys_are_those_that_flax_draws_and_are_counted(seeds: dict[str, int]) -> None:
    ours, theirs = nnx.Rngs(**seeds), nnx.Rngs(**seeds)
    first, second = (layers._drawn_from(ours) for _ in range(2))
    for rngs in (first, first, second, ours):
        assert jnp.array_equal(*(jax.random.key_data(source.params()) for source in (rngs, theirs)))
    if "dropout" in seeds:
        assert jnp.array_equal(*(jax.random.key_data(source.dropout()) for source in (first, theirs)))
    assert nnx.split(ours)[0] == nnx.split(theirs)[0]
    for name, stream in theirs.items():
        assert ours[name].count[...] == stream.count[...]


def test_streams_from_outside_a_trace_are_refused() -> None:
    rngs = nnx.Rngs(0)
    with pytest.raises(errors.TraceContextError):
        nnx.eval_shape(lambda: Layers.of(jnp.float32, None, rngs).linear(2, 3))
    assert rngs.params.count[...] == 0


MAKERS: dict[str, Callable[[Layers], nnx.Module]] = {
    "linear": lambda layers: layers.linear(2, 3, bias=True),
    "linears": lambda layers: layers.linears(2, 3, 4),
    "embed": lambda layers: layers.embed(2, 3),
    "layer_norm": lambda layers: layers.layer_norm(2, eps=1e-5),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_tracing_costs_the_same_for_each_layer(make: Callable[[Layers], nnx.Module]) -> None:
    """The cost is the number of function calls."""

    def traced(count: int) -> int:
        calls = 0

        def called(*_: Any) -> None:
            nonlocal calls
            calls += 1

        def made() -> nnx.List[Any]:
            of = Layers.of(jnp.float32, None, nnx.Rngs(0))
            return nnx.List(make(of) for _ in range(count))

        before = sys.getprofile()
        sys.setprofile(called)
        try:
            nnx.eval_shape(made)
        finally:
            sys.setprofile(before)
        return calls

    traced(1)
    few, some, many = map(traced, (2, 8, 14))
    assert many - some == pytest.approx(some - few, rel=0.04)


@pytest.mark.parametrize("variant", FAMILIES)
def test_an_abstract_model_is_the_one_that_streams_of_flax_give(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In three layers or more, since windows, positions and experts differ by index."""
    content = golden(variant).configs[0]
    config = read_config(content | {"num_hidden_layers": max(3, content["num_hidden_layers"])})
    family = families.family_of_config(config)
    graphdef, state = nnx.split(family.abstract(config, jnp.bfloat16))
    monkeypatch.setattr(layers, "_drawn_from", lambda rngs: rngs)
    plain = nnx.split(nnx.eval_shape(lambda: family.module(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    assert graphdef == plain[0]
    assert state == plain[1]
