"""Weights as linear operators: the LUT-coded leaf and the few operators over it.

`matmul(x, w)` (in matmul.py) and `dequantize(w)` are defined for every operator by `functools.singledispatch`, so a
third party's operator registers its own. A plain array [N, K] is an operator too.
"""

import dataclasses
import functools
import math
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp

from any4_jax import formats, packing, scaling


@typing.dataclass_transform(frozen_default=True)
def _operator(*static: str):
    """A frozen dataclass that is a pytree; the fields named are static, the others hold arrays or operators."""

    def wrap(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
        names = [f.name for f in dataclasses.fields(cls)]
        return jax.tree_util.register_dataclass(cls, [n for n in names if n not in static], list(static))

    return wrap


def _nbytes(tree) -> int:
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


@_operator("bits", "group_size", "padding", "uniform")
class QuantizedTensor:
    """A weight matrix stored as codes into tables:

        W[n, k] = lut[n or 0, codes[n, k]] * scales[n, k // G] + offsets[n, k // G]

    computed in float32 and rounded once, to the dtype of x. G is group_size; the last group is short where G does
    not divide K. `L` stands for any leading axes: layers stacked for scan, experts.

    Attributes:
      codes: packed uint8 (see packing.py): [*L, N, ceil(K * bits / 8)], or a tuple of planes for 3, 5 and 6 bits.
      lut: [*L, N or 1, 2**bits], a table for each row or one for the matrix, stored as it is used.
      scales: [*L, N, ceil(K/G)]: an array, or a QuantizedTensor of that shape. uint8 arrays are e8m0 exponents.
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
    def shape(self) -> tuple[int, ...]:
        """(*L, N, K)."""
        plane = self.codes[0] if isinstance(self.codes, tuple) else self.codes
        k = plane.shape[-1] * 8 // packing.PLANES[self.bits][0] - self.padding
        return (*plane.shape[:-1], k)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays."""
        return _nbytes(self)

    @property
    def bits_per_weight(self) -> float:
        """8 * bytes of the stored arrays / number of weights."""
        return 8 * self.nbytes / math.prod(self.shape)

    def unpacked_codes(self) -> jax.Array:
        """uint8 [*L, N, K]."""
        return packing.unpack(self.codes, self.bits, self.shape[-1])


@_operator()
class Sum:
    """W = sum of the terms, each an operator of the same [N, K]."""

    terms: tuple

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0].shape


@_operator()
class ScaleInput:
    """W[:, k] = inner[:, k] * scale[k]: the input is scaled before the inner product (AWQ, SmoothQuant).

    Attributes:
      inner: operator [*L, N, K].
      scale: [*L, K].
    """

    inner: Any
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape


@_operator()
class PermuteInput:
    """W[:, permutation[i]] = inner[:, i]: the inner operator sees its inputs in another order (act-order).

    Attributes:
      inner: operator [*L, N, K].
      permutation: int32 [*L, K], a permutation of 0..K-1.
    """

    inner: Any
    permutation: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape


@_operator("bits", "symmetric", "per")
class QuantizeInput:
    """The input is quantized on the fly to `bits` before the inner product; the weight is that of `inner`.

    Attributes:
      inner: operator [N, K].
      levels: None for integers, else [2**bits] ascending levels in [-1, 1] onto which x / absmax is rounded.
      bits: 2..8 (static).
      symmetric: one scale without zero point (static); tables are always symmetric.
      per: a scale for each row of x ("token") or one for all of x ("tensor") (static).
    """

    inner: Any
    levels: jax.Array | None
    bits: int
    symmetric: bool
    per: Literal["token", "tensor"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape


@_operator()
class LowRank:
    """W = scale * b @ a, of rank R: the update of LoRA (arXiv 2106.09685, section 4.1), with alpha / R as the scale.

    Attributes:
      a: floating [*L, R, K], the factor that x meets first.
      b: floating [*L, N, R].
      scale: float32 [*L]; [] for one matrix.
    """

    a: jax.Array
    b: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.b.shape[:-1], self.a.shape[-1])


@functools.singledispatch
def dequantize(w, dtype=jnp.float32) -> jax.Array:
    """The dense matrix [*L, N, K] that an operator stands for, computed in float32 and rounded once to `dtype`.

    Raises:
      TypeError: `w` is not an operator.
    """
    # Tracers are jax.Arrays to isinstance but not to singledispatch, so arrays have no registration of their own.
    if isinstance(w, jax.Array):
        return w.astype(dtype)
    raise TypeError(
        f"got a {type(w).__name__}, need an array or an operator of any4_jax.weights; register dequantize for it"
    )


@dequantize.register
def _(w: QuantizedTensor, dtype=jnp.float32) -> jax.Array:
    codes = w.unpacked_codes()
    table = jnp.broadcast_to(w.lut.astype(jnp.float32), (*codes.shape[:-1], w.lut.shape[-1]))
    values = jnp.take_along_axis(table, codes.astype(jnp.int32), axis=-1, mode="promise_in_bounds")
    values = values * scaling.expand(_per_group(w.scales), w.group_size, codes.shape[-1])
    if w.offsets is not None:
        values = values + scaling.expand(_per_group(w.offsets), w.group_size, codes.shape[-1])
    return values.astype(dtype)


def _per_group(stored) -> jax.Array:
    """Scales or offsets as float32, be they an array or quantized themselves."""
    return dequantize(stored) if isinstance(stored, QuantizedTensor) else scaling.scale_values(stored)


@dequantize.register
def _(w: Sum, dtype=jnp.float32) -> jax.Array:
    return functools.reduce(jnp.add, [dequantize(term) for term in w.terms]).astype(dtype)


@dequantize.register
def _(w: ScaleInput, dtype=jnp.float32) -> jax.Array:
    return (dequantize(w.inner) * w.scale.astype(jnp.float32)[..., None, :]).astype(dtype)


@dequantize.register
def _(w: PermuteInput, dtype=jnp.float32) -> jax.Array:
    return jnp.take_along_axis(dequantize(w.inner, dtype), jnp.argsort(w.permutation)[..., None, :], axis=-1)


@dequantize.register
def _(w: QuantizeInput, dtype=jnp.float32) -> jax.Array:
    return dequantize(w.inner, dtype)


@dequantize.register
def _(w: LowRank, dtype=jnp.float32) -> jax.Array:
    product = jnp.matmul(w.b.astype(jnp.float32), w.a.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return (product * w.scale[..., None, None]).astype(dtype)


OPERATORS = (QuantizedTensor, Sum, ScaleInput, PermuteInput, QuantizeInput, LowRank)


def is_operator(node) -> bool:
    """Whether a node of a tree is one of this module's operators."""
    return isinstance(node, OPERATORS)


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
    """The QuantizedTensor of `w` [N, K] whose codes are nearest under the given (stored) table, scales and offsets."""
    u = scaling.normalize(w, scales, offsets, group_size)
    codes = formats.nearest(u, lut, uniform=uniform)
    return from_codes(codes, lut, scales, offsets, bits=bits, group_size=group_size, uniform=uniform)


def from_codes(
    codes: jax.Array, lut: jax.Array, scales, offsets, *, bits: int, group_size: int, uniform: bool = False
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
