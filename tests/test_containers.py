"""Surgery on every kind of model: the same layers found, the same operators, the original untouched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import any4_jax as a4
from any4_jax.methods import NF4, Int, quantize
from any4_jax.surgery import map_operators, quantized_leaves
from any4_jax.weights import Sum

NF = NF4(group_size=16)
X = np.random.default_rng(0).normal(size=(3, 24)).astype(np.float32)


class LinenNet(linen.Module):
    """Two Dense layers, one of them in a submodule, with something that is no Dense between them."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Dense(20, name="first")(x)
        x = linen.DenseGeneral((4, 5), name="heads")(x).reshape(*x.shape[:-1], 20)
        return linen.Sequential([linen.relu, linen.Dense(7)], name="rest")(x)


class Scanned(linen.Module):
    """Three Dense layers in a stack."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def body(layer, x):
            return linen.tanh(layer(x)), None

        layers = linen.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(linen.Dense(24, name="layer"), x)[0]


class NNXNet(nnx.Module):
    """Its first layer is held in two places."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(24, 24, rngs=rngs)
        self.rest = nnx.List([self.first, nnx.Linear(24, 7, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.first(x)
        for layer in self.rest:
            x = layer(nnx.relu(x))
        return x


def dense_like(operator) -> np.ndarray:
    return np.asarray(a4.dequantize(operator))


def test_a_linen_pair_computes_with_its_dequantized_weights() -> None:
    net = LinenNet()
    params = net.init(jax.random.key(0), X)["params"]
    module, small = a4.quantize_model((net, params), NF, inputs=(X,))
    assert set(quantized_leaves((module, small))) == {"first", "heads", "Dense_0"}
    assert isinstance(params["first"]["kernel"], jax.Array)
    dense = jax.tree.map(lambda leaf: leaf, params)
    for path in (("first",), ("Dense_0",)):
        node, new = dense, small
        for name in path:
            node, new = node[name], new[name]
        np.testing.assert_array_equal(new["kernel"].codes, quantize(node["kernel"].T, NF).codes)
        node["kernel"] = dense_like(new["kernel"]).T
    dense["heads"]["kernel"] = small["heads"]["kernel"].layout.kernel(dense_like(small["heads"]["kernel"]))
    expected = net.apply({"params": dense}, X)
    np.testing.assert_allclose(module.apply({"params": small}, X), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(module.apply)({"params": small}, X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs", [None, (X,)])
def test_a_module_that_is_one_dense_layer(inputs) -> None:
    net = linen.Dense(7)
    params = net.init(jax.random.key(0), X)["params"]
    pair = a4.quantize_model((net, params), NF, inputs=inputs, stats=a4.calibrate((net, params), [X]))
    assert set(quantized_leaves(pair)) == {"kernel"}
    expected = X @ dense_like(pair[1]["kernel"]).T + params["bias"]
    np.testing.assert_allclose(pair[0].apply({"params": pair[1]}, X), expected, rtol=1e-5, atol=1e-5)


def test_collections_come_back_as_they_were_passed() -> None:
    net = LinenNet()
    variables = {**net.init(jax.random.key(0), X), "batch_stats": {"mean": jnp.ones(3)}}
    module, small = a4.quantize_model((net, variables), NF, inputs=(X,))
    assert set(small) == {"params", "batch_stats"} and small["batch_stats"] is variables["batch_stats"]
    assert module.apply(small, X).shape == (3, 7)


def test_a_stack_under_scan_is_quantized_layer_by_layer() -> None:
    net = Scanned()
    params = net.init(jax.random.key(0), X)["params"]
    kernel = params["layer"]["kernel"]
    assert kernel.shape == (3, 24, 24)
    module, small = a4.quantize_model((net, params), NF, inputs=(X,))
    weight = small["layer"]["kernel"]
    assert weight.shape == (3, 24, 24)
    for i in range(3):
        np.testing.assert_array_equal(weight.codes[i], quantize(kernel[i].T, NF).codes)
    dense = {"layer": {"kernel": jnp.swapaxes(dense_like(weight), 1, 2), "bias": params["layer"]["bias"]}}
    np.testing.assert_allclose(module.apply({"params": small}, X), net.apply({"params": dense}, X), atol=1e-5)
    alone = a4.quantize_model((net, params), NF)  # the bias tells which axis is the stack's
    np.testing.assert_allclose(alone[0].apply({"params": alone[1]}, X), module.apply({"params": small}, X), atol=1e-5)


def test_a_shared_nnx_layer_stays_shared() -> None:
    net = NNXNet(nnx.Rngs(0))
    small = a4.quantize_model(net, NF)
    assert len(quantized_leaves(small)) == 2
    assert small.first is small.rest[0] and small.first is not net.first
    assert isinstance(net.first, nnx.Linear)
    assert np.abs(np.asarray(small(X) - net(X))).max() < 1


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_statistics_of_any_model_are_those_of_its_layers_inputs(kind: str) -> None:
    """Two batches of different sizes, against the inputs computed by hand."""
    batches = [X, X[:2] * 3]
    rows = np.concatenate(batches)
    if kind == "linen":
        net = LinenNet()
        params = net.init(jax.random.key(0), X)["params"]
        stats = a4.calibrate((net, params), batches)
        first = net.apply({"params": params}, rows, capture_intermediates=True)[1]["intermediates"]["first"]
        heads = linen.DenseGeneral((4, 5)).apply({"params": params["heads"]}, first["__call__"][0])
        expected = {"first": rows, "heads": first["__call__"][0], "Dense_0": np.maximum(heads.reshape(-1, 20), 0)}
    else:
        model = NNXNet(nnx.Rngs(0))
        stats = a4.calibrate(model, [(batch,) for batch in batches])
        one = np.asarray(model.first(rows))
        two = np.asarray(model.first(np.maximum(one, 0)))
        # The shared layer has seen both of its inputs.
        expected = {"first": np.concatenate([rows, np.maximum(one, 0)]), "rest.1": np.maximum(two, 0)}
    assert set(stats) == set(expected)
    for path, x in expected.items():
        moments = stats[path][a4.statistics.Moments()]
        assert int(moments.count) == len(x)
        np.testing.assert_allclose(moments.second_moment, (np.asarray(x) ** 2).mean(axis=0), rtol=1e-4, atol=1e-6)


def test_statistics_inside_a_scan_are_those_of_each_layer() -> None:
    net = Scanned()
    params = net.init(jax.random.key(0), X)["params"]
    x, layer = X, params["layer"]
    seen = a4.calibrate((net, params), [X])["layer"]
    assert seen.stack == (3,)
    for i in range(3):
        moments = seen.of_expert(i)[a4.statistics.Moments()]
        np.testing.assert_allclose(moments.second_moment, (np.asarray(x) ** 2).mean(axis=0), rtol=1e-4, atol=1e-6)
        x = jnp.tanh(x @ layer["kernel"][i] + layer["bias"][i])


class Two(linen.Module):
    """An encoder and a decoder; its call is the decoder."""

    def setup(self) -> None:
        self.first, self.second = linen.Dense(8), linen.Dense(4)

    def encode(self, x: jax.Array, train: bool) -> jax.Array:
        return self.first(x) if not train else x

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.encode(x, train=False))


def test_another_method_than_the_call_is_calibrated_with_its_flags() -> None:
    net, batch = Two(), {"x": X, "train": False, "method": "encode"}
    params = net.init(jax.random.key(0), X)["params"]
    seen = a4.calibrate((net, params), [batch, batch])
    assert set(seen) == {"first"} and int(seen["first"][a4.statistics.Moments()].count) == 2 * len(X)
    pair = a4.quantize_model((net, params), NF, inputs=batch)
    assert set(quantized_leaves(pair)) == {"first"}


def test_what_cannot_be_calibrated_says_so() -> None:
    with pytest.raises(TypeError, match="got a dict, calibrate runs"):
        a4.calibrate({"kernel": X}, [X])
    with pytest.raises(ValueError, match="sequential calibration of a NNXNet"):
        a4.calibrate(NNXNet(nnx.Rngs(0)), [X], NF, sequential=True)
    by_rule = [(r".*", a4.methods.Any4.paper(group_size=16))]
    with pytest.raises(ValueError, match="sequential calibration of a NNXNet"):
        a4.quantize_model(NNXNet(nnx.Rngs(0)), NF, data=[X], rules=by_rule)
    with pytest.raises(ValueError, match="got example inputs for a tree of arrays"):
        a4.quantize_model({"kernel": X}, NF, inputs=(X,))
    for model in (linen.Dense(2), (linen.Dense(2), None)):
        with pytest.raises(TypeError, match=r"got .*Linen module .*; pass the pair \(module, variables\)"):
            a4.quantize_model(model, NF)
    with pytest.raises(TypeError, match="got inputs for 'encode' of a NNXNet, which has no method of this name"):
        a4.quantize_model(NNXNet(nnx.Rngs(0)), NF, inputs={"x": X, "method": "encode"})
    with pytest.raises(ValueError, match="no calibration batches"):
        a4.calibrate(NNXNet(nnx.Rngs(0)), [])


def test_operators_are_mapped_where_the_pattern_says() -> None:
    small = a4.quantize_model(NNXNet(nnx.Rngs(0)), NF)
    doubled = map_operators(small, lambda path, q: Sum((q, q)), r"rest\..*")
    assert {path: type(q).__name__ for path, q in quantized_leaves(doubled).items()} == {
        "first": "QuantizedTensor",
        "rest.1": "Sum",
    }
    with pytest.raises(ValueError, match="matches none"):
        map_operators(small, lambda path, q: q, "nowhere")
    with pytest.raises(ValueError, match=r"rest\.1: got an operator of shape"):
        map_operators(small, lambda path, q: jnp.ones((2, 2)), r"rest\.1")


def test_explain_tells_every_layer() -> None:
    net = LinenNet()
    params = net.init(jax.random.key(0), X)["params"]
    pair = a4.quantize_model((net, params), None, rules=[("first", Int(4, group_size=8))], inputs=(X,))
    text = a4.explain(pair, platform="cuda")
    assert text.splitlines()[0] == "platform cuda, inputs float32 [1, K]"
    assert "first  [20 x 24]  1 layer\n    " in text and "Dense_0  [7 x 20]  1 layer" in text
    assert "no quantized leaf: a dense product in XLA" in text
