"""Blocks of columns for tests of error compensation, and what a body's codes and errors for them must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax import formats, scaling
from any4_jax.compensation import Grid, compensate, damped, factor, xla
from any4_jax.compensation.xla import Levels

Solve = Callable[["Block"], tuple[np.ndarray, np.ndarray]]


class Block(NamedTuple):
    """The arguments of `xla.solve`."""

    own: np.ndarray
    wanted: np.ndarray
    corner: np.ndarray
    levels: Levels
    uniform: bool

    def of_rows(self, rows: Any) -> Block:
        table, *others = self.levels
        scales, offsets = (None if a is None else a[:, rows] for a in others)
        levels = Levels(table[rows], scales, offsets)
        return Block(self.own[:, rows], self.wanted[:, rows], self.corner, levels, self.uniform)


# One column and row, less than a register, a warp or a panel and more, whole ones, and more columns than a call has.
CASES: list[dict[str, Any]] = [
    dict(columns=1, rows=1, bits=4),
    dict(columns=7, rows=5, bits=4, uniform=True),
    dict(columns=7, rows=64, bits=2, offsets=False),
    dict(columns=48, rows=64, bits=3, uniform=True, offsets=False),
    dict(columns=48, rows=100, bits=1),
    dict(columns=48, rows=33, bits=5),
    dict(columns=128, rows=100, bits=4),
    dict(columns=128, rows=100, bits=4, uniform=True),
    dict(columns=128, rows=100, bits=8, uniform=True),
    dict(columns=128, rows=5, bits=8, offsets=False),
    dict(columns=300, rows=17, bits=4, uniform=True),
    dict(columns=300, rows=17, bits=3),
]


XLA = jax.jit(xla.solve, static_argnames="uniform")


def case_name(case: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in case.items())


def make_block(columns: int, rows: int, bits: int, uniform: bool = False, offsets: bool = True) -> Block:
    """Weights whose columns are correlated. A stretch of scales is zero, and a table has equal levels."""
    rng = np.random.default_rng(columns * rows + bits)
    own, pulled = rng.normal(size=(2, columns, rows)).astype(np.float32)
    corner = np.triu(rng.normal(size=(columns, columns)) * 0.3 / np.sqrt(columns), 1) + np.eye(columns)
    half = 2 ** (bits - 1)
    table = np.broadcast_to(np.arange(-half, half), (rows, 2 * half))
    if not uniform:
        table = np.sort(rng.normal(size=table.shape) * half / 2, axis=1)
        table[0, half:] = table[0, half]
    scales = rng.uniform(0.5, 1.5, own.shape) * 3 / half
    scales[: columns // 2, rows // 2] = 0
    levels = Levels(
        table.astype(np.float32),
        scales.astype(np.float32),
        rng.normal(size=own.shape).astype(np.float32) if offsets else None,
    )
    return Block(own, own + pulled / 4, corner.astype(np.float32), levels, uniform)


def reference(block: Block) -> tuple[np.ndarray, np.ndarray]:
    codes, errors = XLA(*block[:4], uniform=block.uniform)
    return np.asarray(codes), np.asarray(errors)


def middles_of(table: np.ndarray) -> np.ndarray:
    return ((table[:, 1:] + table[:, :-1]) / 2).astype(np.float64)


def check_against_float64(block: Block, codes: np.ndarray, errors: np.ndarray) -> None:
    """Errors belong to codes, codes to the errors before them, and rows without a value at a border are as xla's."""
    table, scales, offsets = block.levels
    offsets = np.zeros_like(scales) if offsets is None else offsets
    assert codes.dtype == np.uint8 and errors.dtype == np.float32 and codes.shape == errors.shape == block.own.shape
    scaled = np.take_along_axis(table.T, codes.astype(np.int64), axis=0).astype(np.float64) * scales
    # The product, the sum with the offset and the difference round one after another.
    unit = 1.5 * 2.0**-23 * (np.abs(scaled) + np.abs(offsets) + np.abs(block.own))
    assert (np.abs(errors - (block.own - (scaled + offsets))) <= unit).all()
    value = block.wanted + np.triu(block.corner, 1).T.astype(np.float64) @ errors.astype(np.float64)
    u = np.where(scales == 0, 0, (value - offsets) / np.where(scales == 0, 1, scales))
    middles = middles_of(table)
    passed = u[:, :, None] - middles
    # A border counts for both sides of it, as far as float32 may move a value.
    slack = 2e-5 * (1 + np.abs(middles))
    assert (codes >= (passed > slack).sum(-1)).all() and (codes <= (passed >= -slack).sum(-1)).all()
    # For a large table that is no ramp, XLA takes seconds to compile its search.
    if not block.uniform and table.shape[1] > 32:
        return
    clear = (np.abs(passed) > slack).all(-1).all(0)
    assert len(clear) < 30 or clear.mean() > 0.7
    np.testing.assert_array_equal(codes[:, clear], reference(block)[0][:, clear])


def edges(bits: int, uniform: bool) -> Block:
    """Values on the borders, one number below and above, far from the table and not finite; nothing is passed on.

    No border is zero, since XLA's threads take subnormal numbers for zero.
    """
    half = 2 ** (bits - 1)
    ramp = np.arange(-half, half, dtype=np.float32)
    levels = ramp if uniform else np.sign(ramp) * ramp**2 / half
    if not uniform and half > 1:
        levels[0] = levels[1]
    middles = (levels[1:] + levels[:-1]) / 2
    wild = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 0.0, -0.0], np.float32)
    values = np.concatenate([middles, np.nextafter(middles, -np.inf), np.nextafter(middles, np.inf), levels, wild])
    rows = 3
    wanted = np.stack([np.roll(values, row) for row in range(rows)], axis=1).astype(np.float32)
    columns = min(len(wanted), 128)
    wanted = wanted[-columns:]
    table = np.broadcast_to(levels, (rows, 2 * half)).copy()
    return Block(
        np.zeros_like(wanted),
        wanted,
        np.eye(columns, dtype=np.float32),
        Levels(table, np.ones_like(wanted), None),
        uniform,
    )


def codes_of_edges(block: Block) -> np.ndarray:
    """What `formats.nearest` says of each value."""
    nearest = formats.nearest(block.wanted.T, block.levels.table, uniform=block.uniform)
    return np.asarray(nearest).T


def check_rows_are_alone(solve: Solve, block: Block) -> None:
    """A row's bits depend neither on the other rows, nor on its place among them."""
    whole = solve(block)
    rows = block.own.shape[1]
    order = np.random.default_rng(0).permutation(rows)
    for part in (slice(7, 8), slice(0, 20), order, np.tile(np.arange(rows), 30)):
        for mine, theirs in zip(solve(block.of_rows(part)), whole, strict=True):
            np.testing.assert_array_equal(mine, theirs[:, part])


def check_what_is_not_finite_stays_in_its_row(solve: Solve, block: Block) -> None:
    whole = solve(block)
    own = block.own.copy()
    own[3, 5] = np.nan
    codes, errors = solve(block._replace(own=own))
    for mine, theirs in zip((codes, errors), whole, strict=True):
        np.testing.assert_array_equal(np.delete(mine, 5, axis=1), np.delete(theirs, 5, axis=1))
    np.testing.assert_array_equal(codes[:4, 5], whole[0][:4, 5])
    assert np.isnan(errors[3, 5])


def check_compensate(backend: str) -> None:
    """Of a whole matrix, in blocks that don't divide it, the errors are as small as xla's under the Hessian."""
    rng = np.random.default_rng(0)
    n, k, g = 40, 100, 20
    x = rng.normal(size=(400, k)) @ (np.eye(k) + rng.normal(size=(k, k)) / np.sqrt(k))
    hessian = jnp.asarray(x.T @ x / 400, jnp.float32)
    w = jnp.asarray(rng.normal(size=(n, k)), jnp.float32)
    upper = factor(damped(hessian, 0.01), jnp.arange(k)).upper
    scales, offsets = scaling.group_scales(w, g, rule="asymmetric", bits=4, dtype=jnp.float32)
    grid = Grid(jnp.arange(-8, 8, dtype=jnp.float32)[None], scales, offsets)
    groups = jnp.arange(k) // g
    found = {}
    for name in (backend, "xla"):
        run = jax.jit(lambda w, name=name: compensate(w, upper, grid, groups, block=48, uniform=True, backend=name)[0])
        codes = run(w)
        levels = np.asarray(codes, np.float64) - 8
        gap = levels * np.asarray(scales)[:, groups] + np.asarray(offsets)[:, groups] - np.asarray(w)
        found[name] = codes, np.einsum("nk,kj,nj->", gap, hessian, gap)
    assert (np.asarray(found[backend][0]) == np.asarray(found["xla"][0])).mean() > 0.98
    np.testing.assert_allclose(found[backend][1], found["xla"][1], rtol=0.01)
