"""The refit's backends, and where each of them can run."""

import functools

import jax

from any4_jax.choice import Backend, Choice
from any4_jax.refit import xla
from any4_jax.refit.scale_search import FITS, starts
from any4_jax.refit.xla import SETTLED, Fit, Options


def _native_supports(platform: str, *, kind: str) -> str | None:
    from cuda_ffi import registration

    return registration.why_not(kind, platform)


def _native_run(w: jax.Array, importance: jax.Array, start: Fit, options: Options, *, kind: str) -> Fit:
    from cuda_ffi import refit

    lut, scales, offsets = refit.refit(
        *(w, importance, *start),
        kind=kind,
        group_size=options.group_size,
        searches=options.searches,
        max_rounds=options.max_rounds,
        free=(options.first, options.stop),
        settled=SETTLED,
        search=refit.Search(starts(start.offsets is not None), FITS),
    )
    return Fit(lut, scales, offsets)


def _native(kind: str) -> Backend:
    return Backend(kind, functools.partial(_native_supports, kind=kind), functools.partial(_native_run, kind=kind))


# The problem that they support or not is the platform alone; each runs with the arguments of `xla.solve`.
BACKENDS = Choice((_native("cuda"), _native("cpu"), Backend("xla", lambda platform: None, xla.solve)), late=True)


@functools.partial(jax.jit, static_argnames=("options", "backend"))
def solve(w: jax.Array, importance: jax.Array, start: Fit, *, options: Options, backend: str | None) -> Fit:
    """The fit by the named backend; None takes the first that works on the platform the program is lowered for."""
    return BACKENDS.lowered(lambda b: functools.partial(b.run, options=options), name=backend)(w, importance, start)
