"""Products with sums of binary planes: by tables on every instruction set, decoded, and as the plan chooses."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from binary_weights import check, planes, rows

from any4_jax import weights
from any4_jax.methods import NF4, Int, quantize
from any4_jax.partition import combine, partition
from any4_jax.product import explain, matmul, matmul_each
from any4_jax.weights import Sum, binary_planes, bit_planes, take
from cuda_ffi import registration
from cuda_ffi.binary_product import TARGET, binary_products
from cuda_ffi.lut_product import Matrix

why_not = registration.why_not("cpu")
native = pytest.mark.skipif(why_not is not None, reason=str(why_not))
TAKEN = {
    "tables": "cpu: taken (codes look up sums of inputs in tables, which takes fewer operations than to decode them)",
    "rows": "cpu: taken (codes are decoded: x has 11 rows, for 3 planes tables are faster up to 10)",
    "groups": "cpu: taken (codes are decoded: groups have 16 inputs, tables take multiples of 32, or the whole row)",
}


@functools.partial(jax.jit, static_argnames=("tables", "isa"))
def products(inputs: list[jax.Array], w: Sum, tables: bool, isa: str) -> list[jax.Array]:
    """A product for each input, in one program."""
    matrices = [Matrix((p.codes,), p.lut, p.scales, p.offsets) for p in w.terms]
    group_size = w.terms[0].group_size
    return [binary_products(x, [matrices], group_size=group_size, tables=tables, isa=isa)[0] for x in inputs]


@native
@pytest.mark.parametrize(
    "w",
    [
        # Rows of bits that end within a word and a byte, more rows than are looked up at a time, a short last group.
        planes(70, 301, g=32, offsets=True),
        planes(5, 301, g=301, table=None),
        planes(131, 384, g=128, table=((0.5, 2.0),)),
        planes(1, 7, g=64, count=1, offsets=True),
    ],
    ids=["words", "rows", "tiles", "one"],
)
def test_tables_and_decoding_give_the_product(isa: str, w: Sum) -> None:
    inputs = [rows(1, w.shape[1]), rows(11, w.shape[1]), rows(2, w.shape[1], dtype=jnp.bfloat16)]
    for tables in (True, False):
        for x, y in zip(inputs, products(inputs, w, tables, isa), strict=True):
            check(y, x, w)


@native
def test_groups_that_end_within_a_word_are_decoded(isa: str) -> None:
    w = planes(9, 60, g=7, offsets=True)
    inputs = [rows(1, 60), rows(5, 60)]
    for x, y in zip(inputs, products(inputs, w, False, isa), strict=True):
        check(y, x, w)
    with pytest.raises(Exception, match="got group_size=7, need a multiple of 32 for tables, or K"):
        jax.block_until_ready(products(inputs, w, True, isa))


@native
def test_sums_of_integers_are_exact_and_odd_in_x(isa: str) -> None:
    """With integers and scales that are powers of two nothing is rounded; opposite patterns have opposite sums."""
    w = planes(40, 200, g=64)
    whole, real = jnp.round(rows(1, 200) * 8), rows(1, 200)
    exact, there, back = products([whole, real, -real], w, True, isa)
    np.testing.assert_array_equal(exact, np.asarray(whole) @ np.asarray(weights.dequantize(w)).T)
    np.testing.assert_array_equal(there, -back)


@native
def test_the_plan_says_what_it_takes() -> None:
    w, sixteens = planes(24, 96, g=32), planes(24, 96, g=16)
    for x, weight, reason in ((rows(1, 96), w, "tables"), (rows(11, 96), w, "rows"), (rows(1, 96), sixteens, "groups")):
        assert explain(x, weight, "cpu").splitlines()[2:] == [TAKEN[reason], "xla: could, but 'cpu' comes first"]
        y = jax.jit(matmul)(x, weight)
        check(y, x, weight)
        np.testing.assert_allclose(y, matmul(x, weight, "xla"), rtol=1e-4, atol=1e-4)
    text = jax.jit(matmul).lower(rows(1, 96), w).compile().as_text()
    assert text.count(f'custom_call_target="{TARGET}"') == 1 and "f32[24,96]" not in text
    assert explain(rows(1, 96), take(jax.tree.map(lambda a: a[None], w), 0), "cpu").splitlines()[2] == TAKEN["tables"]


@native
def test_sums_share_a_call_a_stack_and_a_batch() -> None:
    w, other, x = planes(24, 96, g=32), planes(7, 96, g=32), rows(2, 96)
    assert jax.jit(matmul_each).lower(x, (w, other)).as_text().count(f"@{TARGET}(") == 1
    for y, one in zip(matmul_each(x, (w, other)), (w, other), strict=True):
        np.testing.assert_array_equal(y, matmul(x, one))
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), w)
    np.testing.assert_array_equal(matmul(x, take(stack, 1)), matmul(x, w))
    np.testing.assert_array_equal(jax.vmap(matmul, (None, 0))(x, stack)[1], matmul(x, w))


@native
def test_gradients_equal_those_of_xla() -> None:
    w, x = planes(10, 64, g=32, offsets=True), rows(3, 64)
    tables, codes = partition(w)

    def loss(x, t, backend):
        return jnp.sin(matmul(x, combine(t, codes), backend)).sum()

    ours, theirs = (jax.grad(loss, (0, 1))(x, tables, backend) for backend in ("cpu", "xla"))
    assert len(jax.tree.leaves(ours)) > 4
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-2, atol=1e-2)


def test_elsewhere_the_planes_are_decoded_into_one_matrix() -> None:
    """One product of the sum, not one for each plane."""
    w, x = planes(24, 96, g=32), rows(3, 96)
    assert explain(x, w, "tpu").splitlines()[-1] == "xla: taken"
    text = jax.jit(lambda x, w: matmul(x, w, "xla")).lower(x, w).as_text()
    assert text.count("stablehlo.dot_general") == 1
    mixed = Sum((*w.terms, rows(24, 96)))
    assert binary_planes(mixed) is None and binary_planes(Sum((w.terms[0], planes(24, 96, g=16).terms[0]))) is None
    np.testing.assert_allclose(matmul(x, mixed), matmul(x, w) + x @ rows(24, 96).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [Int(bits=3, group_size=16), Int(bits=2, symmetric=True, group_size=16)], ids=repr)
def test_integers_are_sums_of_binary_planes(method: Int) -> None:
    """The planes of the bits are the same matrix, to the last bit."""
    w = quantize(rows(6, 40), method)
    split = bit_planes(w)
    assert binary_planes(split) == split.terms and len(split.terms) == method.bits
    np.testing.assert_array_equal(weights.dequantize(split), weights.dequantize(w))


def test_only_a_ramp_has_bit_planes() -> None:
    with pytest.raises(ValueError, match="got a weight with a table that is no ramp, need integers with plain scales"):
        bit_planes(quantize(rows(4, 32), NF4()))
