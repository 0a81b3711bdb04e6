"""Quantized kernels inside Linen models that were written without them."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from flax import linen as nn
from linen_trees import KEY, NF4, Child, floats, normal, swapped

import any4_jax as a4
from any4_jax.nn.linen import Any4Dense
from any4_jax.nn.swapping import Intercepted, dense_layers, intercepted, quantized_dense


class Net(nn.Module):
    """A user's model: two Dense layers, one inside a child, and a second function."""

    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral(8, name="out")(self.encode(x))

    @nn.compact
    def encode(self, x):
        return nn.relu(Child(name="child")(x))


@pytest.fixture
def net():
    params = swapped(Net().init(KEY, jnp.ones((1, 32)))["params"])
    return intercepted(Net(), quantized_dense), {"params": params}


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_swapped_kernels_compute_what_their_floats_do(net, transform):
    model, variables = net
    x = normal((3, 32))
    y = transform(model.apply)(variables, x)
    np.testing.assert_allclose(y, Net().apply(floats(variables), x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    ["encode", Net.encode, lambda m, x: m.encode(x)],
    ids=["name", "function", "lambda"],
)
def test_other_functions_of_the_module_are_intercepted_too(net, method):
    model, variables = net
    x = normal((3, 32))
    h = model.apply(variables, x, method=method)
    np.testing.assert_allclose(h, Net().apply(floats(variables), x, method="encode"), rtol=1e-5, atol=1e-5)


def test_gradient_of_a_table_is_a_finite_difference(net):
    model, variables = net
    x = normal((3, 32))
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, variables)
    tables, codes = a4.partition(variables)

    def loss(tables):
        return (model.apply(a4.combine(tables, codes), x) ** 2).mean()

    gradient = jax.jit(jax.grad(loss))(tables)
    for field in ("lut", "scales"):
        path = ("params", "out", "kernel", field)
        along = normal(getattr(tables["params"]["out"]["kernel"], field).shape)
        at = [jax.jit(loss)(_moved(tables, path, h * along)) for h in (1e-2, -1e-2)]
        got = (getattr(gradient["params"]["out"]["kernel"], field) * along).sum()
        np.testing.assert_allclose(got, (at[0] - at[1]) / 2e-2, rtol=2e-3, err_msg=field)


def _moved(tree, path, step):
    if not path:
        return tree + step
    if isinstance(tree, dict):
        return {**tree, path[0]: _moved(tree[path[0]], path[1:], step)}
    return dataclasses.replace(tree, **{path[0]: _moved(getattr(tree, path[0]), path[1:], step)})


class Adding(nn.Dense):
    """Adds to Dense without touching what it computes."""

    def width(self):
        return self.features


class Doubling(nn.Dense):
    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Sowing(nn.Dense):
    @nn.compact
    def __call__(self, inputs):
        y = super().__call__(inputs)
        self.sow("intermediates", "y", y)
        return y


class Turned(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.lecun_normal(), (8, 32)).T


class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 8))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dense(8),
        Adding(8),
        nn.DenseGeneral((8,), axis=(-1,), use_bias=False),
        nn.remat(nn.Dense)(8),
        nn.jit(nn.Dense)(8),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_take_an_operator(layer):
    x = normal((3, 32))
    params = swapped(layer.init(KEY, x)["params"])
    y = intercepted(layer, quantized_dense).apply({"params": params}, x)
    np.testing.assert_allclose(y, layer.apply({"params": floats(params)}, x), rtol=1e-5, atol=1e-5)


BY_CODE = {
    "subclass": Doubling(8),
    "own kernel": Scaled(),
    "einsum": nn.Einsum((32, 8), "mk,kn->mn"),
    "dot_general": nn.Dense(8, dot_general=jax.lax.dot_general),
    "sowing": Sowing(8),
    "other axis": Turned(),
}


@pytest.mark.parametrize("layer", BY_CODE.values(), ids=BY_CODE)
def test_the_code_of_other_modules_reads_an_operator(layer, recwarn):
    class Owner(nn.Module):
        def setup(self):
            self.layer = copy.copy(layer)

        def __call__(self, x):
            return nn.relu(self.layer(x))

    x = normal((3, 32))
    variables = {"params": swapped(Owner().init(KEY, x)["params"])}
    y, new = jax.jit(lambda v: intercepted(Owner(), quantized_dense).apply(v, x, mutable=["intermediates"]))(variables)
    expected, sown = Owner().apply(floats(variables), x, mutable=["intermediates"])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), new, sown)
    told = [str(each.message) for each in recwarn.list if "decoded as a whole" in str(each.message)]
    assert len(told) == (layer is BY_CODE["other axis"]) and all("params.kernel" in each for each in told)


@pytest.mark.parametrize(
    "layer",
    [
        nn.DenseGeneral((2, 4)),
        nn.DenseGeneral(8, axis=(-2, -1)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_cannot_take_an_operator_say_so_with_their_path(layer):
    class Owner(nn.Module):
        def setup(self):
            self.layer = copy.copy(layer)

        def __call__(self, x):
            return self.layer(x)

    x = normal((3, 32))
    operator = a4.quantize(normal((8, 32)), NF4)
    assert dense_layers(lambda: Owner().init(KEY, x)) == {}
    with pytest.raises(TypeError, match=rf"^layer: a {type(layer).__name__} holds .*rule \('layer', None\)"):
        intercepted(Owner(), quantized_dense).apply({"params": {"layer": {"kernel": operator, "bias": 0}}}, x)


@pytest.mark.parametrize(
    "layer, params, error, words",
    [
        (
            nn.Dense(8),
            {"kernel": (8, 48), "bias": (8,)},
            ValueError,
            r"\(8, 48\) for 8 features and x of shape \(3, 32\)",
        ),
        (nn.Dense(8, use_bias=False), {"kernel": (9, 32)}, ValueError, r"for 8 features .* need \(8, 32\)"),
        (nn.Dense(8), {"kernel": (2, 8, 32), "bias": (8,)}, ValueError, r"\[N, K\] = \(2, 8, 32\)"),
        (nn.Dense(8), {"kernel": (8, 32)}, errors.ScopeParamNotFoundError, "bias"),
        (nn.Dense(8), {"kernel": (8, 32), "bias": (9,)}, errors.ScopeParamShapeError, "bias"),
        (
            Any4Dense(8),
            {"kernel": (8, 48), "bias": (8,)},
            ValueError,
            r"\(8, 48\) for 8 features and x of shape \(3, 32\)",
        ),
    ],
)
def test_wrong_shapes(layer, params, error, words):
    shapes = {name: jnp.zeros(shape) for name, shape in params.items()}
    kernel = jax.vmap(lambda w: a4.quantize(w, NF4))(jnp.ones((1, *params["kernel"])[-3:]))
    shapes["kernel"] = kernel if len(params["kernel"]) == 3 else jax.tree.map(lambda leaf: leaf[0], kernel)
    with pytest.raises(error, match=words):
        intercepted(layer, quantized_dense).apply({"params": shapes}, normal((3, 32)))


def test_intercepted_is_a_value_that_wraps_once():
    def tap(next_fun, args, kwargs, context):
        return next_fun(*args, **kwargs)

    model = intercepted(Net(), quantized_dense)
    assert model == intercepted(Net(), quantized_dense)
    assert hash(model) == hash(intercepted(Net(), quantized_dense))
    assert model != Net()
    assert intercepted(model, quantized_dense) == model
    assert intercepted(model, quantized_dense, tap).interceptors == (quantized_dense, tap)
    assert model.clone(name="other").interceptors == (quantized_dense,)
    assert isinstance(model.copy(), Intercepted)
    assert copy.deepcopy(model) == model
    assert model.name is None
    model = dataclasses.replace(model, recipe="how")
    assert intercepted(model, tap).recipe == "how"
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = model.nothing_of_the_kind
    with pytest.raises(TypeError, match=r"use apply"):
        model.bind({})


def test_intercepted_initialises_floats_and_tabulates():
    model, x = intercepted(Net(), quantized_dense), jnp.ones((1, 32))
    y, variables = model.init_with_output(KEY, x)
    jax.tree.map(np.testing.assert_array_equal, variables, Net().init(KEY, x))
    jax.tree.map(np.testing.assert_array_equal, variables, model.init(KEY, x))
    np.testing.assert_array_equal(y, model.apply(variables, x))
    assert "child/up" in model.tabulate(KEY, x)
