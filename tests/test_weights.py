"""Weights: the dequantization law in numpy, honest sizes, operators over stacks, partition and combine."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_weights import entries

from any4_jax import packing, weights
from any4_jax.partition import combine, partition
from any4_jax.product import matmul
from any4_jax.weights import (
    LowRank,
    PermuteInput,
    QuantizedTensor,
    QuantizeInput,
    ScaleInput,
    Sum,
)

dequantize = jax.jit(weights.dequantize, static_argnums=1)

N, K, G = 5, 13, 4
GROUPS = 4


def leaf(bits: int, rng: np.random.Generator, *, shared=False, offsets=True, dtype=jnp.bfloat16) -> QuantizedTensor:
    """Random codes and tables [N, K] with a short last group."""
    return weights.from_codes(
        jnp.asarray(rng.integers(0, 2**bits, (N, K), dtype=np.uint8)),
        jnp.asarray(np.sort(rng.normal(size=(1 if shared else N, 2**bits)), axis=1), dtype),
        jnp.asarray(rng.uniform(0.5, 2.0, (N, GROUPS)), dtype),
        jnp.asarray(rng.normal(size=(N, GROUPS)), dtype) if offsets else None,
        bits=bits,
        group_size=G,
    )


def law(w: QuantizedTensor) -> np.ndarray:
    """W[n, k] = lut[n or 0, codes[n, k]] * scales[n, k // G] + offsets[n, k // G], entry by entry in float64."""
    codes, lut = np.asarray(w.unpacked_codes()), np.asarray(w.lut, np.float64)
    scales = np.asarray(w.scales, np.float64)
    offsets = np.zeros_like(scales) if w.offsets is None else np.asarray(w.offsets, np.float64)
    out = np.empty(w.shape)
    for n, k in np.ndindex(*w.shape):
        table = lut[n] if len(lut) > 1 else lut[0]
        out[n, k] = table[codes[n, k]] * scales[n, k // w.group_size] + offsets[n, k // w.group_size]
    return out


@pytest.mark.parametrize("bits", packing.PLANES)
@pytest.mark.parametrize("shared,offsets", [(False, True), (True, False)])
def test_dequantize_is_the_law(bits: int, shared: bool, offsets: bool, rng: np.random.Generator) -> None:
    w = leaf(bits, rng, shared=shared, offsets=offsets)
    assert w.shape == (N, K)
    np.testing.assert_allclose(dequantize(w), law(w), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(dequantize(w, jnp.bfloat16), dequantize(w).astype(jnp.bfloat16))


@pytest.mark.parametrize("bits", packing.PLANES)
def test_bits_per_weight_counts_what_is_stored(bits: int, rng: np.random.Generator) -> None:
    """Aligned K: code bits, one bf16 scale and offset a group, one bf16 table a row, and nothing else."""
    n, k, g = 3, 64, 16
    w = weights.from_codes(
        jnp.zeros((n, k), jnp.uint8),
        jnp.zeros((n, 2**bits), jnp.bfloat16),
        jnp.ones((n, k // g), jnp.bfloat16),
        jnp.ones((n, k // g), jnp.bfloat16),
        bits=bits,
        group_size=g,
    )
    assert w.bits_per_weight == bits + 32 / g + 16 * 2**bits / k
    assert w.nbytes == sum(a.nbytes for a in jax.tree.leaves(w))
    abstract = jax.eval_shape(lambda: w)
    assert (abstract.shape, abstract.nbytes) == (w.shape, w.nbytes)


def test_a_table_of_int8(rng: np.random.Generator) -> None:
    """It follows the law as it is stored, takes half the bytes, and no gradient or optimiser sees it."""
    plain = leaf(4, rng)
    table = np.sort(rng.integers(-127, 128, (N, 16)), axis=1)
    w = dataclasses.replace(plain, lut=jnp.asarray(table, jnp.int8))
    np.testing.assert_allclose(dequantize(w), law(w), rtol=1e-6, atol=1e-6)
    assert w.nbytes == plain.nbytes - plain.lut.nbytes // 2
    tables, codes = partition(w)
    assert tables.lut is None and codes.lut is w.lut and tables.scales is w.scales
    assert [place.trained for place, _ in weights.places(w)] == ["floats", None, "tables", "tables"]
    w.check()
    for dtype in (jnp.uint8, jnp.int16):
        with pytest.raises(TypeError, match=f"lut of dtype {jnp.dtype(dtype)}, need a floating dtype or int8"):
            dataclasses.replace(w, lut=w.lut.astype(dtype)).check()


def test_doubly_quantized_scales(rng: np.random.Generator) -> None:
    scales = rng.uniform(0.5, 2.0, (N, GROUPS)).astype(np.float32)
    inner = weights.encode(
        jnp.asarray(scales),
        jnp.asarray([np.linspace(0, 1, 256)], jnp.float32),
        jnp.asarray(scales.max(axis=1, keepdims=True)),
        None,
        bits=8,
        group_size=GROUPS,
    )
    plain = leaf(4, rng, dtype=jnp.float32)
    nested = dataclasses.replace(plain, scales=inner, offsets=None)
    flat = dataclasses.replace(plain, scales=dequantize(inner), offsets=None)
    np.testing.assert_array_equal(dequantize(nested), dequantize(flat))
    assert nested.nbytes == plain.codes.nbytes + plain.lut.nbytes + inner.nbytes


def test_e8m0_scales(rng: np.random.Generator) -> None:
    exponents = rng.integers(100, 150, (N, GROUPS), dtype=np.uint8)
    plain = leaf(4, rng, offsets=False)
    w = dataclasses.replace(plain, scales=jnp.asarray(exponents))
    flat = dataclasses.replace(plain, scales=jnp.asarray(2.0 ** (exponents.astype(np.float32) - 127)))
    np.testing.assert_array_equal(dequantize(w), dequantize(flat))


def operators(rng: np.random.Generator) -> dict:
    """Every operator, and the dense matrix that it stands for."""
    a, b = leaf(4, rng), leaf(1, rng, shared=True, offsets=False)
    scale = jnp.asarray(rng.uniform(0.5, 2, K), jnp.float32)
    permutation = jnp.asarray(rng.permutation(K), jnp.int32)
    down, up = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, K), (N, 2)))
    update = 0.25 * np.asarray(up, np.float64) @ np.asarray(down, np.float64)
    pair = LowRank(down, up, jnp.float32(0.25))
    scattered = np.empty((N, K))
    scattered[:, np.asarray(permutation)] = law(a)
    few = np.zeros((N, K))
    places = [(0, 0, 0.0), (1, 2, 0.5), (1, 2, 0.25), (4, 12, -3.0)]
    for row, column, value in places:
        few[row, column] += value
    sparse = entries(*zip(*places, strict=True), N, K, padding=2)
    return {
        "Sum": (Sum((a, b)), law(a) + law(b)),
        "Sparse": (sparse, few),
        "ScaleInput": (ScaleInput(a, scale), law(a) * np.asarray(scale)),
        "PermuteInput": (PermuteInput(a, permutation), scattered),
        "QuantizeInput": (QuantizeInput(a, None, 8, True, "token"), law(a)),
        "LowRank": (pair, update),
        "nested": (ScaleInput(Sum((a, b, pair, sparse)), scale), (law(a) + law(b) + update + few) * np.asarray(scale)),
    }


OPERATORS = ("Sum", "Sparse", "ScaleInput", "PermuteInput", "QuantizeInput", "LowRank", "nested")


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_stand_for_their_matrix(name: str, rng: np.random.Generator) -> None:
    operator, dense = operators(rng)[name]
    assert operator.shape == (N, K)
    np.testing.assert_allclose(dequantize(operator), dense, rtol=1e-5, atol=1e-6)
    assert operator.nbytes == sum(array.nbytes for array in jax.tree.leaves(operator))
    assert operator.bits_per_weight == 8 * operator.nbytes / (N * K)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_stack_of_as_many_layers_as_rows(name: str) -> None:
    """Leading axes are layers, also where a layer's count equals N and a wrong broadcast would go unnoticed."""
    layers = [operators(np.random.default_rng(seed))[name][0] for seed in range(N)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    assert stacked.shape == (N, N, K)
    each = jnp.stack([dequantize(layer) for layer in layers])
    np.testing.assert_array_equal(dequantize(stacked), each)


def test_few_entries_are_kept_by_rows_and_split_with_them(rng: np.random.Generator) -> None:
    dense = np.where(rng.uniform(size=(24, K)) < 0.1, rng.normal(size=(24, K)), 0).astype(np.float32)
    dense[:6] = 0
    w = weights.nonzeros(jnp.asarray(dense), jnp.float32)
    np.testing.assert_array_equal(dequantize(w), dense)
    fullest = (dense.reshape(8, -1) != 0).sum(axis=1).max()
    assert w.values.shape == w.columns.shape == (8, fullest) and w.ends.shape == (24,)
    assert {w.ends.dtype, w.columns.dtype} == {np.dtype(np.uint16)}
    half = weights.Sparse(w.ends[12:], w.columns[4:], w.values[4:], K)
    np.testing.assert_array_equal(dequantize(half), dense[12:])
    untrimmed = jax.jit(weights.nonzeros)(jnp.asarray(dense))
    assert untrimmed.values.shape == (8, 3 * K) and untrimmed.values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dequantize(untrimmed), dequantize(weights.trimmed(untrimmed)))
    assert weights.nonzeros(jnp.zeros((5, K))).nbytes == 2 * 5


def test_a_transposed_leaf_has_its_groups_along_the_columns(rng: np.random.Generator) -> None:
    a = leaf(3, rng)
    turned = weights.Transposed(a)
    assert turned.shape == (K, N)
    np.testing.assert_array_equal(dequantize(turned), dequantize(a).T)
    x = jnp.asarray(rng.normal(size=(2, N)), jnp.float32)
    np.testing.assert_allclose(matmul(x, turned), x @ dequantize(a), rtol=1e-5, atol=1e-5)
    axes = {place.name: place.axes for place, _ in weights.places(turned)}
    assert axes["inner/scales"] == "*KN" and axes["inner/lut"] == "*K."


def test_places_name_axes_in_terms_of_the_whole_matrix(rng: np.random.Generator) -> None:
    a = leaf(3, rng)
    stack = jax.tree.map(lambda array: jnp.stack([array, array]), a)
    w = Sum(
        (a, ScaleInput(weights.take(stack, 1), jnp.ones(K)), LowRank(jnp.ones((2, K)), jnp.ones((N, 2)), jnp.ones(())))
    )
    found = [(place.name, place.axes, place.trained) for place, _ in weights.places(w)]
    assert found[:3] == [
        ("terms/0/codes/0", "*NK", "floats"),
        ("terms/0/codes/1", "*NK", "floats"),
        ("terms/0/lut", "*N.", "tables"),
    ]
    assert ("terms/1/inner/stack/lut", ".*N.", "tables") in found and ("terms/1/scale", "*K", "floats") in found
    assert found[-3:] == [("terms/2/a", "*.K", "lora"), ("terms/2/b", "*N.", "lora"), ("terms/2/scale", "*", None)]
    assert len(found) == len(jax.tree.leaves(w))
    assert [type(part) for part in weights.parts(w)] == [
        Sum,
        QuantizedTensor,
        ScaleInput,
        weights.Slice,
        QuantizedTensor,
        LowRank,
    ]


def test_partition_splits_by_dtype_and_combine_restores(rng: np.random.Generator) -> None:
    tree = {name: operator for name, (operator, _) in operators(rng).items()}
    tables, codes = partition(tree)
    assert all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(tables))
    assert all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(codes))
    back = combine(tables, codes)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert ours is theirs


def test_partition_by_a_mask_and_combine_restores(rng: np.random.Generator) -> None:
    tree = {"low": LowRank(jnp.ones((2, K)), jnp.ones((N, 2)), jnp.ones(())), "leaf": leaf(3, rng)}
    mask = jax.tree.map(lambda _: False, tree)
    mask["low"] = dataclasses.replace(mask["low"], b=True)
    chosen, rest = partition(tree, mask)
    assert [array is tree["low"].b for array in jax.tree.leaves(chosen)] == [True]
    assert len(jax.tree.leaves(rest)) == len(jax.tree.leaves(tree)) - 1 and rest["low"].b is None
    back = combine(chosen, rest)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert all(x is y for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True))
    with pytest.raises(ValueError, match="leaf"):
        partition(tree, {"leaf": mask["leaf"]})


def test_adam_trains_the_tables_half(rng: np.random.Generator) -> None:
    w = leaf(4, rng, dtype=jnp.float32)
    target = jnp.asarray(rng.normal(size=(N, K)), jnp.float32)
    x = jnp.eye(K)
    tables, codes = partition(w)
    optimizer = optax.adam(0.03)

    @jax.jit
    def step(tables, state):
        def loss(tables):
            return ((matmul(x, combine(tables, codes)) - target.T) ** 2).mean()

        value, slope = jax.value_and_grad(loss)(tables)
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(tables, updates), state, value

    state = optimizer.init(tables)
    losses = []
    for _ in range(30):
        tables, state, value = step(tables, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    np.testing.assert_array_equal(combine(tables, codes).codes, w.codes)


def test_int4_eye_in_bf16_is_exact() -> None:
    """scale 1/15 rounds to 0.0669, 7 * scale + 8 * scale = 1.0034 rounds to 1 in one rounding."""
    lut = jnp.arange(-8.0, 8.0, dtype=jnp.bfloat16)[None]
    scales, offsets = jnp.full((1, 1), 1 / 15, jnp.bfloat16), jnp.full((1, 1), 8 / 15, jnp.bfloat16)
    w = weights.encode(jnp.array([[1.0, 0.0]]), lut, scales, offsets, bits=4, group_size=2, uniform=True)
    assert dequantize(w, jnp.bfloat16).tolist() == [[1.0, 0.0]]


def test_what_is_no_operator_is_refused() -> None:
    with pytest.raises(TypeError, match="got a list, need an array or an operator"):
        weights.dequantize([1.0])
