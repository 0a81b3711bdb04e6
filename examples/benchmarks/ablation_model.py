"""The model of ablations.py, run block by block."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def inputs(model: Any, ids: np.ndarray) -> Iterator[tuple[str, jax.Array]]:
    """The input [T, K] of every linear on one window."""
    x = model.embed(jnp.asarray(ids)[None])
    for index, layer in enumerate(model.layers):
        x, seen = _block(type(model).block, *nnx.split(layer), x, model.init_cache(*x.shape[:2])[0], tapped=True)
        for site in model.sites:
            for linear in site.linears:
                yield f"layers.{index}.{linear}", seen[site.name][0]


class Runner:
    """tokens [B, T] -> logits, block by block: one small program for all layers, which compiles in seconds where the
    whole takes a GPU minutes."""

    def __init__(self, model: Any) -> None:
        self.model, self.layers = model, [nnx.split(layer) for layer in model.layers]
        self.embedding = nnx.split(model.embed_tokens)
        self.cache: Any = None

    def __call__(self, tokens: jax.Array) -> jax.Array:
        if self.cache is None:
            self.cache = self.model.init_cache(*tokens.shape)[0]
        x = _embed(*self.embedding, tokens)
        for layer in self.layers:
            x, _ = _block(type(self.model).block, *layer, x, self.cache, tapped=False)
        return self.model.head(x)


@functools.partial(jax.jit, static_argnames="graphdef")
def _embed(graphdef: Any, state: Any, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state)(tokens)


@functools.partial(jax.jit, static_argnames=("block", "graphdef", "tapped"))
def _block(block: Any, graphdef: Any, state: Any, x: jax.Array, cache: Any, tapped: bool) -> tuple[jax.Array, dict]:
    seen: dict[str, jax.Array] = {}
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    y, _ = block(graphdef, state, x, cache, positions, seen.__setitem__ if tapped else None)
    return y, seen
