"""Kernels in NNX modules that are shared, reordered, or read beyond their ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from any4_jax.methods import Int
from any4_jax.surgery import Axes, quantized_leaves
from any4_jax.walk import calibrate, quantize_model


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.z = nnx.Param(rngs.params.normal((32, 32)))
        self.a = self.z
        self.merged = nnx.Param(rngs.params.normal((3, 2, 32, 4)))
        self.chosen = nnx.Param(rngs.params.normal((2, 32, 8)))
        self.table, self.beyond = nnx.Param(rngs.params.normal((4, 32))), nnx.Variable(jnp.zeros((2, 8)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x @ self.z[...] + x @ self.a[...]
        merged = self.merged[...].transpose(0, 2, 3, 1).reshape(3, 32, 8)
        y = jax.lax.ragged_dot(x, merged, jnp.array([1, 0, 1]))
        none = jnp.take(self.chosen[...], jnp.array([1, 2]), axis=0, mode="fill", fill_value=0)
        usual = jnp.take(self.chosen[...], jnp.array([1, 0]), axis=0)  # NaN beyond the stack
        y = y + jnp.einsum("bd,bdf->bf", x, none) + jnp.einsum("bd,bdf->bf", x, usual)
        y = y + x @ self.chosen[...][jnp.int32(7)]
        self.beyond.set_value(jnp.einsum("bd,bdf->bf", x, jnp.take(self.chosen[...], jnp.array([-5, 0]), axis=0)))
        rows = jnp.take(self.table[...], jnp.array([2, 4]), axis=0, fill_value=3.0)  # the second is beyond
        return y + (rows @ self.table[...].T).sum()


def test_kernels_are_read_as_the_code_reads_arrays() -> None:
    net, x = Net(nnx.Rngs(0)), jnp.ones((2, 32)).at[0, :9].set(2.0)
    rules = [("merged", Int(4, group_size=32), Axes("LNKN")), ("table", Int(4, group_size=32))]
    small = quantize_model(net, Int(4, group_size=32), inputs=(x,), rules=rules)
    same = Net(nnx.Rngs(0))
    for name in ("a", "merged", "chosen", "table"):
        getattr(same, name).set_value(getattr(small, name)[...])
    assert type(small.a) is not nnx.Param
    run = nnx.jit(lambda net, x: net(x))
    np.testing.assert_allclose(run(small, x), run(same, x), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(small.beyond[...], same.beyond[...], rtol=1e-5, atol=1e-4)
    assert jnp.isnan(small.beyond[...]).any(-1).tolist() == [True, False]


class Counter(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.w, self.seen, self.calls = nnx.Param(rngs.params.normal((32, 32))), nnx.Variable(jnp.zeros(())), 0

    def __call__(self, x: jax.Array, count: bool = False) -> jax.Array:
        self.seen.set_value(self.seen[...] + 1)
        self.calls += count
        return x @ self.w[...]


def test_what_a_call_sets_is_kept_or_refused() -> None:
    x = jnp.ones((2, 32))
    counter = quantize_model(Counter(nnx.Rngs(0)), Int(4, group_size=32), inputs=(x,))
    counter(x)
    assert counter.seen[...] == 1
    with pytest.raises(ValueError, match="a call of Counter that sets its calls, which is lost"):
        counter(x, count=True)


class Stacked(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.w = nnx.Param(rngs.params.normal((2, 4, 8)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("bk,nko->bno", x, self.w[...]).reshape(-1, 16)


class Places(nnx.Module):
    """Kernels in containers, in a loop of no fixed length, and in a stack of modules that reads one input."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        def param(*shape: int) -> nnx.Param:
            return nnx.Param(rngs.params.normal(shape) / 4)

        self.list = nnx.List([param(2, 4, 8), nnx.Dict(inner=nnx.List([param(16, 4)]))])
        self.looped = param(2, 2, 4)
        self.equal = nnx.List([nnx.Dict(w=param(4, 4)) for _ in range(2)])
        self.stack = nnx.split_rngs(splits=3)(nnx.vmap(Stacked))(rngs)

    @nnx.jit
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.einsum("bk,nko->bno", x, self.list[0][...]).reshape(-1, 16) @ self.list[1].inner[0][...]
        looped = self.looped[...].reshape(4, 4)
        x = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ looped)), (0, x))[1]
        # Modules of equal structure are stacked, whose metadata have to be equal too.
        alike = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(each) for each in self.equal))
        x = jax.lax.scan(lambda x, layer: (x @ layer["w"][...], None), x, alike)[0]
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.stack, x)


PLACES = {"list.0": (16, 4), "list.1.inner.0": (4, 16), "looped": (4, 4), "stack.w": (3, 16, 4)}


def test_kernels_in_any_place_are_found_and_their_codes_are_read(recwarn) -> None:
    net, x = Places(nnx.Rngs(0)), jnp.linspace(-1, 1, 8).reshape(2, 4)
    method = Int(4, group_size=4)
    small = quantize_model(net, method, inputs=(x,), rules=[("looped", method, Axes("KKN"))])
    assert {path: leaf.shape for path, leaf in quantized_leaves(small).items()} == PLACES
    same = Places(nnx.Rngs(0))
    for mine, theirs in ((same.list, small.list), (same.list[1].inner, small.list[1].inner)):
        mine[0].set_value(theirs[0][...])
    same.looped.set_value(small.looped[...])
    same.stack.w.set_value(small.stack.w[...])
    graphdef, state = nnx.split(small)
    text = str(jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, x))
    assert "f32[2,4,8]" not in text and "f32[2,2,4]" not in text
    run = nnx.jit(lambda net, x: net(x))
    np.testing.assert_allclose(run(small, x), run(same, x), rtol=1e-5, atol=1e-5)
    assert not [told for told in recwarn.list if "decoded as a whole" in str(told.message)]


def test_statistics_under_a_map_over_modules_alone_are_of_each() -> None:
    stacked = nnx.split_rngs(splits=3)(nnx.vmap(Stacked))(nnx.Rngs(0))

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.stack = stacked

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.stack, x)

    assert calibrate(Net(), [(jnp.ones((2, 4)),)])["stack.w"].stack == (3,)


@pytest.mark.parametrize("kind", ["linear", "general", "einsum", "raw"])
def test_a_stack_that_is_not_in_front_is_refused(kind: str) -> None:
    def make(rngs: nnx.Rngs) -> nnx.Module:
        if kind == "linear":
            return nnx.Linear(4, 6, rngs=rngs)
        if kind == "general":
            return nnx.LinearGeneral(4, (2, 3), rngs=rngs)
        return nnx.Einsum("bk,nko->bno", (2, 4, 3), rngs=rngs) if kind == "einsum" else Stacked(rngs)

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.layers = nnx.split_rngs(splits=5)(nnx.vmap(make, out_axes=1))(nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.vmap(lambda layer, x: layer(x), in_axes=(1, 0))(self.layers, jnp.stack([x] * 5))

    where = "another axis than the first" if kind == "raw" else "whose stack is not in front"
    with pytest.raises(ValueError, match=rf"layers\S* \(an .*{where}"):
        quantize_model(Net(), Int(4, group_size=4), inputs=(jnp.ones((2, 4)),))


def test_an_adapter_stays_over_a_quantized_base() -> None:
    rngs = nnx.Rngs(0)
    net = nnx.LoRA(4, 2, 6, base_module=nnx.LoRALinear(4, 6, lora_rank=2, rngs=rngs), rngs=rngs)
    net.lora_b.set_value(rngs.params.normal((2, 6)))
    net.base_module.lora.lora_b.set_value(rngs.params.normal((2, 6)))
    small, x = quantize_model(net, Int(4, group_size=4)), jnp.linspace(-1, 1, 8).reshape(2, 4)
    assert set(quantized_leaves(small)) == {"base_module"} and type(small.base_module).__name__ == "LoRALinear"
    same = nnx.clone(net)
    same.base_module.kernel.set_value(small.base_module.kernel[...])
    np.testing.assert_allclose(small(x), same(x), rtol=1e-5, atol=1e-5)
    adapters = nnx.state(small, nnx.LoRAParam)
    jax.tree.map(np.testing.assert_array_equal, adapters, nnx.state(net, nnx.LoRAParam))


class Outside(nnx.Module):
    """Its code multiplies by what a module in it holds."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = Stacked(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("bk,nko->bno", x, self.inner.w[...])


def test_a_program_that_decodes_what_another_module_holds_is_told() -> None:
    x = jnp.ones((2, 4))
    small = quantize_model(Outside(nnx.Rngs(0)), Int(4, group_size=4), inputs=(x,))
    small.inner.w[...]  # a look at the floats is none
    with pytest.warns(UserWarning, match=r"a kernel \[2, 4, 8\]: its codes are decoded .* code outside of its module"):
        nnx.eval_shape(lambda net: net(x), small)
