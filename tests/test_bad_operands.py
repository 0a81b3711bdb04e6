"""Operands of products at fault: leaves that contradict themselves, indices outside of a stack, misfits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import check

from any4_jax import explain, weights
from any4_jax.methods import NF4, quantize
from any4_jax.nn.nnx import Any4Linear
from any4_jax.product import matmul, matmul_each
from any4_jax.weights import dequantize, take

W = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
X = jnp.ones((2, 8))


@functools.cache
def whole():
    return quantize(W, NF4(group_size=4))


def leaf(**changed):
    return dataclasses.replace(whole(), **changed)


@functools.cache
def stack():
    return jax.tree.map(lambda a: jnp.stack([a, a]), leaf())


LEAVES = [
    (lambda: leaf(codes=leaf().codes.astype(jnp.int32)), TypeError, "codes int32 uint8"),
    (lambda: leaf(codes=leaf().codes.astype(jnp.int8)), TypeError, "codes int8 uint8"),
    (lambda: leaf(bits=3), ValueError, "3 bits 1 planes"),
    (lambda: leaf(bits=7), ValueError, "7 bits need"),
    (lambda: leaf(bits=2), ValueError, "(4, 16) of 2 bits"),
    (lambda: leaf(group_size=3), ValueError, "group_size=3 scales (4, 2) (4, 3)"),
    (lambda: leaf(group_size=0), ValueError, "group_size=0 scales"),
    (lambda: leaf(lut=leaf().lut[:, :8]), ValueError, "lut (1, 8) (1, 16) (4, 16)"),
    (lambda: leaf(lut=leaf().lut.repeat(3, axis=0)), ValueError, "lut (3, 16)"),
    (lambda: leaf(scales=leaf().scales[:2]), ValueError, "scales (2, 2) (4, 2)"),
    (lambda: leaf(offsets=leaf().scales[:, :1]), ValueError, "offsets (4, 1) (4, 2)"),
    (
        lambda: weights.Slice(dataclasses.replace(stack(), scales=leaf().scales), jnp.int32(0)),
        ValueError,
        "scales (4, 2)",
    ),
]


@pytest.mark.parametrize("make,error,words", LEAVES)
def test_a_leaf_that_contradicts_itself_is_refused_by_every_product(make, error, words: str) -> None:
    x = jnp.ones((2, 16 if "of 2 bits" in words else 8))
    for call in (
        lambda: matmul(x, make()),
        lambda: jax.jit(matmul)(x, make()),
        lambda: matmul_each(x, [make(), make()]),
        lambda: explain(x, make()),
    ):
        check(call, error, f"QuantizedTensor from_codes {words}")


INDICES = [
    (2, ValueError, "index 2 stack of 2 0 to 1"), (-1, ValueError, "index -1 stack of 2"),
    (np.int32(5), ValueError, "index 5"), (jnp.int32(-1), ValueError, "index -1"), (1.0, TypeError, "1.0 integer"),
    (True, TypeError, "True integer"), ("1", TypeError, "'1' integer"), (np.array([0, 1]), TypeError, "integer"),
]  # fmt: skip


@pytest.mark.parametrize("index,error,words", INDICES)
def test_an_index_outside_of_a_stack_is_refused(index, error, words: str) -> None:
    check(lambda: take(stack(), index), error, words)
    check(lambda: take({"a": stack(), "b": jnp.ones(2)}, index), error, words)
    check(lambda: take(take(jax.tree.map(lambda a: a[None], stack()), 0), index), error, words)


def test_an_index_that_is_traced_is_clipped() -> None:
    held = stack()
    same = jax.jit(lambda i: dequantize(take(held, i)))
    np.testing.assert_array_equal(same(7), same(1))
    check(lambda: take(leaf(), 0), ValueError, "[L, N, K] single matrix")


EXPLAINED = [
    (lambda: explain(None), ValueError, "without dense layers NoneType"),
    (lambda: explain(None, leaf()), TypeError, "NoneType ShapeDtypeStruct"),
    (lambda: explain(X, leaf(), "foo"), ValueError, "platform='foo' 'cpu'"),
    (lambda: explain({"d": {"kernel": W}}, platform="foo"), ValueError, "platform='foo' 'cpu'"),
    (lambda: explain({"d": {"kernel": W}}, rows=0), ValueError, "rows=0 at least 1"),
    (lambda: explain({"d": {"kernel": W}}, rows=-1), ValueError, "rows=-1 at least 1"),
    (lambda: explain({"d": {"kernel": W}}, rows=1.5), ValueError, "rows=1.5 integer"),
]
PRODUCTS = [
    (lambda: matmul(X[:, :7], quantize(W, NF4())), ValueError, "(2, 7) (4, 8) must end in K=8"),
    (lambda: matmul(X.astype(int), quantize(W, NF4())), TypeError, "int32 floating convert"),
    (lambda: matmul(X, jnp.ones((2, 4, 8))), ValueError, "(2, 4, 8) [N, K] jax.vmap"),
    (lambda: matmul(X, quantize(W, NF4()), backend="magic"), ValueError, "backend='magic' 'xla' pass"),
    (lambda: Any4Linear.of(jnp.ones(4)), ValueError, "(4,) [N, K] reshape"),
    (lambda: Any4Linear.of(jnp.ones((2, 4, 8)))(X), ValueError, "(2, 4, 8) [N, K] jax.vmap"),
]


@pytest.mark.parametrize("call,error,words", PRODUCTS + EXPLAINED)
def test_refused_in_one_sentence(call, error: type[Exception], words: str) -> None:
    check(call, error, words)
