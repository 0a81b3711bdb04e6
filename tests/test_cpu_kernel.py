"""The kernel contract of the C++ product: the XLA path's numbers on every instruction set that this processor has."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import Terms

from any4_jax import weights
from any4_jax.partition import combine, partition
from any4_jax.product import explain, matmul
from any4_jax.weights import QuantizedTensor
from cuda_ffi import registration
from cuda_ffi.lut_product import TARGET, Matrix, lut_products
from cuda_ffi.threads import limit_threads

WIDTHS = (1, 2, 3, 4, 5, 6, 8)
ULP = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}

why_not = registration.why_not("cpu")
native = pytest.mark.skipif(why_not is not None, reason=str(why_not))


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
    seed: int = 0,
) -> QuantizedTensor:
    rng = np.random.default_rng(seed)
    groups = -(-k // g)
    scales = rng.integers(120, 130, (n, groups)).astype(np.uint8) if e8m0 else rng.uniform(0.5, 2, (n, groups))
    return weights.from_codes(
        jnp.asarray(rng.integers(0, 2**bits, (n, k), dtype=np.uint8)),
        jnp.asarray(rng.normal(size=(n if row_tables else 1, 2**bits)), dtype),
        jnp.asarray(scales, None if e8m0 else dtype),
        jnp.asarray(rng.normal(size=(n, groups)), dtype) if offsets else None,
        bits=bits,
        group_size=g,
    )


def exact(w: QuantizedTensor) -> tuple[np.ndarray, np.ndarray]:
    """W in float64, and the sum of its terms' magnitudes, by which roundings are judged."""
    terms = Terms.of(w)
    return terms.scaled + terms.shift, np.abs(terms.scaled) + np.abs(terms.shift)


def product(x: jax.Array, w: QuantizedTensor, isa: str = "auto") -> jax.Array:
    (y,) = lut_products(x, [matrix(w)], bits=w.bits, group_size=w.group_size, isa=isa)
    return y


@functools.partial(jax.jit, static_argnames="isa")
def products(inputs: list[jax.Array], w: QuantizedTensor, isa: str) -> list[jax.Array]:
    """A product for each input in one program: compiling is most of these tests' time."""
    return [product(x, w, isa) for x in inputs]


def matrix(w: QuantizedTensor) -> Matrix:
    return Matrix(w.codes if isinstance(w.codes, tuple) else (w.codes,), w.lut, w.scales, w.offsets)


def rows(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(7).normal(size=shape), dtype)


def check(y: jax.Array, x: jax.Array, w: QuantizedTensor) -> None:
    """Every element within the rounding of its dtype and of a float32 sum, relative to the terms of the sum."""
    assert y.dtype == x.dtype and y.shape == (x.shape[0], w.shape[0])
    dense, magnitude = exact(w)
    expected = np.asarray(x, np.float64) @ dense.T
    # Partial sums add up errors like a random walk; 16 units are far out, a wrong code is 1e5 of them.
    slack = 16 * 2.0**-24 * (np.abs(np.asarray(x, np.float64)) @ magnitude.T)
    np.testing.assert_array_less(
        np.abs(np.asarray(y, np.float64) - expected), slack + ULP[str(y.dtype)] * np.abs(expected) + 1e-30
    )


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_width_and_number_of_rows(isa: str, bits: int, dtype: str) -> None:
    """K ends within a vector, N within a task; each number of rows has its own code."""
    w = leaf(7, 301, bits=bits, g=32)
    inputs = [rows(m, 301, dtype=dtype) for m in (1, 2, 3, 4, 7)]
    for x, y in zip(inputs, products(inputs, w, isa), strict=True):
        check(y, x, w)


@pytest.mark.parametrize("g", [1, 7, 8, 16, 32, 64, 100, 128, 256, 500, 1000])
def test_every_group_size(isa: str, g: int) -> None:
    """Groups smaller and larger than a vector's block, such as end within a word, and a short last one."""
    w = leaf(6, 500, g=g)
    inputs = [rows(m, 500) for m in (1, 5)]
    for x, y in zip(inputs, products(inputs, w, isa), strict=True):
        check(y, x, w)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    "fields",
    [
        dict(row_tables=False),
        dict(offsets=False),
        dict(e8m0=True, offsets=False),
        dict(e8m0=True),
        dict(dtype=jnp.float32),
        dict(dtype=jnp.float16),
    ],
    ids=lambda fields: " ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in fields.items()),
)
def test_every_kind_of_table_and_scale(isa: str, bits: int, fields: dict[str, Any]) -> None:
    w = leaf(5, 200, bits=bits, g=16, **fields)
    inputs = [rows(2, 200, dtype=dtype) for dtype in ULP]
    for x, y in zip(inputs, products(inputs, w, isa), strict=True):
        check(y, x, w)


@pytest.mark.parametrize("shape", [(1, 1, 1), (100, 3, 70), (200, 130, 33), (1, 9, 4100), (6, 9, 4100), (3, 1, 2049)])
def test_shapes_beyond_one_pass(isa: str, shape: tuple[int, int, int]) -> None:
    """More rows of x than one pass takes, more of the weight than a task, longer ones than are decoded at a time."""
    m, n, k = shape
    w, x = leaf(n, k, g=64), rows(m, k)
    check(product(x, w, isa), x, w)


def test_an_8_bit_ramp_is_computed_and_equals_the_table(isa: str) -> None:
    ramp = dataclasses.replace(leaf(5, 300, bits=8, row_tables=False), lut=jnp.arange(256.0)[None] / 128 - 1)
    for m in (1, 5):
        x = rows(m, 300)
        check(product(x, ramp, isa), x, ramp)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", list(ULP))
@pytest.mark.parametrize("offsets", [True, False])
def test_identity_gives_the_weights_within_one_ulp(isa: str, bits: int, dtype: str, offsets: bool) -> None:
    w = leaf(5, 72, bits=bits, g=32, offsets=offsets)
    dense, magnitude = exact(w)
    eye = np.eye(72).astype(dtype)
    # All rows at once are decoded to floats; four at a time stay in registers.
    parts = ((0, 72), (0, 4), (30, 34), (68, 72))
    for (first, last), y in zip(parts, products([eye[slice(*part)] for part in parts], w, isa), strict=True):
        error = np.abs(np.asarray(y, np.float64).T - dense[:, first:last])
        # Without offsets the float32 weight is rounded once; with them its terms are, each before they are added.
        unit = ULP[dtype] / 2 * np.abs(dense) + 2.0**-24 * (magnitude if offsets else 0 * magnitude)
        assert (error <= 1.001 * unit[:, first:last]).all()
        if not offsets:
            np.testing.assert_array_equal(y.T, weights.dequantize(w, jnp.dtype(dtype))[:, first:last])


def test_threads_change_no_bit(isa: str) -> None:
    w = leaf(300, 520)
    try:
        for m in (1, 40):
            x = rows(m, 520)
            limit_threads(1)
            alone = np.asarray(product(x, w, isa))
            limit_threads(0)
            np.testing.assert_array_equal(product(x, w, isa), alone)
    finally:
        limit_threads(0)
    with pytest.raises(ValueError, match="got count=-1"):
        limit_threads(-1)


def test_values_that_are_not_finite_stay_in_their_rows(isa: str) -> None:
    w = leaf(4, 40, g=8)
    scales = w.scales.at[1, 2].set(jnp.inf).at[2, 0].set(jnp.nan)
    for m in (1, 5):
        y = np.asarray(product(rows(m, 40), dataclasses.replace(w, scales=scales), isa))
        assert np.isfinite(y[:, [0, 3]]).all() and not np.isfinite(y[:, [1, 2]]).any()
        bad = product(rows(m, 40).at[0, 5].set(jnp.nan), w, isa)
        assert np.isnan(bad[0]).all() and np.isfinite(np.asarray(bad[1:])).all()


@native
@pytest.mark.parametrize("bits", [3, 4])
def test_matmul_takes_it_and_agrees_with_xla(bits: int) -> None:
    w, x = leaf(24, 200, bits=bits, g=64), rows(2, 3, 200)
    assert "cpu: taken" in explain(x, w, "cpu").splitlines()
    assert "cpu: it runs on cpu, not on tpu" in explain(x, w, "tpu").splitlines()
    for backend in (None, "cpu"):
        y = jax.jit(matmul, static_argnums=2)(x, w, backend)
        np.testing.assert_allclose(y, matmul(x, w, "xla"), rtol=1e-5, atol=1e-4)
    assert matmul(x[:0], w, "cpu").shape == (0, 3, 24)


@native
def test_a_compiled_product_holds_the_call_and_no_dense_weight() -> None:
    w, x = leaf(24, 200), rows(3, 200)
    text = jax.jit(matmul).lower(x, w).compile().as_text()
    assert text.count(f'custom_call_target="{TARGET}"') == 1
    assert "f32[24,200]" not in text and "f32[200,24]" not in text


@native
def test_vmap_over_x_is_one_call_and_over_weights_a_loop() -> None:
    w, x = leaf(10, 90, g=32), rows(4, 3, 90)
    folded = jax.jit(jax.vmap(matmul, (0, None)))
    assert folded.lower(x, w).as_text().count(f"@{TARGET}(") == 1
    np.testing.assert_array_equal(folded(x, w), matmul(x, w))
    layers = [leaf(10, 90, g=32, seed=seed) for seed in range(4)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    each = jnp.stack([matmul(a, layer) for a, layer in zip(x, layers, strict=True)])
    np.testing.assert_array_equal(jax.vmap(matmul)(x, stack), each)
    shared = jax.vmap(matmul, (None, 0))(x[0], stack)
    np.testing.assert_array_equal(shared, jnp.stack([matmul(x[0], layer) for layer in layers]))


@native
def test_gradients_equal_those_of_xla() -> None:
    w, x = leaf(10, 90, g=32, dtype=jnp.float32), rows(3, 90)
    tables, codes = partition(w)

    def loss(x, t, backend):
        return jnp.sin(matmul(x, combine(t, codes), backend)).sum()

    ours, theirs = (jax.grad(loss, (0, 1))(x, tables, backend) for backend in ("cpu", "xla"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@native
def test_an_unknown_instruction_set_is_refused_in_words() -> None:
    with pytest.raises(Exception, match="got isa=mmx, which this processor doesn't have"):
        jax.block_until_ready(product(rows(1, 8), leaf(2, 8), "mmx"))


def test_without_the_library_products_take_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_register", lambda kind: f"no {kind} library is built")
    w, x = leaf(24, 200), rows(3, 200)
    assert "cpu: no cpu library is built\nxla: taken" in explain(x, w, "cpu")
    check(matmul(x, w), x, w)
    assert TARGET not in jax.jit(lambda x, w: matmul(x, w)).lower(x, w).as_text()
    with pytest.raises(ValueError, match="backend 'cpu' can't do this: no cpu library is built"):
        matmul(x, w, "cpu")
    with pytest.raises(RuntimeError, match="no cpu library is built"):
        product(x, w)
