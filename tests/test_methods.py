"""The method contract: a table of methods and options, each held to the same laws."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same
from method_table import BINARY, EVERY, FIXED, LEARNED, ROWS_SHARE, SPARSE, K, N, dequantize, layer, run, stats

from any4_jax import scaling
from any4_jax.methods import CATALOGUE, MX4, NF4, Any4, Int, Method, quantize
from any4_jax.methods.base import scope_of
from any4_jax.methods.spec import method_from_json, method_to_json
from any4_jax.weights import is_operator

METHODS = [pytest.param(m, id=f"{m.name}-{i}") for i, m in enumerate(EVERY)]
contract = pytest.mark.parametrize("method", METHODS)
of_rows = pytest.mark.parametrize("method", [each for each in METHODS if each.values[0] not in ROWS_SHARE])


@contract
def test_shapes_dtypes_and_size(method) -> None:
    whole = run(layer(), method)
    q, method = leaf(whole), getattr(method, "inner", method)
    group_size = min(getattr(method, "group_size", K), K)
    bits = 1 if method in BINARY else getattr(method, "bits", 4)
    assert len(leaves(whole)) == (method.bits if method in BINARY else 1)
    assert q.shape == (N, K) and q.bits == bits and q.group_size == group_size
    assert q.lut.shape == ((N if getattr(method, "per_row", True) and method in LEARNED else 1), 2**bits)
    table_dtype = getattr(method, "stored_table_dtype", getattr(method, "table_dtype", "bfloat16"))
    table_dtype = getattr(method, "stored_table_dtype", getattr(method, "table_dtype", "bfloat16"))
    scales = (q.scales.inner if is_operator(q.scales) else q).scales
    assert q.lut.dtype == table_dtype and scales.dtype == method.scale_dtype
    assert q.scales.shape == (N, -(-K // group_size))
    assert (np.diff(np.asarray(q.lut, np.float32), axis=1) >= 0).all()
    assert int(q.unpacked_codes().max()) < 2**bits
    assert np.isfinite(dequantize(whole)).all()
    assert whole.bits_per_weight == 8 * sum(a.nbytes for a in jax.tree.leaves(whole)) / (N * K)


@contract
def test_two_runs_give_the_same_bits(method) -> None:
    assert_same(run(layer(), method), run(layer(), method))


@of_rows
def test_row_order_changes_no_bit(method) -> None:
    order = np.random.default_rng(1).permutation(N)
    straight, shuffled = run(layer(), method), run(layer()[order], method)
    if method in SPARSE:  # whose entries lie in blocks of rows
        straight, shuffled = dequantize(straight), dequantize(shuffled)
    rows = jax.tree.map(lambda a: a[order] if a.shape[:1] == (N,) else a, straight)
    assert_same(shuffled, rows)


# Those of the widest and the narrowest range of exponents; the others store bfloat16.
STORED = [
    Int(group_size=16, scale_dtype="float32"),
    NF4(group_size=16, scale_dtype="float16"),
    Any4(group_size=16, scale_dtype="float16"),
    Any4(bits=3, group_size=None, table_dtype="float16"),
    Any4(bits=2, group_size=None, per_row=False, solver="lloyd", max_iter=9),
]
SCALED = [*METHODS, *(pytest.param(m, id=f"{m.name}-{m.scale_dtype}-{i}") for i, m in enumerate(STORED))]
POWERS = (-120, -60, -20, -6, 9, 20, 60, 100)
"""By k: weights of 2^k."""
UNHELD = {-1: r"would be too small for float16; pass \w+='bfloat16' or", 1: "would be too large for float16; pass"}


@pytest.mark.parametrize("method", SCALED)
def test_powers_of_two_scale_the_matrix_exactly(method) -> None:
    """Codes stay, and scales and offsets (tables where there is no scaling) take the power: in all of float32 where the
    stored dtype can hold them. Where it can't, that is said."""
    # One row and one group are smaller than the others, and one group is constant.
    w = np.random.default_rng(5).standard_t(3, (N, K)).astype(np.float32) * 4
    w += np.sign(w)
    w[3], w[4, :16], w[6, 16:32] = w[3] * 2.0**-4, w[4, :16] * 2.0**-4, 0.75
    coded = getattr(method, "inner", method)
    grouped = getattr(coded, "group_size", 16) is not None
    narrow = (coded.scale_dtype if grouped else coded.table_dtype) == "float16"
    plain = leaves(run(w, method))
    for power in POWERS:
        factor = np.float32(2.0**power)
        if narrow and abs(power) > 9:
            with pytest.raises(ValueError, match=f"a.b: .*{UNHELD[int(np.sign(power))]}"):
                run(w * factor, method, path="a.b")
            continue
        try:
            scaled = leaves(run(w * factor, method))
        except ValueError as error:
            # Steps of 1/255 of a small group, scales of integers and of later planes, and offsets close to zero leave
            # the range before the weights do.
            early = plain[0].offsets is not None or plain[0].lut.dtype == jnp.int8 or len(plain) > 1
            assert power == POWERS[0] and early, error
            assert re.search(
                "(scales|offsets) would be too small for (bfloat16|float32); scale the weights", str(error)
            )
            continue
        assert_same(*([(q.codes, q.lut if grouped else q.scales) for q in each] for each in (scaled, plain)))
        values = [
            [values_of(stored, grouped) for q in each for stored in (q.scales if grouped else q.lut, q.offsets)]
            for each in (plain, scaled)
        ]
        for ours, theirs in zip(*values, strict=True):
            np.testing.assert_array_equal(theirs, None if ours is None else ours * factor, err_msg=str(power))


def leaf(q):
    """The coded matrix of a result, or the first of several."""
    return leaves(q)[0]


def leaves(q):
    """The coded matrices of a result, whose input may be permuted, scaled or rounded, and which may have outliers."""
    if hasattr(q, "inner"):
        return leaves(q.inner)
    if hasattr(q, "terms"):
        return [one for term in q.terms for one in leaves(term)]
    return [q] if hasattr(q, "lut") else []


def values_of(stored, grouped: bool):
    if stored is None:
        return None
    if is_operator(stored):
        return np.asarray(dequantize(stored))
    return np.asarray(scaling.scale_values(stored) if grouped else stored, np.float32)


LOST = [
    (
        Int(symmetric=True),
        2.0**-125,
        "scales would be too small for bfloat16; scale the weights",
    ),
    (Int(scale_dtype="float32"), 2.0**-125, "scales would be too small for float32; scale the weights by a power"),
    (MX4(), 2.0**-125, "scales would be too small for e8m0; scale the weights by a power of two"),
    (
        Any4(bits=2, group_size=16),
        2.0**-126,
        "too small for bfloat16; scale the weights",
    ),
    (NF4(scale_dtype="float16"), 2.0**-18, "scales would be too small for float16; pass scale_dtype='bfloat16' or"),
    (
        Any4(bits=2, group_size=16, scale_dtype="float16", table_dtype="int8"),
        2.0**-10,
        "scales would be too small for float16; pass scale_dtype='bfloat16' or",
    ),
    (NF4(scale_dtype="float16"), 2.0**16, "scales would be too large for float16; pass scale_dtype='bfloat16' or"),
    (
        Any4(bits=2, group_size=None, table_dtype="float16"),
        2.0**-24,
        "table would be too small for float16; pass table_dtype=",
    ),
    (
        Any4(bits=2, group_size=None, table_dtype="float16"),
        2.0**16,
        "table would be too large for float16; pass table_dtype=",
    ),
]


@pytest.mark.parametrize("method,size,words", LOST, ids=lambda each: str(each)[:24])
def test_what_the_stored_dtype_cannot_hold_is_said(method, size: float, words: str) -> None:
    w = np.random.default_rng(5).uniform(1, 1.5, (4, 32)).astype(np.float32) * np.sign(np.arange(32) - 15.5)
    for rows in (w, w * np.array([[1.0], [0], [0], [0]], np.float32)):
        with pytest.raises(ValueError, match=f"a.b: its .*{words}"):
            quantize(jnp.asarray(rows * np.float32(size), jnp.float32), method, path="a.b")


def test_a_group_that_is_lost_beside_a_large_one_is_said() -> None:
    w = np.ones((2, 32), np.float32) * np.sign(np.arange(32) % 2 - 0.5)
    w[1, :16] *= 2.0**-14
    for method in (NF4(group_size=16, scale_dtype="float16"), Any4(bits=2, group_size=16, scale_dtype="float16")):
        with pytest.raises(ValueError, match="scales would be too small for float16"):
            quantize(jnp.asarray(w * 2.0**-2), method)
    assert np.isfinite(np.asarray(dequantize(quantize(jnp.asarray(w * 2.0**-2), NF4(group_size=16))))).all()


def test_weights_at_the_ends_of_float32_are_finite() -> None:
    w = np.random.default_rng(5).uniform(0.5, 1, (4, 32)).astype(np.float32) * np.sign(np.arange(32) - 15.5)
    for size in (2.5e38, 2.0**-100):
        for method in (Int(), Int(symmetric=True), NF4(), MX4(), Any4(bits=2, group_size=16)):
            back = np.asarray(dequantize(run_without_stats(w * np.float32(size), method)), np.float64) / size
            assert np.isfinite(back).all() and np.abs(back - w).max() < 0.4, method


@of_rows
def test_zero_and_constant_rows_and_groups(method) -> None:
    w, q = layer(), run(layer(), method)
    back = np.asarray(dequantize(q))
    # Groups that are scaled as they come hold what compensates the errors of others.
    group_size = leaf(q).group_size
    zeros = 16 // group_size * group_size * getattr(method, "static_groups", method not in SPARSE)
    assert not back[2].any() and not back[7, :zeros].any()
    # A row that is constant is none once its inputs are scaled; that is nothing to groups of one weight.
    constant = scope_of(method) == "matrix" or group_size == 1
    method = getattr(method, "inner", method)
    if constant and getattr(method, "per_row", True):
        np.testing.assert_allclose(back[5], w[5], rtol=0.35 if isinstance(method, MX4) else 0.02)


@pytest.mark.parametrize("method", [Int(group_size=16), NF4(group_size=16), MX4()], ids=repr)
def test_a_transposed_kernel_is_the_same_layer(method) -> None:
    kernel = jnp.asarray(layer().T)
    assert_same(quantize(kernel, method, stats(), transposed=True), run(layer(), method))


# MX4's "round" moves 4 * 2^e * 1.5 = 6 * 2^e up a binade, so that its own output isn't on the next grid.
@pytest.mark.parametrize("method", [m for m in FIXED if m != MX4()], ids=repr)
def test_weights_on_the_grid_come_back(method) -> None:
    """What a method makes of random weights is on its grid; a second pass finds the same matrix."""
    exact = {"table_dtype": "float32"} | ({} if isinstance(method, MX4) else {"scale_dtype": "float32"})
    method = dataclasses.replace(method, **exact)
    once = np.asarray(dequantize(run(layer(), method)))
    twice = np.asarray(dequantize(run(once, method)))
    np.testing.assert_allclose(twice, once, rtol=2e-6, atol=2e-6)


def run_without_stats(w: np.ndarray, method: Method):
    return quantize(jnp.asarray(w), method)


@pytest.mark.parametrize("method", [Int(zero_point="float"), NF4(), Int(symmetric=True)], ids=repr)
def test_codes_suit_the_stored_scales(method) -> None:
    """No other code under the stored table, scale and offset is closer to the weight."""
    w = layer()
    q = run(w, method)
    chosen = np.abs(np.asarray(dequantize(q)) - w)
    lut = np.broadcast_to(np.asarray(q.lut, np.float32), (N, 16))
    scales, offsets = np.asarray(q.scales, np.float32), 0.0
    if q.offsets is not None:
        offsets = np.asarray(q.offsets, np.float32)[:, :1, None]
    every = lut[:, None, :] * scales[:, :1, None] + offsets
    best = np.abs(every - w[:, :, None]).min(axis=2)
    np.testing.assert_allclose(chosen, best, rtol=1e-5, atol=1e-6)


def test_more_bits_and_smaller_groups_are_closer() -> None:
    w = layer()

    def error(method):
        return float(((np.asarray(dequantize(run_without_stats(w, method))) - w) ** 2).sum())

    by_bits = [error(Int(bits=bits)) for bits in (2, 3, 4, 5, 6, 8)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert error(NF4(group_size=8)) < error(NF4(group_size=20)) < error(NF4())


def test_the_catalogue_names_each_method_once() -> None:
    assert {cls.name for cls in CATALOGUE.values()} == set(CATALOGUE)
    for cls in CATALOGUE.values():
        method = cls()
        assert isinstance(method, Method)
        assert method_from_json(method_to_json(method)) == method and hash(method) == hash(cls())
        fields = [getattr(method, field.name) for field in dataclasses.fields(cls)]
        assert all(isinstance(v, (int, float, str, bool, type(None), Method)) for v in fields)
