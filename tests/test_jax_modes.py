"""JAX's own modes: the library works under each, and products are differentiated in every way."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_weights import INTEGERS, NAMES, dequantize, operator, rows

import any4_jax as a4
from any4_jax import statistics
from any4_jax.methods import FPQ, NF4, Any4, Int, SmoothQuant
from any4_jax.methods.apply import apply_site
from any4_jax.methods.base import SiteWeights
from any4_jax.methods.tune_leaf import Start, at_rest
from any4_jax.models.tiny import random_llama
from any4_jax.partition import combine, partition
from any4_jax.product import lookup, matmul, matmul_each

MODES = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "debug nans": lambda: jax.debug_nans(True),
    "x64": lambda: jax.enable_x64(True),
}
SYMBOLIC = ("rank promotion", "strict dtypes")
"""Modes that refuse while tracing, so that nothing has to be compiled."""
METHODS = (NF4(group_size=8), Int(group_size=8), Any4(group_size=8, max_iter=2), Any4(bits=2, solver="gradient"))


@pytest.mark.parametrize("mode", SYMBOLIC)
def test_methods_are_traced(mode: str) -> None:
    w = jax.ShapeDtypeStruct((5, 20), jnp.float32)
    with MODES[mode]():
        for method in METHODS:
            q = jax.eval_shape(lambda w, method=method: a4.quantize(w, method), w)
            assert q.shape == (5, 20) and q.scales.dtype == jnp.bfloat16


@pytest.mark.parametrize("mode", ("strict dtypes", "x64"))
def test_methods_that_search_are_traced(mode: str) -> None:
    """No array that is stored or told becomes one of 64 bits."""
    site = SiteWeights({"": jax.ShapeDtypeStruct((5, 20), jnp.float32)})
    with MODES[mode]():
        for method in (FPQ(bits=8, input_bits=8, shift_rounding="nearest"), SmoothQuant(search=4)):
            seen = jax.eval_shape(
                lambda x, needs=method.needs: statistics.from_activations(x, statistics=needs),
                jax.ShapeDtypeStruct((9, 20), jnp.float32),
            )
            made = jax.eval_shape(lambda site, seen, m=method: apply_site(site, m, seen, ""), site, seen)
            assert all(leaf.dtype.itemsize <= 4 for leaf in jax.tree.leaves(made))


@pytest.mark.parametrize("mode", (*SYMBOLIC, "x64"))
def test_what_is_trained_of_a_leaf_is_traced(mode: str) -> None:
    leaf = operator("4 bits")
    with MODES[mode]():
        moves = at_rest(leaf, rounding=True)
        kernel = jax.ShapeDtypeStruct(leaf.shape[::-1], jnp.float32)
        slopes = jax.eval_shape(
            jax.grad(lambda moves, kernel: Start.of(leaf, kernel).matrix(moves).sum()), moves, kernel
        )
        assert {slope.dtype for slope in slopes.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("mode", MODES)
def test_a_matrix_is_quantized_to_the_same_bits(mode: str) -> None:
    w = jnp.asarray(np.random.default_rng(0).normal(size=(5, 20)), jnp.float32)
    expected = a4.quantize(w, METHODS[0])
    with MODES[mode]():
        q = a4.quantize(w, METHODS[0])
        for ours, theirs in zip(jax.tree.leaves(q), jax.tree.leaves(expected), strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        assert matmul(jnp.ones((3, 20), jnp.float32), q, backend="xla").dtype == jnp.float32
        assert "taken" in a4.explain(jnp.ones((3, 20), jnp.float32), q)


@pytest.mark.parametrize("mode", SYMBOLIC)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_and_lookups_of_every_operator_are_traced(mode: str, dtype: str) -> None:
    x, at = rows(3, dtype=jnp.dtype(dtype)), jnp.asarray([1, 0])
    with MODES[mode]():
        for w in (*map(operator, NAMES), INTEGERS):
            assert jax.eval_shape(lambda x, w: matmul(x, w), x, w).dtype == x.dtype
            if w is not INTEGERS:
                jax.eval_shape(lambda w: lookup(w, at), w)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_is_quantized_saved_loaded_and_generates(mode: str, tmp_path: Path) -> None:
    config = dataclasses.replace(random_llama().config, num_hidden_layers=1, attention_bias=True)
    prompts, settings = [[1, 2, 3], [4]], {"max_new_tokens": 2, "temperature": 0.5, "top_k": 9, "top_p": 0.9}
    expected = a4.quantize_model(random_llama(config), METHODS[0])
    with MODES[mode]():
        model = a4.quantize_model(random_llama(config), METHODS[0], rules=[("embed_tokens", METHODS[0])])
        a4.save(tmp_path / "saved", model)
        model = a4.load(tmp_path / "saved")
        tokens = a4.generate(model, prompts, **settings)
        assert len(tokens) == 2 and "taken" in a4.explain(model)
    for path, ours in a4.surgery.quantized_leaves(expected).items():
        for one, other in zip(
            jax.tree.leaves(ours), jax.tree.leaves(a4.surgery.quantized_leaves(model)[path]), strict=True
        ):
            np.testing.assert_array_equal(one, other)


def _of(function):
    """A nonlinear function of x and the float32 tables of a 4-bit leaf, by the product or by the dense matrix."""
    tables, codes = partition(jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, LEAF))
    return (lambda x, t: jnp.sin(function(x, combine(t, codes)))), tables


LEAF = operator("4 bits")
WAYS = {
    "jacfwd": lambda f, x, t: jax.jacfwd(f, (0, 1))(x, t),
    "jacrev": lambda f, x, t: jax.jacrev(f, (0, 1))(x, t),
    "hessian": lambda f, x, t: jax.hessian(lambda x, t: f(x, t).sum(), (0, 1))(x, t),
    "jvp": lambda f, x, t: jax.jvp(f, (x, t), (x, t))[1],
    "linearize": lambda f, x, t: jax.linearize(f, x, t)[1](x, t),
    "grad of a grad": lambda f, x, t: jax.grad(lambda x: jax.grad(lambda x: f(x, t).sum())(x).sum())(x),
}


@pytest.mark.parametrize("way", WAYS)
def test_derivatives_are_those_of_the_dense_product(way: str) -> None:
    x = rows(2)
    (ours, tables), (dense, _) = _of(matmul), _of(lambda x, w: x @ dequantize(w).T)
    got, expected = (jax.jit(lambda x, t, f=f: WAYS[way](f, x, t))(x, tables) for f in (ours, dense))
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, float(jnp.abs(other).max()))
        np.testing.assert_allclose(one, other, atol=1e-4 * scale)


def test_products_together_are_differentiated_forward() -> None:
    x = rows(2)
    (ours, tables), (dense, _) = (
        _of(f) for f in (lambda x, w: matmul_each(x, (w, w))[1], lambda x, w: x @ dequantize(w).T)
    )
    got, expected = (jax.jit(jax.jacfwd(f))(x, tables) for f in (ours, dense))
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_backward_pass_keeps_no_dense_matrix() -> None:
    w = a4.quantize(jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32), NF4(group_size=8))
    _, pull = jax.vjp(lambda x: matmul(x, w), jnp.ones((2, 32)))
    kept = [leaf for leaf in jax.tree.leaves(pull) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert kept and all(leaf.size < 64 * 32 for leaf in kept)
