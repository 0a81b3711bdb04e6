"""MX4's scales: powers of two, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax.methods import MX4, quantize
from any4_jax.weights import dequantize


@pytest.mark.parametrize(
    "amax,code_value",
    [(1.0, 1.0), (1.49, 1.5), (1.5, 1.5), (2.0, 2.0), (2.99, 3.0), (3.0, 3.0), (6.0, 6.0), (7.0, 8.0)],
)
def test_mx4_by_hand(amax: float, code_value: float) -> None:
    """A block's largest magnitude under the rounded exponent, as the any4 reference has it."""
    w = np.zeros((2, 32), np.float32)
    w[:, 3] = amax, -amax
    back = dequantize(quantize(jnp.asarray(w), MX4()))
    assert back[:, 3].tolist() == [code_value, -code_value]
    assert not np.delete(np.asarray(back), 3, axis=1).any()


def test_mx4_ocp_saturates() -> None:
    w = np.full((1, 32), 7.9, np.float32)
    assert float(dequantize(quantize(jnp.asarray(w), MX4(scale="ocp")))[0, 0]) == 6.0


def test_mx4_stores_the_groups_that_it_is_asked_for() -> None:
    q = quantize(jnp.ones((2, 128)), MX4(group_size=64))
    assert (q.group_size, q.scales.shape) == (64, (2, 2))
