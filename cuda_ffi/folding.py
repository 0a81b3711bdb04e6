"""How a custom call of the form y [M, N] = f(x [M, K], weight...) behaves under vmap, which jax.ffi can't derive."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def fold_rows(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` with a rule for vmap: over x alone it is one call with more rows, with a batch of weights a loop.

    Args:
      call: (x [M, K], weight...) -> y [M, N], or a tuple of such y.
    """

    @jax.custom_batching.custom_vmap
    def folded(x, *operands):
        return call(x, *operands)

    @folded.def_vmap
    def _rule(axis_size, batched, x, *operands):
        if not any(batched[1:]):
            ys = folded(x.reshape(-1, x.shape[-1]), *operands)
            ys = jax.tree.map(lambda y: y.reshape(axis_size, -1, y.shape[-1]), ys)
            return ys, jax.tree.map(lambda _: True, ys)

        def one(taken):
            return folded(*(t if b else whole for t, b, whole in zip(taken, batched, (x, *operands), strict=True)))

        # What isn't batched is left out of the loop's input; a scalar stands in for it.
        looped = [a if b else jnp.zeros(axis_size) for a, b in zip((x, *operands), batched, strict=True)]
        ys = jax.lax.map(one, looped)
        return ys, jax.tree.map(lambda _: True, ys)

    return folded
