"""What is trained of one coded matrix, in units that suit matrices of any size, and the matrix that it gives.

Everything is zero at the start, and one learning rate serves all:

    table     in steps of the table: a sixteenth of the range between its ends, for 4 bits
    scales    relative to what they were
    offsets   in steps of the table, as weights are
    rounding  how far a weight is moved towards another code, in steps between neighbours, from -1/2 to 1/2

What is computed with is what would be stored, and gradients pass that rounding straight through.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from any4_jax import scaling, weights
from any4_jax.weights import QuantizedTensor, is_operator

Moves = dict[str, jax.Array]
"""What is trained of a leaf, float32, by its kind: "table", "scales", "offsets" or "rounding"."""

LARGEST_TABLE = 16
"""Longer tables, which are those of fixed formats, stay as they are."""

NOTHING_TO_TRAIN = (
    "of which nothing can be trained: its tables are fixed, and its scales are exponents or coded themselves; pass one "
    "with scales or tables of its own"
)
"""The end of a message."""

_INSIDE = 0.45
"""How far from its code a weight may start, in steps: inside of the half step at which it takes the next one."""

_LEAST, _MOST = 0.25, 4.0
"""Bounds of a trained scale, relative to what it was: it stays positive."""


def is_leaf(node: Any) -> bool:
    """Whether a node of an operator is a matrix of codes, whatever its scales are."""
    return isinstance(node, QuantizedTensor)


def at_rest(leaf: QuantizedTensor, rounding: bool) -> Moves:
    """All that can be trained of a leaf, as zeros.

    The tables of integers, those of more than 16 entries, scales of 8 bits and scales that are coded themselves stay.
    """
    moves: Moves = {}
    if _has_free_table(leaf):
        moves["table"] = jnp.zeros(leaf.lut.shape, jnp.float32)
    if _is_plain(leaf.scales):
        moves["scales"] = jnp.zeros(leaf.scales.shape, jnp.float32)
    if leaf.offsets is not None and _is_plain(leaf.offsets):
        moves["offsets"] = jnp.zeros(leaf.offsets.shape, jnp.float32)
    if rounding:
        moves["rounding"] = jnp.zeros(leaf.shape, jnp.float32)
    return moves


def _has_free_table(leaf: QuantizedTensor) -> bool:
    return not leaf.uniform and leaf.lut.shape[-1] <= LARGEST_TABLE


def _is_plain(stored: Any) -> bool:
    return not is_operator(stored) and jnp.issubdtype(stored.dtype, jnp.floating)


class Start(NamedTuple):
    """A leaf as training starts from it.

    Attributes:
      leaf: as the method made it.
      codes: uint8 [*L, N, K], those of the leaf.
      place: float32 [*L, N, K], where the weights are relative to their codes, in steps, at most 0.45 away; None where
        codes are fixed.
    """

    leaf: QuantizedTensor
    codes: jax.Array
    place: jax.Array | None

    @classmethod
    def of(cls, leaf: QuantizedTensor, kernel: jax.Array | None) -> "Start":
        """The start for weights that the codes stand for, as a kernel [*L, K, N]; None where codes are fixed."""
        codes = leaf.unpacked_codes()
        if kernel is None:
            return cls(leaf, codes, None)
        u = scaling.normalize(
            jnp.swapaxes(kernel, -1, -2), _values(leaf.scales), _values(leaf.offsets), leaf.group_size
        )
        table = leaf.lut.astype(jnp.float32)
        off = u - _look_up(table, codes, leaf.uniform)
        below, above = (_look_up(steps, codes, leaf.uniform) for steps in _steps(table))
        step = jnp.where(off < 0, below, above)
        place = jnp.where(step > 0, off / jnp.where(step > 0, step, 1.0), 0.0)
        return cls(leaf, codes, jnp.clip(place, -_INSIDE, _INSIDE))

    def matrix(self, moves: Moves) -> jax.Array:
        """What a moved leaf stands for, float32 [*L, N, K], to be differentiated by the moves."""
        lut, scales, offsets = self._fit(moves)
        codes = self._codes(moves)
        u = _look_up(lut, codes, self.leaf.uniform)
        if "rounding" in moves:
            below, above = _steps(jax.lax.stop_gradient(lut))
            step = _look_up((below + above) / 2, codes, self.leaf.uniform)
            u = u + scaling.straight_through(jnp.zeros(()), step * moves["rounding"])
        k, group_size = u.shape[-1], self.leaf.group_size
        w = u * scaling.expand(scales, group_size, k)
        return w if offsets is None else w + scaling.expand(offsets, group_size, k)

    def moved(self, moves: Moves) -> QuantizedTensor:
        """The moved leaf as it is stored."""
        leaf = self.leaf
        lut, scales, offsets = self._fit(moves)
        made = weights.from_codes(
            self._codes(moves),
            lut.astype(leaf.lut.dtype),
            scales.astype(leaf.scales.dtype) if "scales" in moves else leaf.scales,
            offsets.astype(leaf.offsets.dtype) if "offsets" in moves else leaf.offsets,
            bits=leaf.bits,
            group_size=leaf.group_size,
            uniform=leaf.uniform,
        )
        return dataclasses.replace(made, codes=leaf.codes) if "rounding" not in moves else made

    def _codes(self, moves: Moves) -> jax.Array:
        if "rounding" not in moves or self.place is None:
            return self.codes
        at = self.codes.astype(jnp.float32) + self.place + jax.lax.stop_gradient(moves["rounding"])
        return jnp.clip(jnp.round(at), 0, 2**self.leaf.bits - 1).astype(jnp.uint8)

    def _fit(self, moves: Moves) -> tuple[jax.Array, jax.Array, Any]:
        """Table, scales and offsets as they would be stored, in float32."""
        leaf = self.leaf
        table, scales, offsets = leaf.lut.astype(jnp.float32), _values(leaf.scales), _values(leaf.offsets)
        step = (table[..., -1:] - table[..., :1]) / (table.shape[-1] - 1)
        in_weights = step * scales
        if "table" in moves:
            # Entries that pass each other change places, so that tables stay ascending.
            table = _as_stored(jnp.sort(table + step * moves["table"], axis=-1), leaf.lut.dtype)
        if "scales" in moves:
            scales = _as_stored(scales * jnp.clip(1 + moves["scales"], _LEAST, _MOST), leaf.scales.dtype)
        if "offsets" in moves:
            offsets = _as_stored(offsets + in_weights * moves["offsets"], leaf.offsets.dtype)
        return table, scales, offsets


def started(operator: Any, kernel: jax.Array | None) -> Any:
    """An operator with a `Start` in the place of each of its leaves; `kernel` as in `Start.of`."""
    return jax.tree.map(lambda node: Start.of(node, kernel) if is_leaf(node) else node, operator, is_leaf=is_leaf)


def _values(stored: Any) -> Any:
    """Scales or offsets as float32; None where there are none."""
    if stored is None:
        return None
    return weights.dequantize(stored) if is_operator(stored) else scaling.scale_values(stored)


def _as_stored(values: jax.Array, dtype: Any) -> jax.Array:
    kept = scaling.rounded(jax.lax.stop_gradient(values), dtype)
    return scaling.straight_through(kept.astype(jnp.float32), values)


def _steps(table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How far each entry of tables [*L, R, entries] is from the one below and from the one above; the ends have one
    neighbour, which counts for both."""
    gaps = table[..., 1:] - table[..., :-1]
    return (
        jnp.concatenate([gaps[..., :1], gaps], axis=-1),
        jnp.concatenate([gaps, gaps[..., -1:]], axis=-1),
    )


def _look_up(table: jax.Array, codes: jax.Array, uniform: bool) -> jax.Array:
    """table[r, codes[n, k]], float32 [*L, N, K], for tables [*L, N or 1, entries]; of ramps, the lines through them."""
    if uniform:
        first, second = table[..., :1], table[..., 1:2]
        return first + codes.astype(jnp.float32) * (second - first)
    return _gathered(table, codes)


@jax.custom_vjp
def _gathered(table: jax.Array, codes: jax.Array) -> jax.Array:
    rows = jnp.broadcast_to(table, (*codes.shape[:-1], table.shape[-1]))
    return jnp.take_along_axis(rows, codes.astype(jnp.int32), axis=-1, mode="promise_in_bounds")


def _gathered_back(kept: Any, slope: jax.Array) -> tuple[jax.Array, None]:
    # A gather's own gradient is a scatter, whose order of additions is not fixed on a GPU. These are sums of rows.
    codes, entries, shared = kept
    each = jax.lax.broadcasted_iota(codes.dtype, (*[1] * (codes.ndim - 1), entries, 1), codes.ndim - 1)
    mine = codes[..., None, :] == each
    by_entry = jnp.where(mine, slope[..., None, :], 0.0).sum(axis=-1)
    return by_entry.sum(axis=-2, keepdims=True) if shared else by_entry, None


def _gathered_forth(table: jax.Array, codes: jax.Array) -> tuple[jax.Array, Any]:
    return _gathered(table, codes), (codes, table.shape[-1], table.shape[-2] != codes.shape[-2])


_gathered.defvjp(_gathered_forth, _gathered_back)
