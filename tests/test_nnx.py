"""Any4Linear: a drop-in for nnx.Linear whose arrays are variables of their own."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from any4_jax import weights
from any4_jax.methods import MX4, NF4, Any4, Int, quantize
from any4_jax.nn.nnx import Any4Linear, Codes, Tables
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


def specs(layer: nnx.Module) -> dict[str, tuple]:
    """The partition spec of each array of the operator."""
    flat = nnx.to_flat_state(nnx.get_partition_spec(nnx.state(layer)))
    return {path[1]: tuple(v.get_value()) for path, v in flat if path[0] == "arrays"}


def same(a, b) -> None:
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)


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


def test_a_scanned_stack_equals_a_loop_under_remat_too(rng: np.random.Generator) -> None:
    stack, x = stack_of_layers(bias_init=nnx.initializers.normal()), inputs(rng, 2)
    assert stack.weight.shape == (LAYERS, N, K)

    def call(layer: Any4Linear, x: jax.Array) -> jax.Array:
        return nnx.gelu(layer(x))

    def scanned(call, stack: Any4Linear) -> jax.Array:
        return nnx.scan(call, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(stack, x)

    def looped(call, stack: Any4Linear) -> jax.Array:
        graphdef, state = nnx.split(stack)
        y = x
        for i in range(LAYERS):
            y = call(nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state)), y)
        return y

    def result(run, call) -> list[jax.Array]:
        """The outputs, and the slopes of their squares in the tables."""

        def loss(stack: Any4Linear):
            y = run(call, stack)
            return (y**2).sum(), y

        slopes, y = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, Tables), has_aux=True))(stack)
        return jax.tree.leaves((y, slopes))

    expected = result(looped, call)
    for form in (call, nnx.remat(call)):
        for one, other in zip(result(scanned, form), expected, strict=True):
            # Slopes are rounded to the tables' bfloat16.
            close = 1e-5 if one.dtype == jnp.float32 else 1e-2
            np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=close, atol=close)


def test_a_stack_around_an_operator_is_one_for_vmap_only(rng: np.random.Generator) -> None:
    each = [layer_of(seed).weight for seed in range(LAYERS)]
    stack = Any4Linear.of(jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))
    x = inputs(rng, 2)
    y = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(stack, x)
    np.testing.assert_allclose(y, jnp.stack([Any4Linear.of(w)(x) for w in each]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"\(3, 32, 32\), matmul takes \[N, K\]"):
        stack(x)


SPECS = {"codes": ("mlp", "embed"), "lut": (None, None), "scales": ("mlp", "embed"), "offsets": ("mlp", "embed")}


@pytest.fixture
def annotated_only():
    """Annotations without a mesh: nothing is placed when it is made."""
    with nnx.use_eager_sharding(False):
        yield


@pytest.mark.usefixtures("annotated_only")
def test_arrays_carry_the_names_of_the_kernels_axes() -> None:
    assert specs(layer_of(kernel_init=NAMED)) == SPECS
    assert specs(layer_of(kernel_metadata={"out_sharding": ("embed", "mlp")})) == SPECS
    own_tables = nnx.eval_shape(lambda: layer_of(method=Any4(group_size=K), kernel_init=NAMED))
    assert specs(own_tables) == SPECS | {"lut": ("mlp", None), "scales": ("mlp", None), "offsets": ("mlp", None)}
    pair = {"terms/1/a": (None, "embed"), "terms/1/b": ("mlp", None), "terms/1/scale": ()}
    assert specs(lora(layer_of(kernel_init=NAMED))) == {f"terms/0/{name}": spec for name, spec in SPECS.items()} | pair
    assert all(not spec for spec in specs(layer_of()).values())


@pytest.mark.usefixtures("annotated_only")
def test_a_layer_around_an_operator_takes_over_a_kernels_metadata() -> None:
    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap(transform_metadata=STACKED)
    def make(rngs: nnx.Rngs) -> nnx.Linear:
        return nnx.Linear(K, N, rngs=rngs, kernel_init=NAMED, bias_metadata={"out_sharding": ("mlp",)})

    dense, stack = make(nnx.Rngs(0)), stack_of_layers(kernel_init=NAMED)
    around = Any4Linear.of(
        stack.weight,
        bias=dense.bias[...],
        kernel_metadata=dense.kernel.get_metadata(),
        bias_metadata=dense.bias.get_metadata(),
    )
    assert specs(around) == specs(stack) == {name: ("layers", *spec) for name, spec in SPECS.items()}
    assert around.bias.out_sharding == ("layers", "mlp")


@pytest.mark.usefixtures("annotated_only")
def test_a_scan_takes_and_adds_the_stacks_name(rng: np.random.Generator) -> None:
    stack, seen = stack_of_layers(kernel_init=NAMED), []

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry, transform_metadata=STACKED)
    def run(layer: Any4Linear, x: jax.Array) -> jax.Array:
        seen.append({name: variable.out_sharding for name, variable in layer.arrays.items()})
        return layer(x)

    run(stack, inputs(rng, 2))
    assert seen[-1] == SPECS
    assert specs(stack) == {name: ("layers", *spec) for name, spec in SPECS.items()}


def test_arrays_are_placed_as_nnx_places_a_kernel() -> None:
    mesh = jax.make_mesh((1, 1), ("embed", "mlp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        layer = layer_of(kernel_init=NAMED)
    assert layer.arrays["codes"].get_value().sharding.spec == jax.sharding.PartitionSpec("mlp", "embed")
    # What is in hand stays where it is, so no mesh is needed.
    around = Any4Linear.of(layer.weight, kernel_metadata=layer.kernel_metadata)
    assert specs(around) == SPECS
