"""Quantized NNX layers for tests: one, one with a low-rank update, a stack."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from any4_jax.methods import NF4, Int
from any4_jax.nn.nnx import Any4Linear
from any4_jax.weights import LowRank, Sum

INT, NF = Int(group_size=16), NF4(group_size=16)
K, N, LAYERS = 32, 32, 3
NAMED = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
STACKED = {nnx.PARTITION_NAME: "layers"}


def layer_of(seed: int = 0, method=INT, **fields) -> Any4Linear:
    return Any4Linear(K, N, rngs=nnx.Rngs(seed), method=method, **fields)


def inputs(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=(*shape, K)), jnp.float32)


def stack_of_layers(**fields) -> Any4Linear:
    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap(transform_metadata=STACKED)
    def make(rngs: nnx.Rngs) -> Any4Linear:
        return Any4Linear(K, N, rngs=rngs, method=INT, **fields)

    return make(nnx.Rngs(0))


def lora(layer: Any4Linear) -> Any4Linear:
    """The layer with a pair of rank 2 added to its weight."""
    pair = LowRank(jnp.ones((2, K)), jnp.ones((N, 2)), jnp.float32(0.5))
    layer.weight = Sum((layer.weight, pair))
    return layer


def same(a, b) -> None:
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)
