"""What KVQuant learns: its levels are optimal, and calibration shows it the keys, values and gradients of the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kvquant import HKV, C, D, empty, emulated_keys, emulated_values, factory

import any4_jax as a4
from any4_jax.kv_cache import CacheSample, DenseCache, KVQuant
from any4_jax.kv_cache.kvquant_levels import learned
from any4_jax.kv_cache.nonuniform import Levels
from any4_jax.models.tiny import random_llama
from any4_jax.walk import cache as walked


def test_levels_are_optimal_v4(rng: np.random.Generator) -> None:
    """Each is the weighted mean of its numbers, no start of Lloyd's iteration leads to less, and the weights' scale
    means nothing; few different numbers are met exactly."""
    values = rng.standard_t(3, (200, HKV, D)).astype(np.float32)
    weights = rng.exponential(size=values.shape).astype(np.float32)
    fit = jax.jit(lambda sample: learned(sample, bits=2, slots=4, share=0.1, refits=2))
    found = fit(CacheSample(values, values, weights, weights))
    again = fit(CacheSample(values, values, 64 * weights, 64 * weights))
    jax.tree.map(np.testing.assert_array_equal, found, again)

    def inliers(x: np.ndarray, scale: Any, offset: Any, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale, offset = np.broadcast_to(scale, x.shape), np.broadcast_to(offset, x.shape)
        return ((x - offset) / scale)[~out], (weights * scale**2)[~out].astype(np.float64)

    of = Levels(*map(np.asarray, found))
    order = np.sort(values.reshape(200, -1), axis=1)
    top, bottom = order[:, -3, None, None], order[:, 2, None, None]
    cases = (
        (of.keys, *inliers(values, of.scales, of.offsets, emulated_keys(values, of, 4)[1])),
        (of.values, *inliers(values, (top - bottom) / 2, (top + bottom) / 2, emulated_values(values, of, 4)[1])),
    )
    for table, z, w in cases:

        def step(table: np.ndarray, z: np.ndarray = z, w: np.ndarray = w) -> tuple[float, np.ndarray]:
            code = np.abs(z[:, None] - table).argmin(axis=1)
            means = [
                np.average(z[code == i], weights=w[code == i]) if (code == i).any() else table[i] for i in range(4)
            ]
            return float(w @ (z - table[code]) ** 2), np.asarray(means)

        error, means = step(table)
        # Numbers on the border of two levels are in one bin.
        np.testing.assert_allclose(means, table, atol=5e-3)
        for _ in range(5):
            other, before = rng.choice(z, 4, replace=False), np.inf
            for _ in range(30):
                reached, other = step(other)
                assert reached <= before * (1 + 1e-9)
                before = reached
            assert error <= reached * 1.001
    few = np.tile(np.float32([-1, -0.5, 0.5, 1]), C // 4).reshape(1, HKV, D).repeat(200, 0)
    few = rng.permuted(few.reshape(200, C), axis=1).reshape(values.shape)
    exact = fit(CacheSample(few, few))
    np.testing.assert_allclose(emulated_values(few, Levels(*map(np.asarray, exact)), 4)[0], few, atol=1e-6)
    np.testing.assert_allclose(emulated_keys(few, Levels(*map(np.asarray, exact)), 4)[0], few, atol=1e-5)


def test_the_sample_has_keys_values_and_squared_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = random_llama(), np.random.default_rng(0).integers(0, 128, (2, 9)).astype(np.int32)
    seen: list[list[CacheSample]] = []
    monkeypatch.setattr(KVQuant, "calibrated", lambda self, samples: seen.append(samples) or self)
    # A short row is padded; the first token of each doesn't count.
    a4.calibrate_cache(model, KVQuant(), [rows[0], rows[1, :5]], batch_size=2)
    mask = np.arange(9) < np.asarray([[9], [5]])

    @jax.jit
    def direct(probes: Any) -> Any:
        def loss(probes: Any) -> Any:
            caches = model.init_cache(2, 9, cache=walked._Watch)
            caches = [dataclasses.replace(c, keys=k, values=v) for c, (k, v) in zip(caches, probes, strict=True)]
            x, caches = model.decode(rows * mask, caches, jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9)))
            logs = jnp.take_along_axis(jax.nn.log_softmax(model.head(x)[:, :-1]), rows[:, 1:, None], axis=-1)
            return -(logs[..., 0] * mask[:, 1:]).sum(), [(c.keys, c.values) for c in caches]

        return jax.grad(loss, has_aux=True)(probes)

    slopes, kept = direct([(jnp.zeros((2, 9, 2, 8)),) * 2] * 2)
    counts = mask & (np.arange(9) > 0)
    for sample, grads, numbers in zip(seen[0], slopes, kept, strict=True):
        wanted = (*numbers, *(np.square(each) for each in grads))
        for got, each in zip(sample, wanted, strict=True):
            # The sample has an order of its own.
            got, each = (np.asarray(x).reshape(-1, 16) for x in (got, np.asarray(each)[counts]))
            close = np.abs(got[:, None] - each[None]).max(axis=-1) <= 1e-5 * np.abs(each).max()
            assert len(got) == len(each) == 12 and close.any(axis=0).all() and close.any(axis=1).all()


def test_misuse_is_refused() -> None:
    model = random_llama()
    with pytest.raises(ValueError, match="KVQuant has no levels yet; learn them: cache = calibrate_cache"):
        empty(KVQuant())
    with pytest.raises(
        ValueError, match="levels of 2 blocks with keys of 2 x 12 channels, and this is block 0 with 2 x 8"
    ):
        model.init_cache(1, 8, cache=factory())
    with pytest.raises(TypeError, match="got a DenseCache, which learns nothing from data"):
        a4.calibrate_cache(model, DenseCache, [[1, 2]])
    with pytest.raises(TypeError, match="got a function, and a Decoder is needed"):
        a4.calibrate_cache(lambda tokens: tokens, KVQuant(), [[1, 2]])
    with pytest.raises(ValueError, match="no calibration token that counts"):
        a4.calibrate_cache(model, KVQuant(weighting="none"), [[1]])
