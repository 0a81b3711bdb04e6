"""solver="gradient": tables trained on the layer's output for a sample of tokens."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

import any4_jax as a4
from any4_jax import statistics
from any4_jax.methods import Any4, quantize

N, K, G, TOKENS = 20, 96, 32, 200
PLAIN = Any4(group_size=G, refit=False)
TRAINED = dataclasses.replace(PLAIN, solver="gradient", max_iter=40, sample_tokens=TOKENS)


def layer() -> np.ndarray:
    return np.random.default_rng(0).standard_t(5, (N, K)).astype(np.float32)


def inputs() -> np.ndarray:
    """Inputs that vary along a few directions, as those of trained models do: errors may cancel."""
    rng = np.random.default_rng(1)
    return (rng.normal(size=(TOKENS, 6)) @ rng.normal(size=(6, K)) + 0.3 * rng.normal(size=(TOKENS, K))).astype("f")


X = inputs()


@functools.cache
def stats() -> statistics.Gathered:
    return statistics.from_activations(X, statistics=TRAINED.needs)


def output_errors(method: Any4) -> np.ndarray:
    """|X (w - w^)|^2 of each row in float64, of the arrays as stored."""
    gap = np.asarray(a4.dequantize(quantize(jnp.asarray(layer()), method, stats())), np.float64) - layer()
    return np.square(X.astype(np.float64) @ gap.T).sum(axis=0)


@pytest.mark.parametrize("refit", [False, True], ids=["alone", "after the refit"])
def test_it_lowers_every_rows_output_error(refit: bool) -> None:
    before, after = (output_errors(dataclasses.replace(method, refit=refit)) for method in (PLAIN, TRAINED))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.8 * before.sum()


def test_without_statistics_it_lowers_the_weights_error() -> None:
    """From a start that is not optimal already."""
    start = dataclasses.replace(TRAINED, init="random", max_iter=0)
    gaps = [
        np.asarray(a4.dequantize(quantize(jnp.asarray(layer()), method))) - layer()
        for method in (start, dataclasses.replace(start, max_iter=40))
    ]
    before, after = (np.square(gap).sum(axis=1) for gap in gaps)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.95 * before.sum()


def test_the_ends_that_keep_outliers_stay() -> None:
    kept = dataclasses.replace(TRAINED, keep_outliers=True)
    trained, start = (quantize(jnp.asarray(layer()), m, stats()) for m in (kept, dataclasses.replace(kept, max_iter=0)))
    np.testing.assert_array_equal(trained.lut[:, [0, -1]], start.lut[:, [0, -1]])
    assert (np.asarray(trained.lut) != np.asarray(start.lut)).any()


def test_calibrate_draws_the_sample_that_the_method_needs() -> None:
    model = a4.models.load("tiny")
    text = "Once upon a time there was a small fox who lived in a big wood."
    method = Any4(group_size=32, solver="gradient", sample_tokens=10, max_iter=1)
    sample = statistics.Sample(10)
    assert not any(sample in gathered for gathered in a4.calibrate(model, text).values())
    stats = a4.calibrate(model, text, rules=[(r".*q_proj", method)])
    assert {gathered[sample].x.shape[0] for gathered in stats.values()} == {10}
    first = np.asarray(stats["layers.0.self_attn.q_proj"][sample].x)
    assert (np.abs(first).max(axis=1) > 0).all()


def test_statistics_without_a_sample_are_refused() -> None:
    with pytest.raises(
        ValueError, match="layer has statistics without Sample\\(tokens=200\\).* calibrate\\(model, data, method\\)"
    ):
        quantize(jnp.asarray(layer()), TRAINED, statistics.from_activations(X), path="layer")
    with pytest.raises(ValueError, match="per_row=False"):
        quantize(jnp.asarray(layer()), dataclasses.replace(TRAINED, per_row=False), stats())
