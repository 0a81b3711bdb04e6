"""Any4Dense, and quantized kernels inside Linen models that were written without them."""

import copy
import dataclasses
from typing import ClassVar

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

import any4_jax as a4
from any4_jax.nn.linen import Any4Dense, boxed
from any4_jax.nn.swapping import Intercepted, dense_layers, intercepted, quantized_dense, tapping
from cuda_ffi import registration

KEY = jax.random.key(0)
NF4 = a4.methods.NF4(group_size=16)
NAMED = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))


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


@pytest.mark.parametrize(
    "x_dtype, dtype, use_bias, expected",
    [
        ("float32", None, True, "float32"),
        ("float32", None, False, "float32"),
        ("bfloat16", None, False, "bfloat16"),
        ("bfloat16", None, True, "float32"),
        ("bfloat16", "bfloat16", True, "bfloat16"),
        ("float32", "bfloat16", True, "bfloat16"),
        ("bfloat16", "float32", False, "float32"),
        ("int32", None, False, "float32"),
    ],
)
@pytest.mark.parametrize("table_dtype", ["bfloat16", "float32"])
def test_equals_dense_with_the_dequantized_kernel_in_its_dtype(x_dtype, dtype, use_bias, expected, table_dtype):
    method = a4.methods.Int(4, group_size=16, scale_dtype=table_dtype, table_dtype=table_dtype)
    layer = Any4Dense(24, use_bias=use_bias, dtype=dtype, method=method, bias_init=nn.initializers.normal())
    x = (4 * normal((2, 3, 40))).astype(x_dtype)
    params = layer.init(KEY, x)["params"]
    y = layer.apply({"params": params}, x)
    like = nn.Dense(24, use_bias=use_bias, dtype=expected, precision="highest")
    assert y.dtype == expected
    reference = like.apply({"params": floats(params)}, x).astype(np.float32)
    # The two sum the same products in different orders.
    tolerance = 1e-5 if expected == "float32" else 0
    by_xla = layer.apply({"params": a4.prepare(params, "xla")}, x).astype(np.float32)
    np.testing.assert_allclose(by_xla, reference, rtol=tolerance, atol=tolerance)
    # Other kernels may keep in float32 the weights that Dense, and XLA, round to bfloat16.
    apart = (1e-5 if expected == "float32" else 2**-7) * np.abs(reference).max()
    np.testing.assert_allclose(y.astype(np.float32), reference, rtol=0, atol=apart)
    by_hand = a4.matmul(x.astype(expected), params["kernel"]) + params.get("bias", jnp.zeros(24)).astype(expected)
    np.testing.assert_array_equal(y, by_hand)


def test_starts_from_what_dense_of_the_same_key_starts_from():
    x = jnp.ones((1, 40))
    params = Any4Dense(24, method=a4.methods.NF4(), group_size=8).init(KEY, x)["params"]
    dense = nn.Dense(24).init(KEY, x)["params"]
    expected = a4.quantize(dense["kernel"], a4.methods.NF4(group_size=8), transposed=True)
    assert jax.tree.structure(params["kernel"]) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, {"kernel": expected, "bias": dense["bias"]})
    assert params["kernel"].scales.shape == (24, 5)


@pytest.mark.parametrize("layer", [Any4Dense(4), Any4Dense(4, method=a4.methods.Int(3))], ids=["any4", "int3"])
def test_abstract_parameters_have_the_shapes_of_a_checkpoint(layer):
    params = jax.eval_shape(layer.init, KEY, jnp.ones((1, 32)))["params"]
    expected = jax.eval_shape(lambda w: a4.quantize(w, layer.method), jnp.ones((4, 32)))
    assert params["kernel"] == expected
    assert params["bias"].shape == (4,)


@dataclasses.dataclass(frozen=True)
class Counting(a4.methods.NF4):
    calls: ClassVar[list] = []

    def apply(self, w, stats):
        self.calls.append(w.shape)
        return super().apply(w, stats)


def test_apply_does_not_trace_the_method_again():
    layer, x = Any4Dense(8, method=Counting(group_size=16)), jnp.ones((1, 48))
    variables = layer.init(KEY, x)
    assert Counting.calls == [(8, 48)]
    jax.jit(layer.apply)(variables, x)
    assert Counting.calls == [(8, 48)]


class Block(nn.Module):
    """A block that scans: (carry, None) -> (carry, None)."""

    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.tanh(Any4Dense(32, method=NF4, kernel_init=self.kernel_init, name="dense")(x)), None


def scanned(**options):
    return nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3, **options)


@pytest.mark.parametrize("block", [scanned(), nn.remat(scanned())], ids=["scan", "remat"])
def test_scan_equals_a_loop_over_its_layers_in_value_and_in_gradients(block):
    model, x = block(), normal((2, 32))
    stack = jax.jit(model.init)(KEY, x)["params"]
    assert stack["dense"]["kernel"].shape == (3, 32, 32)
    tables, codes = a4.partition(stack)

    def scan(tables):
        return model.apply({"params": a4.combine(tables, codes)}, x)[0]

    def loop(tables):
        y = x
        for i in range(3):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], a4.combine(tables, codes))["dense"]
            y = y + nn.tanh(y @ a4.dequantize(layer["kernel"]).T + layer["bias"])
        return y

    got, expected = (jax.jit(jax.value_and_grad(lambda t, f=f: (f(t) ** 2).sum()))(tables) for f in (scan, loop))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    for field in ("lut", "scales"):
        a, b = (np.asarray(getattr(g["dense"]["kernel"], field), np.float32) for _, g in (got, expected))
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max(), err_msg=field)  # stored as bfloat16
    np.testing.assert_allclose(got[1]["dense"]["bias"], expected[1]["dense"]["bias"], rtol=1e-4, atol=1e-4)


def test_vmap_gives_each_expert_its_own_kernel():
    experts = nn.vmap(Any4Dense, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=3)(8, method=NF4)
    x = normal((3, 2, 32))
    params = jax.jit(experts.init)(KEY, x)["params"]
    expected = jnp.einsum("emk,enk->emn", x, a4.dequantize(params["kernel"])) + params["bias"][:, None]
    np.testing.assert_allclose(experts.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-5)


def test_partitioning_names_the_axes_of_every_array():
    mesh = jax.make_mesh((1, 1), ("embed", "mlp"), axis_types=(AxisType.Auto, AxisType.Auto))
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"), mesh=mesh)
    layer, x = Any4Dense(24, method=a4.methods.Int(4, group_size=16), kernel_init=init), normal((2, 32))
    variables = layer.init(KEY, x)
    spec = nn.get_partition_spec(jax.eval_shape(layer.init, KEY, x))["params"]["kernel"]
    both = PartitionSpec("mlp", "embed")
    assert (spec.codes, spec.scales, spec.offsets) == (both, both, both)
    assert spec.lut == PartitionSpec(None, None), "one table for all rows"
    plain = nn.unbox(variables)
    assert variables["params"]["kernel"].codes.names == ("mlp", "embed")
    for params in (variables, plain):
        np.testing.assert_array_equal(jax.jit(layer.apply)(params, x), layer.apply(plain, x))


def test_partitioning_of_learned_tables_planes_and_a_single_group():
    float_kernel = nn.Partitioned(jnp.zeros((32, 24)), ("embed", "mlp"))
    learned = jax.eval_shape(lambda w: a4.quantize(w, a4.methods.Any4(bits=3, group_size=32)), jnp.ones((24, 32)))
    spec = nn.get_partition_spec(boxed(learned, float_kernel))
    assert spec.codes == (PartitionSpec("mlp", "embed"),) * 2
    assert (spec.lut, spec.scales) == (PartitionSpec("mlp", None), PartitionSpec("mlp", None))
    assert boxed(learned, nn.LogicallyPartitioned(None, ("a", "b"))).lut.names == ("b", None)


def test_scan_adds_the_name_of_its_axis():
    model = scanned(metadata_params={nn.PARTITION_NAME: "layers"})(kernel_init=NAMED)
    variables = jax.jit(model.init)(KEY, jnp.ones((2, 32)))
    spec = nn.get_partition_spec(variables)["params"]["dense"]["kernel"]
    assert spec.codes == PartitionSpec("layers", "mlp", "embed")
    assert spec.lut == PartitionSpec("layers", None, None)
    y, plain = (jax.jit(model.apply)(v, jnp.ones((2, 32)))[0] for v in (variables, nn.unbox(variables)))
    np.testing.assert_array_equal(y, plain)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_swapped_kernels_compute_what_their_floats_do(net, transform):
    model, variables = net
    x = normal((3, 32))
    y = transform(model.apply)(variables, x)
    np.testing.assert_allclose(y, Net().apply(floats(variables), x), rtol=1e-5, atol=1e-5)
    taken = "xla" if registration.why_not("cpu") else "cpu"
    np.testing.assert_array_equal(transform(model.apply)(a4.prepare(variables, taken), x), y)


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


def test_any4dense_refuses_a_float_kernel_and_a_group_size_its_method_lacks():
    with pytest.raises(TypeError, match=r"^the model: got a kernel of type .*, need an operator"):
        Any4Dense(32).apply({"params": {"kernel": jnp.ones((32, 32)), "bias": jnp.ones(32)}}, jnp.ones((1, 32)))

    @dataclasses.dataclass(frozen=True)
    class Whole:
        pass

    with pytest.raises(TypeError, match="group_size=8 for Whole, which has no such field"):
        Any4Dense(32, method=Whole(), group_size=8).init(KEY, jnp.ones((1, 32)))
    with pytest.raises(TypeError, match=r"need nn\.Partitioned with a name for each axis"):
        boxed(a4.quantize(jnp.ones((4, 16)), NF4), nn.Partitioned(jnp.ones((16, 4)), ("embed",)))


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
