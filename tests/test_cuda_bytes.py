"""The CUDA product of rounded inputs with tables of int8: on a GPU its numbers, elsewhere lowering and words."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_contract import ULP, rows
from test_cuda_kernel import gpu, lowered, native
from test_cuda_stacks import copies_of_codes

import any4_jax as a4
from any4_jax import weights
from any4_jax.product import explain, matmul, matmul_each
from any4_jax.product.backends.cuda import CUDA, MOST_ROUNDED_ROWS
from any4_jax.product.quantized_input import quantize_input
from any4_jax.weights import QuantizedTensor, QuantizeInput
from cuda_ffi.byte_product_cuda import MOST_ROWS, TARGET, byte_products
from cuda_ffi.lut_product import Matrix
from cuda_ffi.lut_product_cuda import PRODUCT


def leaf(
    n: int,
    k: int,
    *,
    g: int = 128,
    lut: Any = jnp.int8,
    dtype: Any = jnp.bfloat16,
    row_tables: bool = True,
    offsets: bool = True,
    bits: int = 4,
    seed: int = 0,
) -> QuantizedTensor:
    """Random codes, and tables whose entries are often at the ends or next to zero."""
    rng = np.random.default_rng(seed)
    groups = -(-k // g)
    shape = (n if row_tables else 1, 2**bits)
    table = np.where(
        rng.random(shape) < 0.3, rng.choice([-127, 127, -2, -1, 0, 1], shape), rng.integers(-127, 128, shape)
    )
    return weights.from_codes(
        jnp.asarray(rng.integers(0, 2**bits, (n, k), dtype=np.uint8)),
        jnp.asarray(table, lut),
        jnp.asarray(rng.uniform(0.01, 0.02, (n, groups)), dtype),
        jnp.asarray(rng.normal(size=(n, groups)), dtype) if offsets else None,
        bits=bits,
        group_size=g,
    )


def rounding(inner: Any) -> QuantizeInput:
    return QuantizeInput(inner, None, 8, True, "group")


FORMS: list[dict[str, Any]] = [
    dict(n=32, k=256),
    dict(n=96, k=2304, g=64),
    dict(n=64, k=768, g=256, offsets=False),
    dict(n=32, k=1280, g=4096, row_tables=False),
    dict(n=4512, k=256, g=128, offsets=False),
    dict(n=8512, k=512, g=128),
]


@pytest.mark.parametrize(
    ("x", "w", "words"),
    [
        (rows(1, 256, dtype=jnp.float32), leaf(32, 256), "x is float32, it takes bfloat16"),
        (rows(1, 256), leaf(32, 256, dtype=jnp.float16), "scales are float16, offsets float16; it takes bfloat16"),
        (
            rows(1, 256),
            leaf(32, 256, g=32),
            "groups have 32 inputs, it takes powers of two from 64 on, or the whole row",
        ),
        (rows(1, 256), leaf(32, 256, g=192), "groups have 192 inputs, it takes powers of two from 64 on"),
        (rows(1, 224), leaf(32, 224), "the weight has the shape (32, 224), it takes multiples of (32, 256)"),
        (rows(1, 256), leaf(48, 256), "the weight has the shape (48, 256), it takes multiples of (32, 256)"),
        (
            rows(17, 256),
            leaf(32, 256),
            f"x has 17 rows, it takes at most {MOST_ROUNDED_ROWS} that are rounded to bytes",
        ),
    ],
)
def test_it_says_why_not(x: jax.Array, w: QuantizedTensor, words: str) -> None:
    reason = CUDA.supports(x, rounding(w), "cuda")
    assert reason is not None and words in reason
    if len(x) == 1:
        with pytest.raises(ValueError, match="use another backend"):
            byte_products(x, [Matrix(w.planes, w.lut, w.scales, w.offsets)], group_size=w.group_size, rounding="int8")


@native
def test_few_rows_take_bytes() -> None:
    table, asked = leaf(64, 256), rounding(leaf(64, 256))
    calls = {
        (MOST_ROWS, False): TARGET,
        (MOST_ROWS + 1, False): PRODUCT,
        (MOST_ROUNDED_ROWS, True): TARGET,
    }
    for (m, rounds), call in calls.items():
        text = lowered(matmul, rows(m, 256), asked if rounds else table)
        found = {name for name in (TARGET, PRODUCT) if text.count(f"@{name}(") == 1}
        assert found == {call}, (m, rounds)
        assert "stablehlo.convert" not in text, "tables are read as they are stored"
    taken = "cuda: taken (x is rounded to {}, which multiplies the table's bytes)"
    assert taken.format("int16") in explain(rows(2, 256), table, "cuda").splitlines()
    assert taken.format("int8") in explain(rows(2, 256), asked, "cuda").splitlines()
    assert "cuda: taken" in explain(rows(3, 256), table, "cuda").splitlines()


@native
def test_weights_of_one_input_share_a_call_and_layers_are_read_in_place() -> None:
    ws, x = [leaf(n, 256) for n in (64, 32)], rows(1, 256)
    assert lowered(matmul_each, x, ws).count(f"@{TARGET}(") == 1
    assert lowered(matmul_each, x, [rounding(w) for w in ws]).count(f"@{TARGET}(") == 1
    text = lowered(matmul_each, x, [ws[0], leaf(32, 256, lut=jnp.bfloat16), ws[1]])
    assert text.count(f"@{TARGET}(") == text.count(f"@{PRODUCT}(") == 1
    for stack in (jax.tree.map(lambda a: jnp.stack([a, a]), w) for w in (ws[1], rounding(ws[1]))):
        text = lowered(lambda x, stack, i: matmul(x, a4.take(stack, i)), x, stack, 1)
        assert text.count(f"@{TARGET}(") == 1 and copies_of_codes(text, 32, 128) == 0
    assert lowered(jax.vmap(matmul, (0, None)), rows(4, 1, 256), ws[0]).count(f"@{TARGET}(") == 1


def difference(y: jax.Array, x: np.ndarray, w: QuantizedTensor, error: float, unsure: np.ndarray | None = None) -> None:
    """y is x W^T but for its own rounding, that of float32 sums, an error of x relative to its largest element, and
    what an element of x is `unsure` by."""
    dense = np.asarray(weights.dequantize(w), np.float64)
    expected = x @ dense.T
    of_sums = 2.0**-19 * (np.abs(x) @ np.abs(dense).T)
    of_inputs = error * np.abs(x).max(axis=1, keepdims=True) * np.linalg.norm(dense, axis=1)
    slack = of_sums + 4 * of_inputs + ULP["bfloat16"] * np.abs(expected)
    if unsure is not None:
        slack += unsure @ np.abs(dense).T
    np.testing.assert_array_less(np.abs(np.asarray(y, np.float64) - expected), slack + 1e-30)


def steps_at_ties(x: np.ndarray) -> np.ndarray:
    """The step of the grid where an input is half-way between two of its points, and 0 elsewhere: XLA divides on a GPU
    with an error of its own, which decides such inputs of the reference."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    step = np.abs(groups).max(axis=-1, keepdims=True) / 127
    tied = np.abs(np.abs(groups / np.where(step == 0, 1, step)) % 1 - 0.5) < 1e-4
    return np.where(tied, step, 0).reshape(x.shape)


@gpu
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("m", [1, 2, 5])
def test_the_numbers(m: int, form: dict[str, Any]) -> None:
    w = leaf(**form)
    x = rows(m, form["k"]).at[0, :64].set(0).at[-1, 70].set(300)
    if m <= MOST_ROWS:
        difference(jax.jit(matmul, static_argnums=2)(x, w, "cuda"), np.asarray(x, np.float64), w, 2.0**-15)
    rounded = np.asarray(quantize_input(x.astype(jnp.float32), rounding(w)), np.float64)
    unsure = steps_at_ties(np.asarray(x, np.float64))
    difference(jax.jit(matmul, static_argnums=2)(x, rounding(w), "cuda"), rounded, w, 0, unsure)


@gpu
@pytest.mark.parametrize("wrap", [lambda w: w, rounding])
def test_the_same_bits_alone_together_and_in_a_stack(wrap: Any) -> None:
    ws, x = [leaf(n, 512, seed=n) for n in (32, 8512, 64)], rows(2, 512)
    alone = [jax.jit(matmul)(x, wrap(w)) for w in ws]
    for y, ours in zip(alone, jax.jit(matmul_each)(x, [wrap(w) for w in ws]), strict=True):
        np.testing.assert_array_equal(ours, y)
    stack = jax.tree.map(lambda a: jnp.stack([a[::-1], a]), wrap(ws[0]))
    np.testing.assert_array_equal(jax.jit(lambda x, stack: matmul(x, a4.take(stack, 1)))(x, stack), alone[0])


@gpu
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_isnt_finite_stays_in_its_row(bad: float) -> None:
    w, x = leaf(32, 512), rows(2, 512).at[0, 300].set(bad)
    for weight in (w, rounding(w)):
        y = np.asarray(jax.jit(matmul)(x, weight), np.float32)
        assert np.isnan(y[0]).all() and np.isfinite(y[1]).all()


@gpu
def test_an_entry_of_minus_128_counts_as_minus_127() -> None:
    w, x = leaf(32, 256), rows(1, 256)
    lowest = dataclasses.replace(w, lut=jnp.where(w.lut == -127, -128, w.lut).astype(jnp.int8))
    assert (np.asarray(lowest.lut) == -128).any()
    np.testing.assert_array_equal(matmul(x, lowest, "cuda"), matmul(x, w, "cuda"))
