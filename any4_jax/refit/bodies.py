"""The table of the refit's bodies, and why one is or isn't taken.

Bodies are tried in the order of `BODIES`; the last, "jnp", runs everywhere and is the truth that all must match.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.refit import jnp_body
from any4_jax.refit.jnp_body import Fit, Options
from any4_jax.refit.scale_search import FITS, starts


@dataclasses.dataclass(frozen=True)
class Body:
    """A refit.

    Attributes:
      name: what `refit(body=...)` calls it.
      platform: that it is lowered for, in the words of jax.lax.platform_dependent; None for all.
      supports: platform, in jax's words ("cpu", "gpu", "tpu") -> None, or the reason in words why it can't run there.
      run: `jnp_body.solve` or the like of it.
    """

    name: str
    platform: str | None
    supports: Callable[[str], str | None]
    run: Callable[[jax.Array, jax.Array, Fit, Options], Fit]


def _cpu_supports(platform: str) -> str | None:
    if platform != "cpu":
        return f"it is C++ for CPUs, the rows are on {platform!r}"
    from cuda_ffi import registration

    return registration.why_not("cpu")


def _cuda_supports(platform: str) -> str | None:
    if platform != "gpu":
        return f"it is CUDA for NVIDIA GPUs, the rows are on {platform!r}"
    from cuda_ffi import registration

    return registration.why_not("cuda")


def _native_run(w: jax.Array, importance: jax.Array, start: Fit, options: Options, *, kind: str) -> Fit:
    from cuda_ffi import refit

    lut, scales, offsets = refit.refit(
        *(w, importance, *start),
        kind=kind,
        group_size=options.group_size,
        searches=options.searches,
        max_rounds=options.max_rounds,
        free=(options.first, options.stop),
        settled=jnp_body.SETTLED,
        search=refit.Search(starts(start.offsets is not None), FITS),
    )
    return Fit(lut, scales, offsets)


CUDA = Body("cuda", "cuda", _cuda_supports, functools.partial(_native_run, kind="cuda"))
CPU = Body("cpu", "cpu", _cpu_supports, functools.partial(_native_run, kind="cpu"))
JNP = Body("jnp", None, lambda platform: None, jnp_body.solve)

BODIES: tuple[Body, ...] = (CUDA, CPU, JNP)


def _platform(w: jax.Array | np.ndarray) -> str:
    """Where w lies, or where it would be put; for a traced one the process's default."""
    if isinstance(w, jax.core.Tracer):
        return jax.default_backend()
    placed = w if isinstance(w, jax.Array) else jnp.zeros(())
    return next(iter(placed.devices())).platform


def check_body(name: str, w: jax.Array | np.ndarray) -> None:
    """Refuse a body that there isn't, or that can't run where w lies."""
    found = next((body for body in BODIES if body.name == name), None)
    if found is None:
        known = ", ".join(repr(body.name) for body in BODIES)
        raise ValueError(f"got body={name!r}, there are {known}; pass one of them, or None to let it be chosen")
    reason = found.supports(_platform(w))
    if reason is not None:
        raise ValueError(f"body {name!r} can't run here: {reason}; pass body='jnp', or None to let it be chosen")


@functools.partial(jax.jit, static_argnames=("options", "body"))
def solve(w: jax.Array, importance: jax.Array, start: Fit, *, options: Options, body: str | None) -> Fit:
    """The fit by the named body; None takes the one for the platform that the program is lowered for."""
    if body is not None:
        return next(b for b in BODIES if b.name == body).run(w, importance, start, options)

    def of(body: Body) -> Callable[[jax.Array, jax.Array, Fit], Fit]:
        return lambda w, importance, start: body.run(w, importance, start, options)

    # A CUDA device is "gpu" to those who ask for its platform, and "cuda" to the lowering.
    device = {"cuda": "gpu"}
    native = {
        b.platform: of(b)
        for b in BODIES
        if b.platform is not None and b.supports(device.get(b.platform, b.platform)) is None
    }
    if not native:
        return JNP.run(w, importance, start, options)
    return jax.lax.platform_dependent(w, importance, start, default=of(JNP), **native)
