"""Group scales from a narrower range than the group's own."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax import statistics
from any4_jax.methods import FP4, MX4, NF4, Int, quantize
from any4_jax.weights import dequantize

N, K = 12, 40
W = np.random.default_rng(0).standard_t(3, (N, K)).astype(np.float32)
W[2], W[5], W[7, :16] = 0, 0.75, 0
RNG = np.random.default_rng(9)
X = RNG.normal(0.2, 10.0 ** RNG.uniform(-1, 1, K), (64, K)).astype(np.float32)


@pytest.mark.parametrize("method", [Int(3, group_size=16), NF4(group_size=16), FP4(group_size=7), MX4()], ids=repr)
def test_a_clipped_range_lowers_the_weighted_error_of_every_group(method) -> None:
    stats = statistics.from_activations(X)
    h = np.asarray(stats[statistics.Moments()].second_moment)
    clip = dataclasses.replace(method, clip=True)

    def errors(q, h):
        lost = np.pad(h * (np.asarray(dequantize(q)) - W) ** 2, ((0, 0), (0, -K % method.group_size)))
        return lost.reshape(N, -1, method.group_size).sum(axis=2)

    w = jnp.asarray(W)
    plain, weighted, alone = quantize(w, method), quantize(w, clip, stats), quantize(w, clip)
    for clipped, counts in ((weighted, h), (alone, np.ones(K))):
        before, after = errors(plain, counts), errors(clipped, counts)
        assert (after <= before * (1 + 1e-5) + 1e-12).all() and after.sum() < 0.95 * before.sum()
    assert errors(weighted, h).sum() < errors(alone, h).sum()
