"""Parameters of Linen models for tests: random, quantized, and back as floats; a small module to put into others."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

import any4_jax as a4

KEY = jax.random.key(0)
NF4 = a4.methods.NF4(group_size=16)


def normal(shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), dtype)


def swapped(params, method=NF4):
    """A Linen tree with an operator in the place of every two-dimensional kernel."""

    def swap(path, leaf):
        is_kernel = path[-1].key == "kernel" and leaf.ndim == 2
        return a4.quantize(leaf, method, transposed=True) if is_kernel else leaf

    return jax.tree_util.tree_map_with_path(swap, params)


def floats(params, transposed=True):
    """The tree with float kernels [K, N] (or [N, K]) in the place of operators."""

    def dense(node):
        if not isinstance(node, a4.QuantizedTensor):
            return node
        return jnp.matrix_transpose(a4.dequantize(node)) if transposed else a4.dequantize(node)

    return jax.tree.map(dense, params, is_leaf=lambda node: isinstance(node, a4.QuantizedTensor))


class Child(linen.Module):
    """A module whose one Dense layer is called `up`."""

    @linen.compact
    def __call__(self, x):
        return linen.Dense(32, name="up")(x)
