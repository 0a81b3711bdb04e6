"""Kernels in NNX modules that are shared, reordered, or read beyond their ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from any4_jax.methods import Int
from any4_jax.surgery import Axes
from any4_jax.walk import quantize_model


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.z = nnx.Param(rngs.params.normal((32, 32)))
        self.a = self.z
        self.merged = nnx.Param(rngs.params.normal((3, 2, 32, 4)))
        self.chosen = nnx.Param(rngs.params.normal((2, 32, 8)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x @ self.z[...] + x @ self.a[...]
        merged = self.merged[...].transpose(0, 2, 3, 1).reshape(3, 32, 8)
        y = jax.lax.ragged_dot(x, merged, jnp.array([1, 0, 1]))
        none = jnp.take(self.chosen[...], jnp.array([1, 2]), axis=0, mode="fill", fill_value=0)
        return y + jnp.einsum("bd,bdf->bf", x, none) + x @ self.chosen[...][jnp.int32(7)]


def test_kernels_are_read_as_the_code_reads_arrays() -> None:
    net, x = Net(nnx.Rngs(0)), jnp.ones((2, 32)).at[0, :9].set(2.0)
    rules = [("merged", Int(4, group_size=32), Axes("LNKN"))]
    small = quantize_model(net, Int(4, group_size=32), inputs=(x,), rules=rules)
    same = Net(nnx.Rngs(0))
    for name in ("a", "merged", "chosen"):
        getattr(same, name).set_value(getattr(small, name)[...])
    assert type(small.a) is not nnx.Param
    np.testing.assert_allclose(small(x), same(x), rtol=1e-5, atol=1e-4)


class Counter(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.w, self.seen, self.calls = nnx.Param(rngs.params.normal((32, 32))), nnx.Variable(jnp.zeros(())), 0

    def __call__(self, x: jax.Array, count: bool = False) -> jax.Array:
        self.seen.set_value(self.seen[...] + 1)
        self.calls += count
        return x @ self.w[...]


def test_what_a_call_sets_is_kept_or_refused() -> None:
    x = jnp.ones((2, 32))
    counter = quantize_model(Counter(nnx.Rngs(0)), Int(4, group_size=32), inputs=(x,))
    counter(x)
    assert counter.seen[...] == 1
    with pytest.raises(ValueError, match="a call of Counter that sets its calls, which is lost"):
        counter(x, count=True)
