"""A model whose attention reads its keys and values from a cache of one's choice, so that the cache's errors count."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax.kv_cache import CacheFactory, as_decoded, default_cache, traceable
from any4_jax.models.base import Decoder
from any4_jax.models.program import Program


def reading(model: Any, cache: CacheFactory | None) -> Callable[[jax.Array], jax.Array]:
    """The model as a function of int32 tokens [B, T], rows without padding, to logits [B, T, V].

    Each token sees what it would see if they came one by one (`kv_cache.as_decoded`): also what came before it in the
    same window is read from the cache.

    Args:
      model: itself what is returned where there is no cache.
      cache: creates the caches; None takes the model's own, if its checkpoint names one.

    Raises:
      TypeError: there is a cache for a model that is no Decoder; or it is neither a pytree nor hashable.
    """
    cache = default_cache(model) if cache is None else cache
    if cache is None:
        return model
    if not isinstance(model, Decoder):
        raise TypeError(
            f"got a cache for a {type(model).__name__}, and a Decoder is needed, which has caches; leave the cache out"
        )
    factory = traceable(as_decoded(cache))
    program, leaves = Program.of(model)
    return functools.partial(_logits, program, factory, leaves)


@functools.partial(jax.jit, static_argnums=0)
def _logits(program: Program, factory: CacheFactory, leaves: list[jax.Array], tokens: jax.Array) -> jax.Array:
    model = program.model(leaves)
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    x, _ = model.decode(tokens, model.init_cache(batch, length, cache=factory), positions)
    return model.head(x)
