"""The solver's backends, and where each of them can run."""

import functools

import jax
import jax.numpy as jnp

from any4_jax.choice import Backend, Choice
from any4_jax.clustering import xla
from any4_jax.clustering.xla import Clusters, Options

# What cuda_ffi.kmeans calls each of inits.INITS.
_STARTS = {
    "kmeans++": "plus_plus",
    "random": "random",
    "int": "spread",
    "nf4": "spread",
    "quantile": "quantile",
}


def _cuda_supports(solver: str, platform: str) -> str | None:
    if solver != "exact":
        return f"it has only the exact solver, got solver={solver!r}"
    from cuda_ffi import registration

    return registration.why_not("cuda", platform)


def _cuda_run(rows, weights, tol, numbers, options: Options) -> Clusters:
    from cuda_ffi import kmeans_cuda

    del tol, numbers
    weights = None if weights is None else weights.astype(jnp.float32)
    return kmeans_cuda.exact(rows.astype(jnp.float32), weights, k=options.k)


def _cpu_supports(solver: str, platform: str) -> str | None:
    del solver
    from cuda_ffi import registration

    return registration.why_not("cpu", platform)


def _cpu_run(rows, weights, tol, numbers, options: Options) -> Clusters:
    from cuda_ffi import kmeans

    rows = rows.astype(jnp.float32)
    weights = None if weights is None else weights.astype(jnp.float32)
    if options.solver == "exact":
        return kmeans.exact(rows, weights, k=options.k)
    start = _STARTS[options.init]
    return kmeans.lloyd(rows, weights, numbers, tol, k=options.k, start=start, max_iter=options.max_iter)


# The problem that they support or not is (solver, platform); each runs with the arguments of `xla.solve`.
BACKENDS = Choice(
    (
        Backend("cuda", _cuda_supports, _cuda_run),
        Backend("cpu", _cpu_supports, _cpu_run),
        Backend("xla", lambda solver, platform: None, xla.solve),
    ),
    late=True,
)


@functools.partial(jax.jit, static_argnames=("options", "backend"))
def solve(rows, weights, tol, numbers, *, options: Options, backend: str | None) -> Clusters:
    """Clusters by the named backend; None takes the first that works on the platform the program is lowered for."""
    run = BACKENDS.lowered(lambda b: functools.partial(b.run, options=options), options.solver, name=backend)
    return run(rows, weights, tol, numbers)
