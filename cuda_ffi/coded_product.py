"""Products on the CPU with weights whose scales are coded themselves, along the rows that they scale."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration
from cuda_ffi.folding import fold_rows

TARGET = "any4_cpu_coded_product"
BITS = (2, 3, 4)
"""Those of the codes of scales."""
RUN = 8
"""Runs of codes with one range are of a multiple of so many."""


@dataclasses.dataclass(frozen=True)
class Turned:
    """S[n, g] = lut[codes[g, n]] * scales[g, n // R] + offsets[g, n // R].

    Attributes:
      codes: one or two planes of codes of BITS bits, uint8 [groups, ceil(N * width / 8)].
      lut: a ramp [1, 2**bits], a floating dtype.
      scales, offsets: [groups, ceil(N / R)], a floating dtype.
      run: R, a multiple of RUN.
    """

    codes: tuple[jax.Array, ...]
    lut: jax.Array
    scales: jax.Array
    offsets: jax.Array
    run: int


def coded_product(
    x: jax.Array,
    codes: tuple[jax.Array, ...],
    lut: jax.Array,
    scales: Turned,
    offsets: Turned | None,
    *,
    bits: int,
    group_size: int,
    isa: str = "auto",
) -> jax.Array:
    """y = x W^T [M, N] in x's dtype, as `lut_product.lut_products` has it, with neither W nor its scales in memory.

    Args:
      x: [M, K], float32, bfloat16 or float16.
      codes, lut, bits, group_size: of W, as there.
      scales, offsets: [N, ceil(K / G)].
      isa: as there.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cpu")` says why without raising.
    """
    registration.register("cpu")
    turned = [each for each in (scales, offsets) if each is not None]
    absent = jnp.zeros((0, 0), jnp.float32)
    operands = [*_planes(codes), lut if lut.dtype == jnp.bfloat16 else lut.astype(jnp.float32), absent, absent]
    for each in turned:
        bfloat16 = each.scales.dtype == each.offsets.dtype == jnp.bfloat16
        ranges = (a if bfloat16 else a.astype(jnp.float32) for a in (each.scales, each.offsets))
        operands += [*_planes(each.codes), each.lut.astype(jnp.float32), *ranges]
    attributes = {
        "bits": bits,
        "group_size": min(group_size, max(x.shape[-1], 1)),
        "scales_run": scales.run,
        "offsets_run": turned[-1].run,
        "isa": isa,
    }
    floats = x.astype(jnp.float32) if x.dtype == jnp.float16 else x
    return _call(tuple(attributes.items()))(floats, *operands).astype(x.dtype)


def _planes(codes: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """Two planes; an array of no elements takes the place of an absent one."""
    return codes[0], codes[1] if len(codes) > 1 else jnp.zeros((0, 0), jnp.uint8)


@functools.cache
def _call(attributes: tuple[tuple[str, Any], ...]) -> Any:
    """The custom call on (x, *operands) with its rule for vmap."""
    passed = {name: np.int64(value) if type(value) is int else value for name, value in attributes}

    @fold_rows
    def call(x, *operands):
        y = jax.ShapeDtypeStruct((x.shape[0], operands[0].shape[0]), x.dtype)
        return jax.ffi.ffi_call(TARGET, y)(x, *operands, **passed)

    return call
