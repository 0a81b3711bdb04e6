"""Products noted down in place of being computed, which is how `explain` finds those that an operator's product is made
of."""

import contextlib
import itertools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

Problem = tuple[Any, Any]
"""The operands (x, w) of a product."""

_RECORD: ContextVar[list[Problem] | None] = ContextVar("any4_jax_planned", default=None)
# Part of the key of all of jax's caches: what is traced while recording, such as a jitted function within an operator's
# product, serves no other product, and none that was traced before is taken for it.
_RECORDING = jax.make_user_context(0)
_recordings = itertools.count(1)


def noted(x: jax.Array, w: Any) -> jax.Array | None:
    """Notes a product down as ShapeDtypeStructs, and returns zeros in its place; None where nobody records."""
    record = _RECORD.get()
    if record is None:
        return None
    record.append(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (x, w)))
    return jnp.zeros((x.shape[0], w.shape[0]), x.dtype)


@contextlib.contextmanager
def recording() -> Iterator[list[Problem]]:
    """Within it products are noted down, in the list that it gives."""
    record: list[Problem] = []
    token = _RECORD.set(record)
    try:
        with _RECORDING(next(_recordings)):
            yield record
    finally:
        _RECORD.reset(token)
