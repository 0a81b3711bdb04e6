"""Weights of bytes and rounded inputs, for tests of the kernels that multiply them."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import Terms

from any4_jax import weights
from any4_jax.product.backends.cpu import grid_of_all
from any4_jax.product.quantized_input import quantize_input
from any4_jax.weights import QuantizedTensor, QuantizeInput
from cuda_ffi.byte_product import Rounding, byte_products
from cuda_ffi.lut_product import Matrix

ULP = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


INSTRUCTION_SETS = ("portable", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512vbmi", "dotprod")


def present(request: pytest.FixtureRequest, library: ctypes.CDLL) -> str:
    """The body of a fixture: one of INSTRUCTION_SETS, if this processor has it."""
    if not library.any4_cpu_has_isa(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    return request.param


def leaf(
    n: int,
    k: int,
    *,
    bits: int = 4,
    g: int = 128,
    dtype: Any = jnp.bfloat16,
    row_tables: bool = True,
    offsets: bool = True,
    e8m0: bool = False,
    ramp: float | None = None,
    lowest: int = -127,
    seed: int = 0,
) -> QuantizedTensor:
    """Random codes and tables of int8 from `lowest` on; beyond 4 bits, or where its middle is given, a ramp."""
    rng = np.random.default_rng(seed)
    groups = -(-k // g)
    rows = n if row_tables else 1
    if bits > 4 or ramp is not None:
        steps = 2.0 ** -rng.integers(0, 3, (rows, 1))
        table = jnp.asarray((np.arange(2.0**bits) - 2 ** (bits - 1)) * steps + (ramp or 0), jnp.float32)
    else:
        table = jnp.asarray(rng.integers(lowest, 128, (rows, 2**bits)), jnp.int8).at[:, -1].set(lowest)
    scales = rng.integers(110, 120, (n, groups)).astype(np.uint8) if e8m0 else rng.uniform(0.01, 0.02, (n, groups))
    return weights.from_codes(
        jnp.asarray(rng.integers(0, 2**bits, (n, k), dtype=np.uint8)),
        table,
        jnp.asarray(scales, None if e8m0 else dtype),
        jnp.asarray(rng.normal(size=(n, groups)), dtype) if offsets else None,
        bits=bits,
        group_size=g,
        uniform=bits > 4 or ramp is not None,
    )


def rounding(inner: Any, bits: int = 8, symmetric: bool = True, per: Any = "group") -> QuantizeInput:
    return QuantizeInput(inner, None, bits, symmetric, per)


def matrix(w: QuantizedTensor) -> Matrix:
    return Matrix(w.planes, w.lut, w.scales, w.offsets)


@functools.partial(jax.jit, static_argnames=("isa", "how"))
def products(
    inputs: list[jax.Array], ws: list[QuantizedTensor], isa: str, how: tuple[Any, ...] = ()
) -> list[list[jax.Array]]:
    """The products of each weight with each input, in one program: compiling is most of these tests' time."""
    by = rounding(None, *how)
    ours = Rounding(by.bits, by.symmetric, by.per != "group")
    return [
        [
            byte_products(
                x, [matrix(w)], bits=w.bits, group_size=w.group_size, rounding=ours, grid=grid_of_all(x, by), isa=isa
            )[0]
            for x in inputs
        ]
        for w in ws
    ]


@functools.partial(jax.jit, static_argnames="how")
def rounded(inputs: list[jax.Array], how: tuple[Any, ...]) -> list[jax.Array]:
    """Each input as the operator rounds it."""
    return [quantize_input(x.astype(jnp.float32), rounding(None, *how)) for x in inputs]


def rows(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    rng = np.random.default_rng(7)
    # Magnitudes that differ between groups.
    return jnp.asarray(rng.normal(size=shape) * np.exp2(rng.integers(-3, 4, shape[-1]) // 3), dtype)


def check(inputs: list[jax.Array], ws: list[QuantizedTensor], isa: str, *how: Any) -> None:
    """Every element within the rounding of its dtype and of a float32 sum, relative to the terms of the sum. `how`:
    arguments of `rounding`."""
    exact = [np.asarray(x, np.float64) for x in rounded(inputs, how)]
    for w, ys in zip(ws, products(inputs, ws, isa, how), strict=True):
        terms = Terms.of(w)
        dense, magnitude = terms.scaled + terms.shift, np.abs(terms.scaled) + np.abs(terms.shift)
        for x, q, y in zip(inputs, exact, ys, strict=True):
            assert y.dtype == x.dtype and y.shape == (x.shape[0], w.shape[0])
            expected = q @ dense.T
            # A wrong code, and an input that is rounded the other way, are 1e3 of these units.
            terms_of_x = np.abs(q) if rounding(None, *how).symmetric else np.abs(q) + np.ptp(q, -1, keepdims=True)
            slack = 16 * 2.0**-24 * (terms_of_x @ magnitude.T) + ULP[str(y.dtype)] * np.abs(expected) + 1e-30
            np.testing.assert_array_less(np.abs(np.asarray(y, np.float64) - expected), slack)


KINDS: dict[str, dict[str, Any]] = {
    "table": dict(),
    "one table": dict(row_tables=False),
    "table with -128": dict(lowest=-128),
    "no offsets": dict(offsets=False),
    "float32 scales": dict(dtype=jnp.float32),
    "float16 scales": dict(dtype=jnp.float16),
    "e8m0": dict(e8m0=True),
    "4-bit ramp": dict(ramp=0.0),
    "4-bit ramp, no offsets": dict(ramp=0.25, offsets=False, row_tables=False),
    "8 bits": dict(bits=8, row_tables=False, offsets=False),
    "8 bits, ramp of a middle": dict(bits=8, ramp=2.0, offsets=False),
    "8 bits, offsets": dict(bits=8, g=32),
    "1 bit": dict(bits=1, g=32),
    "table of 4": dict(bits=2),
    "table of 8": dict(bits=3, lowest=-128),
    "2-bit ramp": dict(bits=2, ramp=0.0, offsets=False),
    "3-bit ramp": dict(bits=3, ramp=0.5),
    "5 bits": dict(bits=5, row_tables=False),
    "6 bits": dict(bits=6, ramp=-1.0, offsets=False),
}
