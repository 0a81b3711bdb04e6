"""Stacks of weights and several weights in one call of the CUDA product: the bits of single calls, and no copies."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_contract import leaf, rows
from test_cuda_kernel import gpu, in_registers, lowered, native

import any4_jax as a4
from any4_jax.product import explain, matmul, matmul_each
from any4_jax.weights import QuantizedTensor, ScaleInput, Slice
from cuda_ffi.lut_product_cuda import DEQUANTIZE, MOST_ROWS, PRODUCT


def stack(n: int, k: int, layers: int = 3, **fields: Any) -> QuantizedTensor:
    return jax.tree.map(lambda *a: jnp.stack(a), *(leaf(n, k, seed=seed, **fields) for seed in range(layers)))


def one(w: Any, i: int) -> Any:
    return jax.tree.map(lambda a: a[i], w)


def same(ours: Any, theirs: Any) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


FORMS: list[dict[str, Any]] = [
    dict(n=96, k=512),
    dict(n=37, k=352, g=32, bits=3),
    dict(n=24, k=96, g=16, bits=8, row_tables=False),
    dict(n=64, k=256, g=32, scale=jnp.uint8, offsets=False, row_tables=False),
    dict(n=16, k=70, g=64),
]

TRACED_TAKE = jax.jit(a4.take)
"""Clips its index, which outside of a program must be that of a matrix."""


def test_a_slice_is_the_matrix_by_itself() -> None:
    """On this process's device, where the CPU's kernel and XLA index first."""
    stacked, x = stack(16, 70, g=64), rows(2, 70)
    for i, expected in ((0, 0), (2, 2), (-1, 0), (7, 2)):
        layer = TRACED_TAKE(stacked, i)
        assert isinstance(layer, Slice) and layer.shape == (16, 70)
        w = one(stacked, expected)
        same(matmul(x, layer), matmul(x, w))
        same(matmul(x, layer, "xla"), matmul(x, w, "xla"))
        same(a4.dequantize(layer), a4.dequantize(w))
    assert explain(x, a4.take(stacked, 1), "tpu") == explain(x, w, "tpu")


def test_an_expert_of_a_layer() -> None:
    layers, x = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), stack(16, 64)), rows(2, 64)
    for i, j in ((0, 1), (1, 0), (5, -2)):
        expert = TRACED_TAKE(TRACED_TAKE(layers, i), j)
        same(matmul(x, expert, "xla"), matmul(x, one(one(layers, min(i, 1)), max(j, 0)), "xla"))
    with pytest.raises(ValueError, match=r"got a weight of shape \(3, 16, 64\), matmul takes \[N, K\]; use `take`"):
        matmul(x, a4.take(layers, 0))


def test_slices_of_operators() -> None:
    stacked, x = stack(32, 256), rows(2, 256)
    scaled = ScaleInput(stacked, jnp.arange(3 * 256.0).reshape(3, 256))
    same(matmul(x, a4.take(scaled, 1)), matmul(x, one(scaled, 1)))


def test_gradients_flow_to_the_layer_alone() -> None:
    stacked, x = stack(32, 256), rows(3, 256)
    tables, codes = a4.partition(stacked)

    def loss(tables: Any, take: Any) -> jax.Array:
        y = matmul(x, take(a4.combine(tables, codes)), "xla")
        return (y.astype(jnp.float32) ** 2).sum()

    ours = jax.grad(functools.partial(loss, take=lambda w: a4.take(w, 1)))(tables)
    theirs = jax.grad(functools.partial(loss, take=lambda w: one(w, 1)))(tables)
    same(ours, theirs)
    assert not np.asarray(ours.lut[0]).any() and np.asarray(ours.lut[1]).any()


def copies_of_codes(text: str, n: int, bytes_of_row: int) -> int:
    """How many operations of a program result in the codes of one matrix."""
    return len(re.findall(rf"stablehlo\.\w+[^\n]*-> tensor<(?:1x)?{n}x{bytes_of_row}xui8>", text))


@native
@pytest.mark.parametrize("m", [1, MOST_ROWS + 1])
def test_a_loop_over_layers_copies_no_codes(m: int) -> None:
    stacked, x = stack(256, 256), rows(m, 256)

    def indexed(x: jax.Array, stacked: Any) -> jax.Array:
        return jax.lax.scan(lambda x, i: (matmul(x, a4.take(stacked, i)), None), x, jnp.arange(3))[0]

    def scanned(x: jax.Array, stacked: Any) -> jax.Array:
        return jax.lax.scan(lambda x, w: (matmul(x, w), None), x, stacked)[0]

    text = lowered(indexed, x, stacked)
    assert text.count(f"@{PRODUCT if m == 1 else DEQUANTIZE}(") == 1
    assert copies_of_codes(text, 256, 128) == 0 < copies_of_codes(lowered(scanned, x, stacked), 256, 128)


@native
def test_vmap_over_experts_copies_no_codes() -> None:
    experts, x = stack(32, 256, layers=4), rows(4, 3, 256)
    text = lowered(jax.vmap(matmul), x, experts)
    assert text.count(f"@{PRODUCT}(") == 1 and "stablehlo.while" in text
    assert copies_of_codes(text, 32, 128) == 0
    # Experts of layers: 2 x 4 matrices in a row.
    layers = jax.tree.map(lambda a: jnp.stack([a, a]), experts)
    text = lowered(lambda x, w, i: jax.vmap(lambda x, w: matmul(x, a4.take(w, i)), (0, 1))(x, w), x, layers, 1)
    assert text.count(f"@{PRODUCT}(") == 1 and "tensor<8x32x128xui8>" in text


@native
def test_weights_of_one_input_share_a_call() -> None:
    ws, x = [leaf(n, 256) for n in (64, 32, 32)], rows(1, 256)
    assert lowered(matmul_each, x, ws).count(f"@{PRODUCT}(") == 1
    experts = stack(32, 256)
    text = lowered(lambda x, w, i, j: matmul_each(x, [a4.take(w, i), a4.take(w, j)]), x, experts, 0, 2)
    assert text.count(f"@{PRODUCT}(") == 1 and copies_of_codes(text, 32, 128) == 0


@gpu
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("m", [1, 5, 30, 70])
def test_a_layer_has_the_bits_of_the_matrix(m: int, form: dict[str, Any]) -> None:
    """Where XLA multiplies with the decoded matrix, two programs differ by roundings."""
    stacked, x = stack(**form), rows(m, form["k"])
    run = jax.jit(lambda x, w, i: matmul(x, a4.take(w, i), "cuda"))
    close = functools.partial(np.testing.assert_allclose, rtol=0.02, atol=0.01)
    agree = (
        same if in_registers(x, one(stacked, 0)) else lambda a, b: close(*(np.asarray(y, np.float32) for y in (a, b)))
    )
    for i, expected in ((0, 0), (1, 1), (2, 2), (-5, 0), (3, 2)):
        agree(run(x, stacked, i), matmul(x, one(stacked, expected), "cuda"))
    agree(jax.vmap(matmul, (None, 0))(x, stacked), jnp.stack([matmul(x, one(stacked, i)) for i in range(3)]))


@gpu
@pytest.mark.parametrize("m", [1, 7, 16, 24, MOST_ROWS])
def test_together_has_the_bits_of_each_alone(m: int) -> None:
    """Also where alone a weight's blocks have more warps, or tiles, than together; and of unlike ones, in any order."""
    x = rows(m, 2048)
    families = [
        [leaf(n, 2048, seed=n) for n in (4096, 1024, 1024)],
        [leaf(n, 2048, seed=n) for n in (7168, 7168)],
        [leaf(n, 2048, g=64, seed=n) for n in (32, 64, 96, 32, 64, 4096)],
        [leaf(n, 2048, seed=n, offsets=offsets) for n, offsets in ((32, True), (33, True), (64, False), (32, False))],
        [leaf(n, 2048, bits=3, seed=n) for n in (4096, 17)],
    ]
    for ws in families:
        if all(in_registers(x, w) for w in ws):
            same(jax.jit(matmul_each)(x, ws), tuple(jax.jit(matmul)(x, w) for w in ws))


@gpu
def test_a_scan_over_layers() -> None:
    stacked, x = stack(256, 256, layers=5), rows(2, 256)

    @jax.jit
    def indexed(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, i: (matmul(x, a4.take(stacked, i)) / 16, None), x, jnp.arange(5))[0]

    y = x
    for i in range(5):
        y = jax.jit(matmul)(y, one(stacked, i)) / 16
    same(indexed(x), y)
