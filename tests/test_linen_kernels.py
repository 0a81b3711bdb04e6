"""What is known of the kernels of a Linen model without example inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from any4_jax.methods import NF4
from any4_jax.surgery import quantized_leaves
from any4_jax.surgery.linen_kernels import layouts
from any4_jax.walk import quantize_model
from any4_jax.weights import Contraction, dequantize, is_operator

X = jnp.ones((2, 5, 16))
HEADS = jnp.ones((2, 4, 3))
ATTENTION = {"query": "KNN", "key": "KNN", "value": "KNN", "out": "KKN"}
NF = NF4(group_size=8)


def compact(make, *args, **fields) -> nn.Module:
    """A module that makes a layer of a name of its own when it runs, so that nothing but the parameters tells."""

    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return make(*args, **fields, name="a")(x), None

    return Compact()


def scanned(axis: int, make, *args, **fields) -> nn.Module:
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            make(*args, **fields, name="a")(x)
            return x, None

    return nn.scan(Body, variable_axes={"params": axis}, split_rngs={"params": True}, length=3)()


class Setup(nn.Module):
    """Its setup needs a parameter, and its layers are in a list too."""

    def setup(self) -> None:
        self.scale = self.param("scale", nn.initializers.ones, (3,))
        self.heads = nn.DenseGeneral((4, 3), use_bias=False)
        self.rest = [nn.DenseGeneral(16, axis=(-2, -1), use_bias=False), nn.Einsum((16, 16), "btd,fd->btf", False)]

    def __call__(self, x):
        return self.rest[1](self.rest[0](self.heads(x)))


KNOWN = {
    "heads": (nn.DenseGeneral((4, 3)), X, {"": "KNN"}),
    "several axes": (nn.DenseGeneral(8, axis=(-2, -1), use_bias=False), HEADS, {"": "KKN"}),
    "axes of equal lengths": (nn.DenseGeneral((4, 3), axis=(-2, -1)), HEADS, {"": "KKNN"}),
    "batch": (nn.DenseGeneral((2, 3), batch_dims=(0,)), HEADS[0], {"": "LKNN"}),
    "remat": (nn.remat(nn.DenseGeneral)((4, 3), use_bias=False), X, {"": "KNN"}),
    "boxed": (nn.DenseGeneral((4, 3), kernel_init=nn.with_partitioning(nn.zeros, ("a", "b", "c"))), X, {"": "KNN"}),
    "einsum of two axes": (nn.Einsum((16, 16), "btd,fd->btf", use_bias=False), X, {"": "NK"}),
    "einsum": (nn.Einsum((4, 16, 3), "btd,ndh->btnh"), X, {"": "NKN"}),
    "fields": (nn.Sequential([nn.Dense(16), nn.DenseGeneral((4, 3), use_bias=False)]), X, {"layers_1": "KNN"}),
    "setup": (Setup(), X, {"heads": "KNN", "rest_0": "KKN", "rest_1": "NK"}),
    "bias": (compact(nn.DenseGeneral, (4, 3)), X, {"a": "KNN"}),
    "attention": (
        compact(nn.MultiHeadDotProductAttention, 4, use_bias=False),
        X,
        {f"a.{name}": roles for name, roles in ATTENTION.items()},
    ),
    "stack of Dense": (scanned(0, nn.Dense, 8), X, {"a": "LKN"}),
    "stack of heads": (scanned(0, nn.DenseGeneral, (4, 5)), X, {"a": "LKNN"}),
    "stack of attentions": (
        scanned(0, nn.MultiHeadDotProductAttention, 4),
        X,
        {f"a.{name}": f"L{roles}" for name, roles in ATTENTION.items()},
    ),
    "vmap": (
        nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3)(8),
        X,
        {"": "LKN"},
    ),
    "stack along another axis": (scanned(1, nn.Dense, 8), X, {}),
    "attentions along another axis": (scanned(1, nn.MultiHeadDotProductAttention, 4), X, {}),
    "no bias": (compact(nn.DenseGeneral, (4, 3), use_bias=False), X, {}),
    "equation of a call": (compact(nn.Einsum, (16, 12), "btd,df->btf", use_bias=False), X, {}),
    "convolution": (nn.Conv(16, (3,)), X, {}),
    "convolution of a compact module": (compact(nn.Conv, 16, (3,)), X, {}),
    "Dense": (nn.Dense(8), X, {}),
}


@pytest.mark.parametrize("case", KNOWN)
def test_a_kernel_is_known_where_it_can_be_read_in_one_way(case: str) -> None:
    module, x, roles = KNOWN[case]
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    for model in (module, module.copy()):
        found = layouts(model, variables, variables["params"])
        assert {path.removesuffix("kernel").rstrip("."): layout.roles for path, layout in found.items()} == roles


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(4, use_bias=False, name="attention")(x)
        x = nn.DenseGeneral((4, 8), name="heads")(x).reshape(*x.shape[:-1], 32)
        return nn.Einsum((32, 16), "btd,df->btf", use_bias=False, name="einsum")(x)


def test_a_model_is_quantized_without_inputs(recwarn) -> None:
    x = jax.random.normal(jax.random.key(0), X.shape)
    net = Net()
    variables = jax.jit(net.init)(jax.random.key(1), x)
    module, small = quantize_model((net, variables), NF, strict=True)
    found = quantized_leaves((module, small))
    assert set(found) == {*(f"attention.{name}" for name in ATTENTION), "heads", "einsum"}
    assert found["attention.out"].shape == (16, 16) and found["heads"].shape == (32, 16)
    expected = jax.jit(net.apply)(floats(small), x)
    np.testing.assert_allclose(jax.jit(module.apply)(small, x), expected, atol=1e-5)
    assert not [told for told in recwarn.list if "decoded as a whole" in str(told.message)]


def floats(tree):
    """The tree with dequantized kernels in place of operators."""

    def one(node):
        if isinstance(node, Contraction):
            return node.layout.kernel(dequantize(node))
        return jnp.swapaxes(dequantize(node), -1, -2) if is_operator(node) else node

    return jax.tree.map(one, tree, is_leaf=is_operator)
