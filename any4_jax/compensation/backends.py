"""The bodies that choose the codes of a block of columns, and where each of them can run."""

import functools

import jax

from any4_jax.choice import Backend, Choice
from any4_jax.compensation import xla
from any4_jax.compensation.xla import Levels

# The problem that they support or not is the platform alone; each runs with the arguments of `xla.solve`.
BACKENDS = Choice((Backend("xla", lambda platform: None, xla.solve),))


def choose(
    own: jax.Array,
    wanted: jax.Array,
    corner: jax.Array,
    levels: Levels,
    *,
    uniform: bool,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`xla.solve` by the named backend; None takes the first that works on the platform the program is lowered for."""
    return BACKENDS.lowered(lambda b: functools.partial(b.run, uniform=uniform), name=backend)(
        own, wanted, corner, levels
    )
