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
from cuda_ffi.turned import turned_values

pytestmark = pytest.mark.skipif(registration.why_not("cpu") is not None, reason="needs the C++ library")


# Rows that fill tiles and chunks, and rows that don't; with odd numbers of columns.
@pytest.mark.parametrize(("bits", "n", "columns"), [(2, 64, 5), (3, 150, 33), (4, 7, 3)])
@pytest.mark.parametrize("isa", ["auto", "portable"])
def test_turned_values_are_those_of_the_law(bits: int, n: int, columns: int, isa: str) -> None:
    coding = Coding(bits, 16 if n > 16 else 8, "bfloat16")
    values = jnp.asarray(np.random.default_rng(n).normal(size=(n, columns)), jnp.float32)
    leaf = coding.operator(coding.code(values), jnp.ones((1, 1))).inner
    run = max(leaf.group_size, 8)
    found = turned_values(leaf.planes, leaf.lut, leaf.scales, leaf.offsets, n=n, group_size=run, isa=isa)
    np.testing.assert_allclose(found.T, dequantize(leaf), rtol=1e-6, atol=1e-6)


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
