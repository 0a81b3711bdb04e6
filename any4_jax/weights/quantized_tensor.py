"""The leaf: a matrix of codes into tables."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax import formats, packing, scaling
from any4_jax.weights.operator import Operator, dequantize, is_operator, operator, take_rows


def _lut_is_trained(w: "QuantizedTensor"):
    # Integer products rely on a uniform table being a ramp, so training must leave it alone. Integers have no gradient.
    return None if w.uniform or getattr(w.lut, "dtype", None) == jnp.int8 else "tables"


@operator(
    static=("bits", "group_size", "padding", "uniform"),
    axes={"codes": "NK", "lut": "N.", "scales": "NK", "offsets": "NK"},
    trains={"lut": _lut_is_trained, "scales": "tables", "offsets": "tables"},
)
class QuantizedTensor(Operator):
    """A weight matrix stored as codes into tables:

        W[n, k] = lut[n or 0, codes[n, k]] * scales[n, k // G] + offsets[n, k // G]

    computed in float32 and rounded once, to the dtype of x. G is group_size; the last group is short where G does
    not divide K. `L` stands for any leading axes: layers stacked for scan, experts.

    Attributes:
      codes: packed uint8 (see packing.py): [*L, N, ceil(K * bits / 8)], or a tuple of planes for 3, 5 and 6 bits.
      lut: floating or int8 [*L, N or 1, 2**bits], a table for each row or one for the matrix, stored as it is used.
      scales: floating [*L, N, ceil(K/G)]: an array, or an operator of that shape. uint8 arrays are e8m0 exponents.
      offsets: like scales, in units of the weight; None for symmetric formats.
      bits: width of a code (static).
      group_size: G >= 1 (static).
      padding: number of zero codes at the end of a row of the first plane (static).
      uniform: the table is an arithmetic ramp, so integer arithmetic on codes is exact (static).
    """

    codes: Any
    lut: jax.Array
    scales: Any
    offsets: Any
    bits: int
    group_size: int
    padding: int
    uniform: bool

    @property
    def planes(self) -> tuple[jax.Array, ...]:
        """The packed codes as a tuple of one or two arrays."""
        return self.codes if isinstance(self.codes, tuple) else (self.codes,)

    @property
    def shape(self) -> tuple[int, ...]:
        """(*L, N, K)."""
        plane = self.planes[0]
        k = plane.shape[-1] * 8 // self._widths[0] - self.padding
        return (*plane.shape[:-1], k)

    @property
    def _widths(self) -> tuple[int, ...]:
        """The bits of a code in each plane."""
        widths = packing.PLANES.get(self.bits)
        if widths is None or len(self.planes) != len(widths):
            known = ", ".join(map(str, packing.PLANES))
            raise ValueError(
                f"got a QuantizedTensor of {self.bits} bits with {len(self.planes)} planes of codes, need bits of "
                f"{known} and a plane for each part; make it by weights.from_codes"
            )
        return widths

    def check(self) -> None:
        """Raises ValueError or TypeError where shapes, dtypes and static fields contradict each other.

        Products call it, which costs no look at a value; construction doesn't, since trees are put together often, and
        from leaves that are no arrays.
        """
        for plane in self.planes:
            if plane.dtype != jnp.uint8:
                raise TypeError(
                    f"got a QuantizedTensor with codes of dtype {plane.dtype}, need packed uint8; make it by "
                    "weights.from_codes"
                )
        if not (jnp.issubdtype(self.lut.dtype, jnp.floating) or self.lut.dtype == jnp.int8):
            raise TypeError(
                f"got a QuantizedTensor with a lut of dtype {self.lut.dtype}, need a floating dtype or int8; convert it"
            )
        *stack, n, k = self.shape
        groups = scaling.group_count(k, self.group_size) if self.group_size >= 1 else 0
        need = {
            "codes": [(*stack, n, packing.plane_bytes(k, width)) for width in self._widths],
            "lut": [(*stack, rows, 2**self.bits) for rows in (1, n)],
            "scales": [(*stack, n, groups)],
            "offsets": [(*stack, n, groups)],
        }
        got = [("codes", plane) for plane in self.planes]
        got += [("lut", self.lut), ("scales", self.scales), ("offsets", self.offsets)]
        for name, array in got:
            if array is not None and tuple(array.shape) not in need[name]:
                raise ValueError(
                    f"got a QuantizedTensor [N, K] = {(n, k)} of {self.bits} bits and group_size={self.group_size} "
                    f"with {name} of shape {tuple(array.shape)}, need {' or '.join(map(str, need[name]))}; make it by "
                    "weights.from_codes"
                )

    def unpacked_codes(self) -> jax.Array:
        """The codes, one a byte: uint8 [*L, N, K]."""
        return packing.unpack(self.codes, self.bits, self.shape[-1])


@dequantize.register
def _(w: QuantizedTensor, dtype=jnp.float32) -> jax.Array:
    codes = w.unpacked_codes()
    table = jnp.broadcast_to(w.lut.astype(jnp.float32), (*codes.shape[:-1], w.lut.shape[-1]))
    values = jnp.take_along_axis(table, codes.astype(jnp.int32), axis=-1, mode="promise_in_bounds")
    values = values * scaling.expand(_per_group(w.scales), w.group_size, codes.shape[-1])
    if w.offsets is not None:
        values = values + scaling.expand(_per_group(w.offsets), w.group_size, codes.shape[-1])
    return values.astype(dtype)


def _per_group(stored: Any) -> jax.Array:
    """Scales or offsets as float32, from an array or an operator."""
    return dequantize(stored) if is_operator(stored) else scaling.scale_values(stored)


@take_rows.register
def _(w: QuantizedTensor, rows):
    # Where each row has its own table, lut has N of them, and these are taken too.
    own = w.lut.shape[0] == w.shape[0]
    return dataclasses.replace(
        w,
        codes=jax.tree.map(lambda plane: take_rows(plane, rows), w.codes),
        lut=take_rows(w.lut, rows) if own else w.lut,
        scales=take_rows(w.scales, rows),
        offsets=None if w.offsets is None else take_rows(w.offsets, rows),
    )


def encode(
    w: jax.Array,
    lut: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None,
    *,
    bits: int,
    group_size: int,
    uniform: bool = False,
) -> QuantizedTensor:
    """Encodes a matrix: the QuantizedTensor whose codes are the nearest ones for these tables, scales and offsets.

    Args:
      w: [N, K], any float dtype.
      lut, scales, offsets: as they are to be stored, see QuantizedTensor.
      bits, group_size, uniform: see QuantizedTensor.
    """
    u = scaling.normalize(w, scales, offsets, group_size)
    codes = formats.nearest(u, lut, uniform=uniform)
    return from_codes(codes, lut, scales, offsets, bits=bits, group_size=group_size, uniform=uniform)


def from_codes(
    codes: jax.Array, lut: jax.Array, scales: Any, offsets: Any, *, bits: int, group_size: int, uniform: bool = False
) -> QuantizedTensor:
    """Packs codes uint8 [*L, N, K] and assembles the leaf; see QuantizedTensor for the other arrays."""
    return QuantizedTensor(
        codes=packing.pack(codes, bits),
        lut=lut,
        scales=scales,
        offsets=offsets,
        bits=bits,
        group_size=group_size,
        padding=packing.padding(codes.shape[-1], bits),
        uniform=uniform,
    )
