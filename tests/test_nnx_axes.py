"""Any4Linear in stacks, and the names of its arrays' axes, by which they are sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_layers import LAYERS, NAMED, STACKED, K, N, inputs, layer_of, lora, stack_of_layers

import any4_jax as a4
from any4_jax.methods import Any4
from any4_jax.nn.nnx import Any4Linear, Tables


def specs(layer: nnx.Module) -> dict[str, tuple]:
    """The partition spec of each array of the operator."""
    flat = nnx.to_flat_state(nnx.get_partition_spec(nnx.state(layer)))
    return {path[1]: tuple(v.get_value()) for path, v in flat if path[0] == "arrays"}


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


def test_the_names_of_a_kernels_axes_become_those_of_the_matrix_whatever_else_a_trainer_keeps() -> None:
    kernel = nnx.Param(jnp.ones((16, 2, 4, 8)), out_sharding=("embed", "layers", "heads", None), eager_sharding=False)
    told = {"sharding_names": ("embed", "layers", "heads", None), "param_scan_axis": 1, "note": "kept"}
    kernel = kernel.replace(**told)  # which leaves both names of one thing, as trainers have it
    assert "sharding_names" in kernel.get_metadata()
    model = nnx.Dict(layer=nnx.Dict(w=kernel))
    method = a4.methods.NF4(group_size=8)
    small = a4.quantize_model(model, None, rules=[(r"layer\.w", method, a4.Axes("KLNN"))])
    codes = small.layer.w.arrays["codes"].get_metadata()
    assert codes["out_sharding"] == ("layers", "heads", "embed") and codes["note"] == "kept"
    assert not {"sharding_names", "param_scan_axis"} & set(codes)
