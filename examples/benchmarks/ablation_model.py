"""The model of ablations.py: its logits, by a scan over the layers, and the inputs of its linears."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from any4_jax.kv_cache import CacheFactory, DenseCache, as_decoded
from any4_jax.models.base import Decoder


def inputs(model: Decoder, ids: np.ndarray) -> Iterator[tuple[str, jax.Array]]:
    """The path of every linear with its input [T, K] on one window."""
    x = _embed(model, jnp.asarray(ids)[None])
    for index, layer in enumerate(model.blocks):
        x, seen = _tapped(type(model).block, *nnx.split(layer), x, model.init_cache(*x.shape[:2])[0])
        for site in model.sites(index):
            for linear in site.linears:
                yield f"{model.block_path(index)}.{linear}", seen[site.name][0]


class Runner:
    """Tokens [B, T] -> logits [B, T, V], by a scan over the layers: one small program that compiles in seconds; on a
    GPU the whole model takes minutes. Keys and values are read from a cache, as if tokens came one by one."""

    def __init__(self, model: Decoder, cache: CacheFactory = DenseCache) -> None:
        self.cache = as_decoded(cache)
        self.model, layers = model, [nnx.split(layer) for layer in model.blocks]
        self.layer = layers[0][0]
        self.states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state in layers))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        caches = self.model.init_cache(*tokens.shape, cache=self.cache)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
        x = _embed(self.model, tokens)
        return self.model.head(_layers(type(self.model).block, self.layer, self.states, x, stacked))


@jax.jit
def _embed(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model.embed(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape))


@functools.partial(jax.jit, static_argnames=("block", "graphdef"))
def _tapped(block: Any, graphdef: Any, state: Any, x: jax.Array, cache: Any) -> tuple[jax.Array, dict]:
    seen: dict[str, jax.Array] = {}
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    y, _ = block(graphdef, state, x, cache, positions, seen.__setitem__)
    return y, seen


@functools.partial(jax.jit, static_argnames=("block", "graphdef"))
def _layers(block: Any, graphdef: Any, states: Any, x: jax.Array, caches: Any) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])

    def step(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        state, cache = layer
        return block(graphdef, state, x, cache, positions, None)[0], None

    return jax.lax.scan(step, x, (states, caches))[0]
