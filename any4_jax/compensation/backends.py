"""The bodies that choose the codes of a block of columns, and where each of them can run."""

import functools

import jax

from any4_jax.choice import Backend, Choice
from any4_jax.compensation import xla
from any4_jax.compensation.xla import Levels


def _native_supports(platform: str, *, kind: str) -> str | None:
    from cuda_ffi import registration

    return registration.why_not(kind, platform)


def _native_run(
    own: jax.Array, wanted: jax.Array, corner: jax.Array, levels: Levels, *, uniform: bool, kind: str
) -> tuple[jax.Array, jax.Array]:
    from cuda_ffi import compensation

    return compensation.compensate(own, wanted, corner, *levels, kind=kind, uniform=uniform)


def _native(kind: str) -> Backend:
    return Backend(kind, functools.partial(_native_supports, kind=kind), functools.partial(_native_run, kind=kind))


# The problem that they support or not is the platform alone; each runs with the arguments of `xla.solve`.
BACKENDS = Choice((_native("cuda"), _native("cpu"), Backend("xla", lambda platform: None, xla.solve)), late=True)


def choose(
    own: jax.Array,
    wanted: jax.Array,
    corner: jax.Array,
    levels: Levels,
    *,
    uniform: bool,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`xla.solve` by the named backend; None takes the first that works on the platform the program is lowered for.

    Raises:
      ValueError: no backend has that name, or it can't run here; the message gives the reason.
    """
    backend = BACKENDS.choose(backend, arrays=(own, wanted))
    return BACKENDS.lowered(lambda b: functools.partial(b.run, uniform=uniform), name=backend)(
        own, wanted, corner, levels
    )
