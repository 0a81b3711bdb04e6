"""The weight contract: the product equals x @ dequantize(w).T for every operator, under every transformation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_weights import INTEGERS, NAMES, K, M, N, dequantize, leaf, low_rank, operator, reference, rows

from any4_jax.partition import combine, partition
from any4_jax.product import BACKENDS, matmul
from any4_jax.product.backends.base import arrays_of, dtypes_of
from any4_jax.product.quantized_input import quantize_input
from any4_jax.weights import QuantizeInput, padded_alike, take


@pytest.mark.parametrize("name", NAMES)
def test_product_equals_the_dense_one(name: str) -> None:
    w, x = operator(name), rows(2, 3)
    assert w.shape == (N, K)
    for y in (matmul(x, w), jax.jit(matmul)(x, w)):
        assert y.shape == (2, 3, N) and y.dtype == x.dtype
        np.testing.assert_allclose(y, reference(x, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["4 bits", "nested", "8 bits"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_identity_gives_the_matrix_rounded_once(name: str, dtype: str) -> None:
    w = operator(name)
    y = matmul(jnp.eye(K, dtype=dtype), w)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y.T, dequantize(w, jnp.dtype(dtype)))


def test_kernels_read_tables_of_integers_as_bfloat16() -> None:
    w = operator("int8 tables")
    read = arrays_of(w).lut
    assert w.lut.dtype == jnp.int8 and read.dtype == dtypes_of(w).lut == jnp.bfloat16
    np.testing.assert_array_equal(read.astype(jnp.int8), w.lut)


def test_accumulates_in_float32() -> None:
    """In bf16 sums 256 + 1 would stay 256."""
    w = jnp.ones((1, 600), jnp.bfloat16)
    assert float(matmul(jnp.ones((1, 600), jnp.bfloat16), w)[0, 0]) == 600.0


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_x_and_scan_over_a_stack(name: str) -> None:
    x = rows(3, M)
    w = operator(name)
    folded = jax.jit(jax.vmap(matmul, (0, None)))(x, w)
    np.testing.assert_allclose(folded, jax.jit(matmul)(x, w), rtol=1e-5, atol=1e-5)
    layers = [operator(name, seed) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *padded_alike(layers))
    each = np.stack([reference(a, layer) for a, layer in zip(x, layers, strict=True)])
    _, scanned = jax.lax.scan(lambda _, both: (None, matmul(both[0], both[1])), None, (x, stack))
    np.testing.assert_allclose(scanned, each, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(matmul))(x, stack), each, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_those_through_dequantize(name: str) -> None:
    w, x = operator(name), rows(M)
    tables, codes = partition(w)

    def through(product):
        return lambda x, t: (jnp.sin(product(x, combine(t, codes)))).sum()

    got = jax.jit(jax.grad(through(matmul), (0, 1)))(x, tables)
    expected = jax.jit(jax.grad(through(lambda x, w: x @ dequantize(w).T), (0, 1)))(x, tables)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        tolerance = 2e-2 if ours.dtype == jnp.bfloat16 else 1e-4
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


def test_low_rank_factors_keep_their_dtype_and_need_no_dense_matrix() -> None:
    w, x = low_rank(), rows(M, dtype=jnp.bfloat16)
    y = matmul(x, w)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y, reference(x, w), atol=0.02 * np.abs(reference(x, w)).max())
    slope = jax.grad(lambda w: matmul(x, w).astype(jnp.float32).sum())(w)
    assert slope.a.dtype == slope.b.dtype == jnp.float32
    # d(sum y) / db[n] = scale * sum over rows of a x, which bfloat16 products round to some 1/256.
    expected = 0.3 * (np.asarray(x, np.float64) @ np.asarray(w.a, np.float64).T).sum(axis=0)
    np.testing.assert_allclose(slope.b, np.tile(expected, (N, 1)), atol=0.02 * np.abs(expected).max())
    assert f"{N}x{K}x" not in jax.jit(matmul).lower(x, w).as_text()


def test_gradients_of_float32_tables_equal_finite_differences() -> None:
    tables, codes = partition(leaf(4, dtype=jnp.float32))
    x = rows(M)
    loss = jax.jit(lambda t: (matmul(x, combine(t, codes)) ** 2).sum())
    slope = jax.jit(jax.grad(loss))(tables)
    for field in ("lut", "scales", "offsets"):
        direction = np.random.default_rng(3).normal(size=getattr(tables, field).shape).astype(np.float32)

        def moved(step, field=field, direction=direction):
            return float(loss(dataclasses.replace(tables, **{field: getattr(tables, field) + step * direction})))

        difference = (moved(0.01) - moved(-0.01)) / 0.02
        np.testing.assert_allclose((getattr(slope, field) * direction).sum(), difference, rtol=2e-3)


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_empty_batch_and_single_row(shape: tuple[int, ...]) -> None:
    x = rows(*shape)
    assert matmul(x, operator("4 bits")).shape == (*shape, N)
    assert matmul(x, INTEGERS).shape == (*shape, N)


@pytest.mark.parametrize(
    ("per", "symmetric", "bits", "offsets"),
    # Each two of the choices meet.
    [
        ("token", True, 8, True),
        ("token", False, 4, False),
        ("tensor", True, 4, False),
        ("tensor", False, 8, True),
    ],
)
def test_integer_products_equal_those_of_the_rounded_input(per, symmetric: bool, bits: int, offsets: bool) -> None:
    inner = leaf(8, offsets=offsets, ramp=True)
    w = QuantizeInput(inner, None, bits, symmetric, per)
    x = rows(5) * jnp.asarray([1, 10, 0, 0.1, 3.0])[:, None] + 0.5
    rounded = jax.jit(quantize_input)(x, w)
    assert len(np.unique(np.asarray(rounded[0]))) <= 2**bits
    product = jax.jit(functools.partial(matmul, backend="xla"))
    assert "xi8>" in product.lower(x, w).as_text()
    np.testing.assert_allclose(product(x, w), reference(rounded, inner), rtol=1e-4, atol=1e-4)
    stack = jax.tree.map(lambda a: jnp.stack([a[::-1], a]), w)
    one = jax.jit(lambda x, stack: matmul(x, take(stack, 1), "xla"))
    assert "xi8>" in one.lower(x, stack).as_text()
    np.testing.assert_allclose(one(x, stack), matmul(x, w, "xla"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_input_rounding_stays_within_half_a_step(symmetric: bool) -> None:
    x = rows(6)
    w = QuantizeInput(leaf(4), None, 6, symmetric, "token")
    span = 2 * jnp.abs(x).max(axis=1) if symmetric else jnp.maximum(x.max(1), 0) - jnp.minimum(x.min(1), 0)
    step = span / (62 if symmetric else 63)
    # The zero point is rounded too, so that the end of an asymmetric range may be off by half a step more.
    slack = 0.5 if symmetric else 1.0
    assert (jnp.abs(quantize_input(x, w) - x) <= (slack + 1e-4) * step[:, None]).all()
    np.testing.assert_array_equal(quantize_input(jnp.zeros((2, K)), w), np.zeros((2, K)))


def test_input_levels() -> None:
    levels = jnp.array([-1.0, -0.25, 0.25, 1.0])
    w = QuantizeInput(leaf(4), levels, 2, True, "token")
    x = rows(3)
    rounded = quantize_input(x, w)
    on_grid = np.asarray(rounded) / np.abs(np.asarray(x)).max(axis=1, keepdims=True)
    assert set(np.round(np.unique(on_grid), 6)) <= {-1.0, -0.25, 0.25, 1.0}
    np.testing.assert_allclose(matmul(x, w), reference(rounded, w.inner), rtol=1e-5, atol=1e-5)


def test_the_last_backend_takes_everything() -> None:
    assert BACKENDS.options[-1].name == "xla"
    assert BACKENDS.options[-1].supports(rows(1), leaf(3), "tpu") is None
