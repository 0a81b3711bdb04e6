"""Quantized kernels inside Linen models that were written without them."""

import copy
import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from flax import linen as nn
from linen_trees import KEY, NF4, floats, normal, swapped

import any4_jax as a4
from any4_jax.nn.linen import Any4Dense
from any4_jax.nn.swapping import Intercepted, dense_layers, intercepted, quantized_dense, tapping


class Net(nn.Module):
    """A user's model: two Dense layers, one inside a child, and a second function."""

    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral(8, name="out")(self.encode(x))

    @nn.compact
    def encode(self, x):
        return nn.relu(Child(name="child")(x))


class Child(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(32, name="up")(x)


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


@pytest.mark.parametrize(
    "layer",
    [
        Doubling(8),
        Scaled(),
        nn.Einsum((32, 8), "mk,kn->mn"),
        nn.Dense(8, dot_general=jax.lax.dot_general),
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
    tap = tapping(lambda path, x: None)
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


class Stack(nn.Module):
    """Layers in every place a path may come from: a scan, a remat, a child that is handed a layer, a tied head."""

    def setup(self):
        self.shared = nn.Dense(32)
        self.blocks = nn.scan(FloatBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
        self.user = User(self.shared)
        self.again = nn.remat(Child)()
        self.embed = nn.Embed(10, 32)
        self.head = nn.Dense(10, use_bias=False)

    def __call__(self, tokens):
        x = self.again(self.user(self.blocks(self.embed(tokens))[0]))
        return self.head.apply({"params": {"kernel": self.embed.embedding.T}}, x)


class FloatBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(32, name="dense")(x), None


class User(nn.Module):
    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


STACK = {("blocks", "dense"): True, ("again", "up"): True}


def test_dense_layers_are_listed_under_the_keys_of_their_parameters():
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = Stack().init(KEY, tokens)["params"]

    def trace():
        return Stack().apply({"params": params}, tokens)

    assert dense_layers(trace) == {**STACK, ("shared",): True}
    assert dense_layers(trace) == {**STACK, ("shared",): True}, "not answered from jax's cache of traces"
    assert dense_layers(lambda: Stack().init(KEY, tokens)) == {**STACK, ("shared",): True}
    assert params["blocks"]["dense"]["kernel"].shape == (2, 32, 32)
    assert {"kernel", "bias"} == set(params["shared"]) == set(params["again"]["up"])


def test_tap_sees_each_layers_input_around_quantized_kernels(net):
    model, variables = net
    x, seen = normal((3, 32)), {}
    tapped = intercepted(model, tapping(seen.__setitem__))
    np.testing.assert_array_equal(tapped.apply(variables, x), model.apply(variables, x))
    assert list(seen) == [("child", "up"), ("out",)]
    np.testing.assert_array_equal(seen["child", "up"], x)
    np.testing.assert_array_equal(seen["out",], model.apply(variables, x, method="encode"))


HF_SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 40}
HF_TOKENS = np.arange(6).reshape(1, 6)


def hugging_face(model, config, **fields):
    """A small model of transformers with seeded parameters."""
    transformers = pytest.importorskip("transformers", reason="needs the hf-flax extra")
    hf = getattr(transformers, model)(getattr(transformers, config)(**HF_SIZES, **fields), _do_init=False)
    return hf, jax.tree.map(lambda leaf: 0.1 * normal(leaf.shape), flax.core.unfreeze(hf.params_shape_tree))


def test_gpt2_keeps_kernels_untransposed_and_has_a_tied_head():
    hf, params = hugging_face("FlaxGPT2LMHeadModel", "GPT2Config", n_inner=32, n_positions=16)
    layers = {("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")}
    listed = dense_layers(lambda: hf(HF_TOKENS, params=params))
    assert listed == {("transformer", "h", "0", *layer): False for layer in layers}

    def swap(path, leaf):
        layer = tuple(key.key for key in path[:-1])
        return a4.quantize(leaf, NF4) if path[-1].key == "kernel" and layer in listed else leaf

    quantized = jax.tree_util.tree_map_with_path(swap, params)

    def logits(params):
        return hf(HF_TOKENS, params=params).logits

    dense = jax.jit(logits)(floats(quantized, transposed=False))
    hf._module = intercepted(hf._module, quantized_dense)
    np.testing.assert_allclose(jax.jit(logits)(quantized), dense, rtol=1e-5, atol=1e-5)


def test_bert_lists_its_layers_without_the_tied_decoder():
    hf, params = hugging_face("FlaxBertForMaskedLM", "BertConfig", intermediate_size=64, max_position_embeddings=16)
    layers = [("attention", "self", name) for name in ("query", "key", "value")]
    layers += [("attention", "output", "dense"), ("intermediate", "dense"), ("output", "dense")]
    expected = {("bert", "encoder", "layer", "0", *layer): True for layer in layers}
    expected["cls", "predictions", "transform", "dense"] = True
    assert dense_layers(lambda: hf(HF_TOKENS, params=params)) == expected
