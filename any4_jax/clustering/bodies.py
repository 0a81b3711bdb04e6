"""The table of the solver's bodies, and why one is or isn't taken.

Bodies are tried in the order of `BODIES`; the last, "jnp", runs everywhere and is the truth that all must match.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.clustering import jnp_body
from any4_jax.clustering.jnp_body import Clusters, Options


@dataclasses.dataclass(frozen=True)
class Body:
    """A solver.

    Attributes:
      name: what `kmeans_1d(body=...)` calls it.
      platform: that it is lowered for, in the words of jax.lax.platform_dependent; None for all.
      supports: (platform in jax's words, "cpu", "gpu" or "tpu"; solver) -> None, or the reason in words why it can't.
      run: `jnp_body.solve` or the like of it.
    """

    name: str
    platform: str | None
    supports: Callable[[str, str], str | None]
    run: Callable[[Any, Any, Any, Any, Options], Clusters]


# inits.INITS in the words of cuda_ffi.kmeans.
_STARTS = {
    "kmeans++": "plus_plus",
    "random": "random",
    "int": "spread",
    "nf4": "spread",
    "quantile": "quantile",
}


def _cuda_supports(platform: str, solver: str) -> str | None:
    if platform != "gpu":
        return f"it is CUDA for NVIDIA GPUs, the rows are on {platform!r}"
    if solver != "exact":
        return f"it solves exactly, and solver={solver!r} is asked for"
    from cuda_ffi import registration

    return registration.why_not("cuda")


def _cuda_run(rows, weights, tol, numbers, options: Options) -> Clusters:
    from cuda_ffi import kmeans_cuda

    del tol, numbers
    weights = None if weights is None else weights.astype(jnp.float32)
    return kmeans_cuda.exact(rows.astype(jnp.float32), weights, k=options.k)


def _cpu_supports(platform: str, solver: str) -> str | None:
    del solver
    if platform != "cpu":
        return f"it is C++ for CPUs, the rows are on {platform!r}"
    from cuda_ffi import registration

    return registration.why_not("cpu")


def _cpu_run(rows, weights, tol, numbers, options: Options) -> Clusters:
    from cuda_ffi import kmeans

    rows = rows.astype(jnp.float32)
    weights = None if weights is None else weights.astype(jnp.float32)
    if options.solver == "exact":
        return kmeans.exact(rows, weights, k=options.k)
    start = _STARTS[options.init]
    return kmeans.lloyd(rows, weights, numbers, tol, k=options.k, start=start, max_iter=options.max_iter)


CUDA = Body("cuda", "cuda", _cuda_supports, _cuda_run)
CPU = Body("cpu", "cpu", _cpu_supports, _cpu_run)
JNP = Body("jnp", None, lambda platform, solver: None, jnp_body.solve)

BODIES: tuple[Body, ...] = (CUDA, CPU, JNP)


def _platform(rows: jax.Array | np.ndarray) -> str:
    """Where rows lie, or where they would be put; for traced ones the process's default."""
    if isinstance(rows, jax.core.Tracer):
        return jax.default_backend()
    placed = rows if isinstance(rows, jax.Array) else jnp.zeros(())
    return next(iter(placed.devices())).platform


def choose(rows: jax.Array | np.ndarray, solver: str = "exact") -> str:
    """The name of the first body that works where rows, not traced, lie."""
    platform = _platform(rows)
    return next(body.name for body in BODIES if body.supports(platform, solver) is None)


def check_body(name: str, rows: jax.Array | np.ndarray, solver: str) -> None:
    """Refuse a body that there isn't, or that can't run this solver where rows lie."""
    found = next((body for body in BODIES if body.name == name), None)
    if found is None:
        known = ", ".join(repr(body.name) for body in BODIES)
        raise ValueError(f"got body={name!r}, there are {known}; pass one of them, or None to let it be chosen")
    reason = found.supports(_platform(rows), solver)
    if reason is not None:
        raise ValueError(f"body {name!r} can't run here: {reason}; pass body='jnp', or None to let it be chosen")


@functools.partial(jax.jit, static_argnames=("options", "body"))
def solve(rows, weights, tol, numbers, *, options: Options, body: str | None) -> Clusters:
    """Clusters by the named body; None takes the one for the platform that the program is lowered for."""
    if body is not None:
        return next(b for b in BODIES if b.name == body).run(rows, weights, tol, numbers, options)

    def of(body: Body) -> Callable[..., Clusters]:
        return lambda rows, weights, tol, numbers: body.run(rows, weights, tol, numbers, options)

    # A CUDA device is "gpu" to those who ask for its platform, and "cuda" to the lowering.
    device = {"cuda": "gpu"}
    native = {
        b.platform: of(b)
        for b in BODIES
        if b.platform is not None and b.supports(device.get(b.platform, b.platform), options.solver) is None
    }
    if not native:
        return JNP.run(rows, weights, tol, numbers, options)
    return jax.lax.platform_dependent(rows, weights, tol, numbers, default=of(JNP), **native)
