"""SpQR: its weights against the published algorithm in float64, what it stores, and its laws."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same
from gptq_layers import ANY3, FLOAT_INT, G, H, K, N, X, layer, output_error, run
from spqr_float64 import spqr
from toy_methods import Nested

import any4_jax as a4
from any4_jax import statistics, weights
from any4_jax.cli.methods import add_method, method_from
from any4_jax.methods import GPTQ, MX4, Any4, Int, SpQR, matrices, quantize
from any4_jax.weights import PermuteInput, QuantizedTensor, Sum, Transposed, dequantize

INT3 = dataclasses.replace(FLOAT_INT, bits=3)
EXACT = SpQR(INT3, 0.1, damping=0.01, coded_rows=4, block=12, value_dtype="float32")
STORED = dataclasses.replace(EXACT, inner=Int(3, group_size=G, zero_point="float"), value_dtype="bfloat16")


@pytest.fixture(scope="module")
def made():
    return run(layer(), STORED)


def parts(q: PermuteInput):
    """The coded matrix and the outliers."""
    assert isinstance(q, PermuteInput) and isinstance(q.inner, Sum)
    return q.inner.terms


@pytest.mark.parametrize("fields", [{}, {"act_order": False, "scale_bits": None, "offset_bits": 4}], ids=str)
def test_weights_are_those_of_the_published_algorithm(fields) -> None:
    method, w = dataclasses.replace(EXACT, **fields), layer()
    order = np.argsort(-np.diagonal(H), kind="stable") if method.act_order else np.arange(K)
    bits = {name: getattr(method, name) for name in ("threshold", "scale_bits", "offset_bits", "damping")}
    codes, found, loss = spqr(w, H, bits=3, group_size=G, rows=4, order=order, **bits)
    q = run(w, method)
    coded, kept = parts(q) if method.act_order else q.terms
    np.testing.assert_array_equal(coded.unpacked_codes(), codes[:, order])
    np.testing.assert_allclose(dequantize(q), found, rtol=1e-4, atol=1e-4)
    assert 0.01 < np.mean(np.asarray(dequantize(kept)) != 0) < 0.1
    # What the columns lose one by one is the whole error under the damped Hessian, and outliers lose nothing.
    damped = H + 0.01 * np.diagonal(H).mean() * np.eye(K)
    np.testing.assert_allclose(loss, np.einsum("nk,kl,nl->", w - found, damped, w - found), rtol=1e-9)


def test_without_outliers_and_coded_scales_it_is_gptq() -> None:
    fields = {"damping": 0.01, "block": 12}
    plain = SpQR(INT3, threshold=None, scale_bits=None, offset_bits=None, **fields)
    ours, theirs = (run(layer(), method) for method in (plain, GPTQ(INT3, static_groups=False, **fields)))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    np.testing.assert_array_equal(ours.inner.unpacked_codes(), theirs.inner.unpacked_codes())
    np.testing.assert_allclose(dequantize(ours), dequantize(theirs), rtol=1e-6, atol=1e-6)


def test_a_smaller_threshold_keeps_more_and_loses_less() -> None:
    share, lost = [], []
    for threshold in (0.5, 0.1, 0.0):
        q = run(layer(), dataclasses.replace(EXACT, threshold=threshold))
        share.append(float((dequantize(parts(q)[1]) != 0).mean()))
        lost.append(output_error(layer(), q))
    assert share == sorted(share) and lost == sorted(lost, reverse=True) and lost[1] < 0.7 * lost[0]
    np.testing.assert_allclose(dequantize(q), layer(), rtol=1e-5, atol=1e-5)


def test_stored_arrays_are_what_is_computed_with(made) -> None:
    """Outliers in bfloat16 are as good as exact, since what is lost in rounding them is compensated."""
    coded, kept = parts(made)
    assert isinstance(coded.scales, Transposed) and isinstance(coded.offsets, Transposed)
    assert coded.scales.inner.bits == coded.offsets.inner.bits == 3 and kept.values.dtype == jnp.bfloat16
    by_hand = np.asarray(dequantize(coded)) + np.asarray(dequantize(kept))
    np.testing.assert_array_equal(np.asarray(dequantize(made))[:, made.permutation], by_hand)
    x = jnp.asarray(X[:3])
    for backend in (None, "xla"):
        y = a4.matmul(x, made, backend)
        np.testing.assert_allclose(y, x @ dequantize(made).T, rtol=1e-4, atol=1e-4)
    assert output_error(layer(), made) < 1.1 * output_error(layer(), run(layer(), EXACT))
    assert "terms/1/values" not in a4.explain(x, made) and "taken" in a4.explain(x, made)


def test_bits_are_those_of_the_paper() -> None:
    """3.99 and 3.07 for so many outliers, and besides them what rows and the sequence of columns take."""
    n = k = 1024
    w = jax.ShapeDtypeStruct((n, k), jnp.float32)
    for bits, group_size, outliers, claimed in ((3, 16, 0.01138, 3.989), (2, 32, 0.02358, 3.067)):
        method = SpQR(Int(bits, group_size=group_size, zero_point="float"), asymmetric=0.0)
        seen = statistics.empty(k, method.needs)
        coded, kept = jax.eval_shape(method.apply, w, seen).operator.inner.terms
        entry = kept.columns.dtype.itemsize + kept.values.dtype.itemsize
        tables = [part.lut for part in weights.parts(coded) if isinstance(part, QuantizedTensor)]
        of_tables = 8 * sum(lut.size * lut.dtype.itemsize for lut in tables) / (n * k)
        assert abs(coded.bits_per_weight - of_tables + 8 * entry * outliers - claimed) < 1e-3


def test_a_learned_table_may_be_inside(made) -> None:
    q = run(layer(), dataclasses.replace(STORED, inner=ANY3))
    coded, kept = parts(q)
    assert coded.lut.shape == (N, 8) and isinstance(coded.scales, Transposed) and kept.values.size
    assert output_error(layer(), q) < output_error(layer(), made)


def test_experts_stack_though_their_outliers_differ_in_number(made) -> None:
    stack = jnp.asarray(np.stack([layer(0), 2 * layer(1)]))
    seen = statistics.from_activations(X, statistics=dict.fromkeys(STORED.needs))
    q = matrices.quantize_matrix(matrices.Matrix(stack, transposed=False), STORED, seen, "experts").operator
    assert q.shape == (2, N, K)
    first, second = (dequantize(jax.tree.map(lambda a, i=i: a[i], q)) for i in range(2))
    np.testing.assert_array_equal(first, dequantize(made))
    assert output_error(2 * layer(1), jax.tree.map(lambda a: a[1], q)) < 0.1 * np.square(X @ (2 * layer(1)).T).sum()
    assert second.shape == (N, K)


def test_it_is_saved_and_trained(made, tmp_path) -> None:
    a4.save(tmp_path / "c", {"a": {"kernel": made}})
    assert_same(a4.load(tmp_path / "c"), {"a": {"kernel": made}})

    def loss(values):
        coded, kept = parts(made)
        outliers = dataclasses.replace(kept, values=values)
        return a4.matmul(jnp.ones((1, K)), dataclasses.replace(made, inner=Sum((coded, outliers)))).sum()

    kept = parts(made)[1]
    slopes = jax.grad(loss)(kept.values)
    filled = np.arange(kept.values.shape[1]) < np.asarray(kept.ends).reshape(kept.values.shape[0], -1)[:, -1:]
    np.testing.assert_array_equal(slopes, filled.astype(np.float32))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (SpQR(Nested()), "got inner=toy-nested, which has no scale_groups .* such as Int or Any4"),
        (SpQR(MX4()), "got scale_bits=3 with mx4, whose scales are exponents; pass scale_bits=None"),
    ],
    ids=["nested", "mx4"],
)
def test_what_cant_be_inside_is_refused(method, words) -> None:
    with pytest.raises(ValueError, match=words):
        run(layer(), method)


def test_it_needs_statistics_and_fields_that_make_sense() -> None:
    with pytest.raises(ValueError, match="got no statistics, spqr needs the Hessian"):
        quantize(jnp.asarray(layer()), SpQR())
    for fields in ({"threshold": -1.0}, {"scale_bits": 7}, {"coded_rows": 0}):
        with pytest.raises(ValueError, match=f"got {next(iter(fields))}=.* for SpQR, need "):
            SpQR(**fields)
    assert SpQR.paper(threshold=0.5) == SpQR(threshold=0.5, damping=0.01, asymmetric=0.0)


def test_the_command_has_a_flag_for_each_field() -> None:
    flags = ["--inner", "any4", "--inner-bits", "3", "--threshold", "0.5", "--scale-bits", "none", "--no-act-order"]
    argv = ["quantize", "tiny", "out", "--method", "spqr", *flags]
    parser = argparse.ArgumentParser()
    add_method(parser, argv)
    made = method_from(parser.parse_args(argv[3:]))
    assert made == SpQR(Any4(bits=3), threshold=0.5, scale_bits=None, act_order=False)
