"""Tables, scales, offsets and codes that lower the error of a layer's output, in turn.

The error of a row is (w - q) H (w - q)^T with q[k] = lut[codes[k]] * s_g(k) + o_g(k), the objective of GPTQ
(arXiv 2210.17323): here no input counts as independent of another. Codes follow by coordinate descent.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from any4_jax import scaling
from any4_jax.refit.descent import Grid, descend
from any4_jax.refit.normal_equations import HIGHEST, of_groups, of_tables, solve_rounded
from any4_jax.refit.xla import Fit

_CHUNK_ROWS, _CHUNK_ROWS_ON_GPU = 256, 1024
"""Rows worked on at a time. The numbers are the same for every matrix: for another number XLA may order sums
differently, and a row's bits must not depend on other rows."""


def improve(
    target: jax.Array,
    hessian: jax.Array,
    start: Fit,
    codes: jax.Array,
    group_size: int,
    *,
    rounds: int,
    sweeps: int,
    entries: slice = slice(None),
    uniform: bool = False,
) -> tuple[Fit, jax.Array]:
    """Lowers the error (w - q) H (w - q)^T of each row, or leaves the row as it is.

    A round fits the table by least squares, then scales and offsets together, and then the codes by coordinate descent.
    Fitted values are rounded to their stored dtypes, and a row takes each of the three steps only if its error falls,
    so no round raises it. A row's result depends only on the row and H. If w, scales and offsets are multiplied by
    2**n, the resulting scales and offsets are multiplied by 2**n exactly, as long as no stored dtype overflows or
    underflows.

    Args:
      target: w, float32 [N, K].
      hessian: H, float32 [K, K], symmetric and positive definite.
      start: what to improve: tables [N or 1, 2**bits], ascending, scales and offsets (or None) [N, ceil(K/G)]. Scales
        that are e8m0 exponents, uint8, stay as they are. So do an entry that no code uses, and the scale and offset of
        a group whose scale is zero.
      codes: uint8 [N, K].
      group_size: G, at most K.
      rounds: how many rounds.
      sweeps: how often a round visits each column for a better code.
      entries: the table entries that may change, a slice without a step. Those before and after it bound them.
      uniform: the table is an arithmetic ramp, see `formats.nearest`.

    Returns:
      (a fit of the shapes and dtypes of `start`, its tables ascending; codes uint8 [N, K]).

    Raises:
      ValueError: entries may change in a table that rows share, or that is a ramp.
    """
    first, stop, _ = entries.indices(start.lut.shape[1])
    stop = max(first, stop)
    if stop > first and (uniform or start.lut.shape[0] != target.shape[0]):
        kind = "is a ramp" if uniform else f"is shared by {target.shape[0]} rows"
        raise ValueError(f"got entries={entries} of a table that {kind}, it must stay as it is; pass entries=slice(0)")
    return _improve(
        *(target, hessian, start, codes),
        group_size=group_size,
        rounds=rounds,
        sweeps=sweeps,
        first=first,
        stop=stop,
        uniform=uniform,
    )


class _State(NamedTuple):
    """Rows as they are: gap = (w - q) / unit and pull = gap H, float32 [R, K]."""

    fit: Fit
    codes: jax.Array
    gap: jax.Array
    pull: jax.Array


class _Problem(NamedTuple):
    """Rows of weights over a power of two, so that their squares stay within float32.

    target: w / unit, float32 [R, K]. unit: [R, 1]. hessian: float32 [K, K]. group_size: G.
    """

    target: jax.Array
    unit: jax.Array
    hessian: jax.Array
    group_size: int

    def grid(self, fit: Fit) -> Grid:
        """The stored values, scales and offsets over the unit."""
        offsets = None if fit.offsets is None else fit.offsets.astype(jnp.float32) / self.unit
        return Grid(fit.lut.astype(jnp.float32), scaling.scale_values(fit.scales) / self.unit, offsets)

    def state(self, fit: Fit, codes: jax.Array) -> _State:
        gap = self.target - self.grid(fit).values(codes, self.group_size)
        return _State(fit, codes, gap, jnp.matmul(gap, self.hessian, precision=HIGHEST))

    def better(self, old: _State, fit: Fit, codes: jax.Array) -> _State:
        """The old rows, but for those whose error the new fit and codes lower."""
        new = self.state(fit, codes)
        # The difference of two errors, without the rounding error of either.
        change = ((new.gap - old.gap) * (new.pull + old.pull)).sum(axis=1, keepdims=True)
        return jax.tree.map(lambda ours, theirs: jnp.where(change < 0, ours, theirs), new, old)

    def fit_tables(self, state: _State, first: int, stop: int) -> tuple[Fit, jax.Array]:
        """Entries first .. stop - 1 by least squares, with the codes for the table as it is then sorted."""
        lut, k = state.fit.lut, self.target.shape[1]
        scales = self.grid(state.fit).scales
        largest = scaling.power_of_two(jnp.abs(scales).max(axis=1, keepdims=True))
        steps = scaling.expand(scales / largest, self.group_size, k)
        equations = of_tables(state.codes, steps, range(first, stop), self.hessian, state.pull)
        table = lut.astype(jnp.float32)
        low = table[:, first - 1] if first > 0 else -jnp.inf
        high = table[:, stop] if stop < lut.shape[1] else jnp.inf

        def stored(values, _):
            return scaling.rounded(jnp.clip(values, low, high), lut.dtype).astype(jnp.float32)

        old = table[:, first:stop]
        found = solve_rounded(equations, old, jnp.broadcast_to(1 / largest, old.shape), stored)
        moved = lut.at[:, first:stop].set(found.astype(lut.dtype))
        order = jnp.argsort(moved, axis=1)
        codes = jnp.take_along_axis(jnp.argsort(order, axis=1), state.codes.astype(jnp.int32), axis=1)
        return state.fit._replace(lut=jnp.take_along_axis(moved, order, axis=1)), codes.astype(jnp.uint8)

    def fit_groups(self, state: _State) -> Fit:
        """Scales, unless they are exponents, and offsets by least squares."""
        fit, table = state.fit, self.grid(state.fit).table
        largest = scaling.power_of_two(jnp.abs(table).max(axis=1, keepdims=True))
        levels = self.grid(state.fit).levels(state.codes) / largest
        equations = of_groups(
            *(levels, self.group_size, self.hessian, state.pull),
            offsets=fit.offsets is not None,
            scales=_are_free(fit.scales),
        )
        # In the sequence of the equations' unknowns, with their sizes and lower bounds.
        unknown = [] if fit.offsets is None else [(fit.offsets, self.unit, -jnp.inf)]
        if _are_free(fit.scales):
            unknown.append((fit.scales, self.unit / largest, float(jnp.finfo(fit.scales.dtype).tiny)))
        arrays = [a for a, _, _ in unknown]
        old = jnp.concatenate([a.astype(jnp.float32) for a in arrays], axis=1)
        size = jnp.concatenate([jnp.broadcast_to(unit, a.shape) for a, unit, _ in unknown], axis=1)
        low = jnp.concatenate([jnp.full(a.shape, least) for a, _, least in unknown], axis=1)
        # A group without extent stays so.
        held = jnp.tile(scaling.scale_values(fit.scales) == 0, (1, len(unknown)))
        groups = fit.scales.shape[1]

        def stored(values, i):
            bounded = jnp.maximum(values, low[:, i])
            as_stored = [scaling.rounded(bounded, a.dtype).astype(jnp.float32) for a in arrays]
            return jnp.where(held[:, i], old[:, i], jnp.where(i < groups, as_stored[0], as_stored[-1]))

        found = solve_rounded(equations, old, size, stored)
        offsets = None if fit.offsets is None else found[:, :groups].astype(fit.offsets.dtype)
        scales = found[:, -groups:].astype(fit.scales.dtype) if _are_free(fit.scales) else fit.scales
        return Fit(fit.lut, scales, offsets)


def _are_free(scales: jax.Array) -> bool:
    """Whether scales may change: exponents stay as they are."""
    return scales.dtype != jnp.uint8


@functools.partial(jax.jit, static_argnames=("group_size", "first", "stop", "uniform"))
def _improve(target, hessian, start, codes, *, group_size, rounds, sweeps, first, stop, uniform):
    hessian = hessian / scaling.power_of_two(jnp.diagonal(hessian).max())

    def improved(rows):
        target, fit, codes = rows
        unit = scaling.unit(target, jnp.float32)
        problem = _Problem(target / unit, unit, hessian, group_size)

        def one_round(_, state):
            if stop > first:
                state = problem.better(state, *problem.fit_tables(state, first, stop))
            if _are_free(state.fit.scales) or state.fit.offsets is not None:
                state = problem.better(state, problem.fit_groups(state), state.codes)
            found = descend(
                *(problem.target, hessian, problem.grid(state.fit), state.codes, state.pull, group_size),
                sweeps=sweeps,
                uniform=uniform,
            )
            return problem.better(state, state.fit, found)

        state = jax.lax.fori_loop(0, rounds, one_round, problem.state(fit, codes))
        return state.fit, state.codes

    n, size = target.shape[0], _CHUNK_ROWS_ON_GPU if jax.default_backend() == "gpu" else _CHUNK_ROWS
    chunks = -(-n // size)

    def split(a):
        """Copies of the last row pad the last chunk."""
        return jnp.pad(a, ((0, chunks * size - n), (0, 0)), mode="edge").reshape(chunks, size, a.shape[1])

    each = start._replace(lut=jnp.broadcast_to(start.lut, (n, start.lut.shape[1])))
    made = jax.lax.map(improved, jax.tree.map(split, (target, each, codes)))
    fit, codes = jax.tree.map(lambda a: a.reshape(-1, a.shape[2])[:n], made)
    return fit._replace(lut=fit.lut[: start.lut.shape[0]]), codes
