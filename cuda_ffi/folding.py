"""How a custom call of the form y [M, N] = f(x [M, K], weight...) behaves under vmap, which jax.ffi can't derive."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Stack = Callable[[int, Sequence[bool], Sequence[jax.Array]], tuple[list[bool], list[jax.Array]]]


def fold_rows(call: Callable[..., Any], stack: Stack | None = None) -> Callable[..., Any]:
    """`call` with a rule for vmap: over x alone it stays one call, with more rows; over weights it becomes a loop.

    Args:
      call: (x [M, K], weight...) -> y [M, N], or a tuple of such y.
      stack: (size of the batch, which weights have it as their first axis, weights) -> the latter two in a form whose
        loop copies less; None to loop over them as they are.
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

        if stack is not None:
            flags, stacks = stack(axis_size, batched[1:], operands)
            batched, operands = [batched[0], *flags], tuple(stacks)

        def one(taken):
            return folded(*(t if b else whole for t, b, whole in zip(taken, batched, (x, *operands), strict=True)))

        # Operands without the batch's axis stay out of the loop's input; a scalar stands in for each.
        looped = [a if b else jnp.zeros(axis_size) for a, b in zip((x, *operands), batched, strict=True)]
        ys = jax.lax.map(one, looped)
        return ys, jax.tree.map(lambda _: True, ys)

    return folded
