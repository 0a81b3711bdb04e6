"""The C++ parts of a coded matrix beside outliers: its coded scales, and the product with few entries."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_weights import entries

import any4_jax as a4
from any4_jax import weights
from any4_jax.methods.coded_scales import Coding
from any4_jax.weights import Sum, dequantize
from cuda_ffi import registration
from cuda_ffi.coded_product import Turned, coded_product

pytestmark = pytest.mark.skipif(registration.why_not("cpu") is not None, reason="needs the C++ library")


# Rows that fill tiles and chunks, and rows that don't; groups that are words, or begin within one; tables of rows;
# scales that are decoded in registers, and in memory.
@pytest.mark.parametrize(
    ("bits", "n", "k", "group_size", "offsets"),
    [(2, 128, 80, 16, True), (3, 150, 560, 16, True), (3, 40, 96, 16, False), (4, 21, 80, 5, False)],
)
def test_a_product_with_coded_scales_equals_the_dense_one(bits, n, k, group_size, offsets, isa) -> None:
    rng = np.random.default_rng(n)
    coding = Coding(bits, 16, "bfloat16")
    coded = [
        coding.operator(coding.code(jnp.asarray(rng.uniform(0.5, 1, (n, k // group_size)))), jnp.ones((1, 1)))
        for _ in range(2)
    ]
    table = jnp.asarray(np.sort(rng.normal(size=(n if offsets else 1, 8))), jnp.float32)
    codes = jnp.asarray(rng.integers(0, 8, (n, k)), jnp.uint8)
    w = weights.from_codes(codes, table, coded[0], coded[1] if offsets else None, bits=3, group_size=group_size)
    scales, shifts = (Turned(s.inner.planes, s.inner.lut, s.inner.scales, s.inner.offsets, 16) for s in coded)
    fields = {"bits": 3, "group_size": group_size, "isa": isa}
    for m in (1, 7):
        x = jnp.asarray(rng.normal(size=(m, k)), jnp.float32)
        y = coded_product(x, w.planes, table, scales, shifts if offsets else None, **fields)
        np.testing.assert_allclose(y, x @ dequantize(w).T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(a4.matmul(x, w, "cpu"), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_product_with_few_entries_equals_the_dense_one(dtype: str) -> None:
    rng = np.random.default_rng(3)
    dense = np.where(rng.uniform(size=(24, 40)) < 0.1, rng.normal(size=(24, 40)), 0)
    w = weights.nonzeros(jnp.asarray(dense, jnp.float32), jnp.dtype(dtype))
    x = jnp.asarray(rng.normal(size=(3, 40)), jnp.float32)
    wide = dataclasses.replace(w, columns=w.columns.astype(jnp.int32), values=w.values.astype(jnp.float32))
    for each in (w, wide):
        np.testing.assert_allclose(a4.matmul(x, each, "cpu"), x @ dequantize(w).T, rtol=1e-5, atol=1e-5)
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), w)
    ys = jax.jit(jax.vmap(lambda x, w: a4.matmul(x, w, "cpu")))(jnp.stack([x, 2 * x]), stack)
    np.testing.assert_allclose(ys[1], 2 * (x @ dequantize(w).T), rtol=1e-5, atol=1e-5)


def test_entries_outside_of_the_matrix_count_for_nothing() -> None:
    w = entries([0, 1], [2, 3], [1.0, 2.0], 2, 8)
    damaged = dataclasses.replace(w, columns=jnp.asarray([[60000, 3]], jnp.uint16), ends=jnp.asarray([1, 70000]))
    np.testing.assert_array_equal(a4.matmul(jnp.ones((1, 8)), damaged, "cpu"), [[0, 2]])


def test_a_named_backend_takes_the_codes_and_leaves_the_entries_to_xla() -> None:
    few = entries([0, 1], [2, 3], [1.0, 2.0], 2, 8)
    with pytest.raises(ValueError, match="backend 'cuda' .*"):
        a4.matmul(jnp.ones((1, 8)), few, "cuda")
    both = Sum((a4.quantize(jnp.ones((2, 8)), a4.methods.NF4()), few))
    text = a4.explain(jnp.ones((1, 8)), both, "cpu")
    assert text.count("cpu: taken") == 2
