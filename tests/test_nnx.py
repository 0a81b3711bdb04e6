"""Any4Linear: a drop-in for nnx.Linear whose arrays are variables of their own."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nnx_layers import NF, K, N, inputs, layer_of, lora, same

from any4_jax import weights
from any4_jax.methods import MX4, NF4, Any4, Int, quantize
from any4_jax.nn.nnx import Any4Linear, Codes, Tables


def test_the_constructor_takes_what_nnx_linear_takes() -> None:
    theirs = inspect.signature(nnx.Linear.__init__).parameters
    mine = inspect.signature(Any4Linear.__init__).parameters
    assert set(theirs) - set(mine) == {"dot_general", "promote_dtype", "preferred_element_type"}
    assert all(name in (inspect.getdoc(Any4Linear) or "") for name in set(theirs) - set(mine))
    assert set(mine) - set(theirs) == {"method", "group_size"} and mine["method"].default == Any4()
    for name in ("use_bias", "dtype", "param_dtype", "precision"):
        assert mine[name].default == theirs[name].default
    assert all(mine[name].kind == theirs[name].kind for name in set(mine) & set(theirs))


@pytest.mark.parametrize("bias", [True, False])
def test_it_starts_from_the_kernel_of_nnx_linear(bias: bool) -> None:
    dense = nnx.Linear(K, 48, use_bias=bias, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(7))
    layer = Any4Linear(
        K, 48, use_bias=bias, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(7), method=NF4(), group_size=16
    )
    same(layer.weight, quantize(dense.kernel[...], NF, transposed=True))
    assert (layer.in_features, layer.out_features) == (K, 48)
    same(layer.bias, dense.bias)
    # A layer around an operator has the same graph definition: the two share their programs.
    around = Any4Linear.of(layer.weight, bias=None if dense.bias is None else dense.bias[...])
    assert nnx.graphdef(around) == nnx.graphdef(layer) and hash(nnx.graphdef(around)) == hash(nnx.graphdef(layer))
    around.weight = layer.weight
    assert nnx.graphdef(around) == nnx.graphdef(layer)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_computes_what_nnx_linear_does_with_the_dequantized_weight(rng: np.random.Generator, dtype) -> None:
    layer = layer_of(dtype=dtype, bias_init=nnx.initializers.normal())
    dense = nnx.Linear(K, N, dtype=dtype, precision="highest", rngs=nnx.Rngs(0))
    dense.kernel[...] = weights.dequantize(layer.weight).T
    dense.bias[...] = layer.bias[...]
    x = inputs(rng, 2, 3)
    assert layer(x).dtype == dtype
    close = 1e-6 if dtype == jnp.float32 else 1e-2  # bfloat16 has 8 bits
    np.testing.assert_allclose(
        np.asarray(layer(x), np.float32), np.asarray(dense(x), np.float32), rtol=close, atol=close
    )


def test_without_a_dtype_input_and_bias_promote_and_tables_have_no_part(rng: np.random.Generator) -> None:
    x = inputs(rng, 2).astype(jnp.bfloat16)
    assert layer_of()(x).dtype == jnp.float32
    assert layer_of(use_bias=False)(x).dtype == jnp.bfloat16


def test_a_group_size_for_a_method_without_one_is_refused() -> None:
    class Whole:
        pass

    with pytest.raises(TypeError, match="got group_size=16 for .*Whole.* no such field; set it in the method"):
        layer_of(method=Whole(), group_size=16)


def test_each_array_is_a_variable_named_by_its_place() -> None:
    layer = lora(layer_of(method=Int(3, group_size=16)))
    kinds = {path[1]: type(v) for path, v in nnx.to_flat_state(nnx.state(layer)) if path[0] == "arrays"}
    assert kinds == {
        "terms/0/codes/0": Codes,
        "terms/0/codes/1": Codes,
        "terms/0/lut": nnx.Variable,  # a ramp, and products may rely on it
        "terms/0/scales": Tables,
        "terms/0/offsets": Tables,
        "terms/1/a": nnx.LoRAParam,
        "terms/1/b": nnx.LoRAParam,
        "terms/1/scale": nnx.Variable,
    }
    exponents = layer_of(method=MX4()).arrays
    assert {name: type(variable) for name, variable in exponents.items()} == {
        "codes": Codes,
        "lut": Tables,
        "scales": Codes,
    }


def test_setting_the_weight_replaces_it(rng: np.random.Generator) -> None:
    layer, x = layer_of(), inputs(rng, 4)
    before = layer(x)
    lora(layer)
    np.testing.assert_allclose(layer(x), before + x @ jnp.ones((K, N)), rtol=1e-5, atol=1e-5)
    layer.weight = jnp.eye(N, K)
    np.testing.assert_array_equal(layer(x), x)
    assert list(layer.arrays) == ["dense"]


def test_graphs_of_it_split_clone_map_and_trace(rng: np.random.Generator) -> None:
    model, x = nnx.Sequential(layer_of(0), nnx.relu, lora(layer_of(1))), inputs(rng, 2)
    expected = model(x)
    for copy in (nnx.merge(*nnx.split(model)), nnx.clone(model), nnx.recursive_map(lambda path, node: node, model)):
        np.testing.assert_array_equal(copy(x), expected)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), expected, rtol=1e-5, atol=1e-5)
    assert [path for path, node in nnx.iter_modules(model) if isinstance(node, Any4Linear)] == [
        ("layers", 0),
        ("layers", 2),
    ]


def test_abstract_layers_hold_shapes_and_are_filled_by_state(count_compiles) -> None:
    nnx.Rngs(0)
    with count_compiles() as compiles:
        abstract = nnx.eval_shape(lambda: Any4Linear(K, N, rngs=nnx.Rngs(0), group_size=16))
    assert compiles.count == 0
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(abstract)))
    assert abstract.weight.shape == (N, K) and abstract.weight.lut.shape == (N, 16)
    real = layer_of()
    abstract = nnx.eval_shape(layer_of)
    assert nnx.graphdef(abstract) == nnx.graphdef(real)
    nnx.update(abstract, nnx.state(real))
    same(abstract.weight, real.weight)


def test_layers_of_one_recipe_share_a_program(rng: np.random.Generator, count_compiles) -> None:
    run = jax.jit(lambda graphdef, state, x: nnx.merge(graphdef, state)(x), static_argnums=0)
    x, first, second = inputs(rng, 2), layer_of(0), layer_of(1)
    run(*nnx.split(first), x)
    with count_compiles() as compiles:
        run(*nnx.split(second), x)
    assert compiles.count == 0


def test_an_optimiser_sees_the_tables_alone(rng: np.random.Generator) -> None:
    model = nnx.Sequential(layer_of(0, NF4(group_size=16, table_dtype="float32", scale_dtype="float32")), nnx.relu)
    x, y = inputs(rng, 16), inputs(rng, 16)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=Tables)
    codes = jax.tree.map(np.asarray, nnx.state(model, Codes))
    bias = np.asarray(model.layers[0].bias[...])
    tables = jax.tree.leaves(nnx.state(model, Tables))
    moments = jax.tree.leaves(nnx.state(optimizer.opt_state))
    assert sorted(leaf.shape for leaf in moments if leaf.ndim) == sorted(2 * [leaf.shape for leaf in tables])

    @nnx.jit
    def step(model, optimizer):
        loss, slopes = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2), argnums=nnx.DiffState(0, Tables))(model)
        optimizer.update(model, slopes)
        return loss

    losses = [step(model, optimizer) for _ in range(20)]
    assert losses[-1] < 0.95 * losses[0]
    same(nnx.state(model, Codes), codes)
    np.testing.assert_array_equal(model.layers[0].bias[...], bias)
    assert all((new != old).any() for new, old in zip(jax.tree.leaves(nnx.state(model, Tables)), tables, strict=True))


def test_gradients_of_low_rank_factors_leave_the_scale_alone(rng: np.random.Generator) -> None:
    layer, x = lora(layer_of()), inputs(rng, 4)
    slopes = nnx.grad(lambda m: (m(x) ** 2).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(layer)
    assert {path[-1] for path, _ in nnx.to_flat_state(slopes)} == {"terms/1/a", "terms/1/b"}
    assert all(np.asarray(slope).any() for slope in jax.tree.leaves(slopes))
