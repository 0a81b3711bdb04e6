"""Any4Dense: nn.Dense over quantized weights, alone, stacked and with named axes."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec
from linen_trees import KEY, NF4, floats, normal

import any4_jax as a4
from any4_jax.nn.linen import Any4Dense, boxed

NAMED = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))


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

    def apply(self, w, gathered):
        self.calls.append(w.shape)
        return super().apply(w, gathered)


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
