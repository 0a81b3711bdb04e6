"""The kernel contract of products of bytes where a row of x, or all of x, has one scale: see test_byte_kernel.py."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from byte_weights import INSTRUCTION_SETS, KINDS, ULP, check, leaf, matrix, present, products, rounding, rows

from any4_jax import weights
from any4_jax.product import explain, matmul
from cuda_ffi import registration
from cuda_ffi.byte_product import Rounding, byte_products

why_not = registration.why_not("cpu")
native = pytest.mark.skipif(why_not is not None, reason=str(why_not))

isa = pytest.fixture(params=INSTRUCTION_SETS, name="isa")(present)

# Of rows, or of all inputs, with one scale: bits, symmetric, per.
BY_ROW: list[tuple[int, bool, str]] = [
    (8, True, "token"),
    (8, False, "token"),
    (6, True, "tensor"),
    (8, False, "tensor"),
    (3, False, "token"),
]


@pytest.mark.parametrize("how", BY_ROW, ids=str)
def test_rows_with_one_scale(isa: str, how: tuple[int, bool, str]) -> None:
    """Every kind of weight, groups within a vector and beyond it, one for the whole row, numbers of rows as above."""
    kinds = list(KINDS.values())[BY_ROW.index(how) % 2 :: 2]
    ws = [leaf(7, 333, **{"g": (8, 32, 72, 128, 400)[i % 5], **fields}) for i, fields in enumerate(kinds)]
    check([rows(m, 333, dtype=list(ULP)[m % 3]) for m in (1, 7)], ws, isa, *how)


@pytest.mark.parametrize("shape", [(1, 1, 1), (90, 70, 33), (5, 70, 128), (3, 5, 2049)])
def test_rows_with_one_scale_beyond_one_pass(isa: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    check([rows(m, k)], [leaf(n, k, g=g, bits=bits) for bits in (3, 8) for g in (64, k)], isa, 8, False, "token")


def test_one_scale_at_the_ends_of_its_range(isa: str) -> None:
    """Rows of zeros, of one sign, of the least and of the largest numbers, and where all integers are extreme: sums of
    products of -128 by -128 don't saturate."""
    x = np.random.default_rng(3).normal(size=(7, 256)).astype(np.float32)
    x[0], x[1], x[2], x[3, 9] = 0, 1e-40, np.abs(x[2]), 1e38
    x[4] = np.resize([-1.0, 1.0], 256)
    x[5] = np.resize([-1.0, -1.0, -1.0, 0.99], 256)
    x[6] *= -3e-30
    ws = [
        leaf(5, 256, g=256, lowest=-128),
        dataclasses.replace(w := leaf(3, 256, bits=8), codes=jnp.zeros_like(w.codes)),
    ]
    for symmetric in (True, False):
        check([jnp.asarray(x), jnp.asarray(x[5:6])], ws, isa, 8, symmetric, "token")


def test_a_scale_that_is_given_clips_and_keeps_what_is_no_number_in_its_row(isa: str) -> None:
    w, x = leaf(4, 160, g=32, bits=8), rows(3, 160).at[1, 5].set(jnp.nan).at[2, 7].set(jnp.inf)
    grid = jnp.asarray([[127 / 2.0, 2 / 127, 0.0]], jnp.float32)
    (y,) = byte_products(x, [matrix(w)], bits=8, group_size=32, rounding=Rounding(by_row=True), grid=grid, isa=isa)
    seen = np.clip(np.round(np.asarray(x[::2]) * np.float32(127 / 2)), -128, 127) * (2 / 127)
    np.testing.assert_allclose(y[::2], seen @ np.asarray(weights.dequantize(w), np.float64).T, rtol=1e-5, atol=1e-3)
    assert np.isnan(y[1]).all()
    for y in products([x], [w], isa, (8, False, "token"))[0]:
        assert np.isnan(y[1:]).all() and np.isfinite(y[0]).all()


@native
def test_matmul_takes_rows_with_one_scale_and_agrees_with_xla() -> None:
    x = rows(2, 3, 200)
    ws = {
        "W8A8": rounding(leaf(24, 200, bits=8, g=200), 8, True, "token"),
        "W6A6": rounding(leaf(24, 200, bits=6, g=200), 6, False, "token"),
        "W4A8": rounding(leaf(24, 200, ramp=0.0), 8, False, "tensor"),
        "static": dataclasses.replace(rounding(leaf(24, 200, bits=8), 8, True, "tensor"), scale=jnp.asarray(1.5)),
        "any4": rounding(leaf(24, 200), 8, True, "token"),
    }
    for w in ws.values():
        assert "cpu: taken (x is rounded to bytes, which multiply the weight's bytes)" in explain(x, w, "cpu")
    ours = jax.jit(lambda ws: {name: (matmul(x, w), matmul(x[:0], w)) for name, w in ws.items()})(ws)
    theirs = jax.jit(lambda ws: {name: matmul(x, w, "xla") for name, w in ws.items()})(ws)
    for name, (y, none) in ours.items():
        np.testing.assert_allclose(y, theirs[name], rtol=1e-5, atol=1e-4, err_msg=name)
        assert none.shape == (0, 3, 24)
    # One scale for all inputs is one for each call, whatever vmap does.
    for name in ("W4A8", "static"):
        each = jax.vmap(lambda x, w=ws[name]: matmul(x, w))(x)
        np.testing.assert_allclose(each, [matmul(a, ws[name]) for a in x], rtol=1e-6, atol=1e-6, err_msg=name)
