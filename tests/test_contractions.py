"""Kernels of any rank: found, quantized, computed with, saved and loaded, whichever way a model contracts them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import any4_jax as a4
from any4_jax.methods import NF4
from any4_jax.surgery import container_of, quantized_leaves
from any4_jax.weights import Contraction, Layout, is_operator

NF = NF4(group_size=8)
D, H, E = 16, 4, 3
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, D)), jnp.float32)


def normal(rngs, *shape):
    return jax.random.normal(rngs.params(), shape) / 4


class Einsum(nnx.Module):
    """An einsum of a user's own, which knows its equation as those of language models do."""

    def __init__(self, equation: str, shape: tuple[int, ...], rngs: nnx.Rngs) -> None:
        self.einsum_str, self.w = equation, nnx.Param(normal(rngs, *shape))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum(self.einsum_str, x, self.w[...])


class Experts(nnx.Module):
    """Experts, one after the other, at once, sorted, and chosen; and two matrices in one kernel."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.router = nnx.Linear(D, E, rngs=rngs)
        self.one, self.all, self.sorted, self.chosen = (nnx.Param(normal(rngs, E, D, D)) for _ in range(4))
        self.gates = nnx.Param(normal(rngs, 2, D, D))

    def __call__(self, x: jax.Array) -> jax.Array:
        index = jax.nn.softmax(self.router(x)).argmax(-1)
        sent = jax.nn.one_hot(index, E).transpose(2, 0, 1)[..., None] * x
        x = sum(sent[i] @ self.one[...][i] for i in range(E))
        x = x + jnp.einsum("ebtd,edf->ebtf", sent, self.all[...]).sum(0)
        flat = x.reshape(-1, D)[:2]
        x = x + jax.lax.ragged_dot(flat, self.sorted[...], jnp.array([1, 0, 1])).sum()
        x = x + jnp.einsum("bd,bdf->bf", flat, self.chosen[...][index.reshape(-1)[:2]]).sum()
        gates = self.gates[...]
        return jax.nn.silu(x @ gates[0]) * (x @ gates[1])


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.heads = nnx.LinearGeneral(D, (H, 3), rngs=rngs)
        self.out = nnx.LinearGeneral((H, 3), D, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.flax = nnx.Einsum("btd,dhk->bthk", (D, H, 3), (H, 3), rngs=rngs)
        self.q = Einsum("BTD,NDH->BTNH", (H, D, 3), rngs)
        self.raw = nnx.Param(normal(rngs, D, 2, D))
        self.experts = Experts(rngs)
        self.bias = nnx.Param(normal(rngs, 5, D))
        self.table = nnx.Param(normal(rngs, 7, D))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.table[...][jnp.arange(5)] + self.bias[...]
        x = x + self.out(self.heads(x) + self.flax(x) + self.q(x))
        x = jnp.einsum("btd,dce->cbte", x, self.raw[...])[1]
        return self.experts(x) @ self.table[...].T


EXPERTS = {f"experts.{name}" for name in ("one", "all", "sorted", "chosen", "gates")}
BY_CLASS = {"heads", "out", "flax", "q.w"}


class Block(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, _=None):
        w = self.param("w", linen.initializers.lecun_normal(), (H, D, 3))
        x = x + linen.DenseGeneral(D, axis=(-2, -1), name="general")(jnp.einsum("BTD,NDH->BTNH", x, w))
        return x + linen.Einsum((D, D), "btd,de->bte", name="einsum")(x), None


class LinenNet(linen.Module):
    """Its layers are stacked along axis 1 of their kernels."""

    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = linen.Embed(7, D, name="table")
        scanned = linen.scan(linen.remat(Block), variable_axes={"params": 1}, split_rngs={"params": True}, length=2)
        x, _ = scanned(name="blocks")(table(tokens), None)
        return table.attend(linen.Dense(D, name="dense")(x))


IN_BLOCK = ("w", "general", "einsum")
TOKENS = jnp.arange(10).reshape(2, 5) % 7


def floats(tree):
    """The tree with dequantized kernels in place of operators."""

    def one(node):
        if isinstance(node, Contraction):
            return node.layout.kernel(a4.dequantize(node)).astype(node.dtype)
        return jnp.swapaxes(a4.dequantize(node), -1, -2) if is_operator(node) else node

    return jax.tree.map(one, tree, is_leaf=is_operator)


def close(a, b, rtol=1e-6) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(jnp.abs(b).max()))


@pytest.fixture(scope="module")
def net() -> NNXNet:
    return NNXNet(nnx.Rngs(0))


@pytest.fixture(scope="module")
def small(net):
    return a4.quantize_model(net, NF, inputs=(X,), rules=[("table", NF), (".*router", None)])


def test_nnx_kernels_are_found_by_class_and_by_tracing(net, small) -> None:
    assert set(quantized_leaves(a4.quantize_model(net, NF))) == BY_CLASS
    found = quantized_leaves(small)
    assert set(found) == BY_CLASS | EXPERTS | {"raw", "table"}
    assert set(quantized_leaves(a4.quantize_model(net, NF, inputs=(X,)))) == set(found) - {"table"}
    assert found["q.w"].shape == (H * 3, D) and found["out"].shape == (D, H * 3)
    assert found["experts.one"].shape == (E, D, D) and found["raw"].shape == (2 * D, D)


def test_an_nnx_model_computes_with_its_dequantized_kernels(net, small) -> None:
    container = container_of(net)
    dense = container.fill(net, floats(container.tree(small)), None)
    expected = nnx.jit(lambda model, x: model(x))(dense, X)
    close(nnx.jit(lambda model, x: model(x))(small, X), expected)


def test_an_nnx_model_is_saved_and_loaded(net, small, tmp_path) -> None:
    a4.save(tmp_path / "net", small)
    for into in (small, nnx.eval_shape(lambda: NNXNet(nnx.Rngs(0)))):
        new = a4.load(tmp_path / "net", into=into)
        assert type(new.q).__name__ == "Einsum" and isinstance(new.q, Einsum)
        for one, other in zip(jax.tree.leaves(nnx.state(new)), jax.tree.leaves(nnx.state(small)), strict=True):
            np.testing.assert_array_equal(one, other)
        assert new.recipe == small.recipe
    wrong = nnx.clone(net)
    wrong.raw = nnx.Param(jnp.zeros((D, 3, D)))
    with pytest.raises(ValueError, match=r"raw is \[16, 2, 16\], need \[16, 3, 16\]"):
        a4.load(tmp_path / "net", into=wrong)


def test_codes_are_read_where_products_read_them(small) -> None:
    graphdef, state = nnx.split(small.q)
    text = str(jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, X))
    assert f"f32[{H},{D},3]" not in text and "u8[" in text


def test_statistics_of_experts_are_of_their_tokens(net) -> None:
    stats = a4.calibrate(net, [X])
    assert stats["q.w"].stack == () and stats["experts.one"].stack == (E,)
    counts = {path: np.asarray(seen[a4.statistics.Moments()].count) for path, seen in stats.items()}
    assert counts["q.w"] == 10 and counts["experts.one"].sum() == 10
    np.testing.assert_array_equal(counts["experts.all"], counts["experts.one"])
    np.testing.assert_array_equal(counts["experts.sorted"], [1, 0, 1])
    assert counts["experts.chosen"].sum() == 2


def test_a_linen_pair_under_scan(tmp_path) -> None:
    model = LinenNet()
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
    module, new = a4.quantize_model((model, variables), NF, inputs=(TOKENS,), rules=[("table.*", NF)])
    assert set(quantized_leaves((module, new))) == {f"blocks.{name}" for name in IN_BLOCK} | {
        "dense",
        "table.embedding",
    }
    expected = jax.jit(model.apply)(floats(new), TOKENS)
    close(jax.jit(module.apply)(new, TOKENS), expected)
    a4.save(tmp_path / "pair", (module, new))
    loaded = a4.load(tmp_path / "pair", into=(model, variables))
    jax.tree.map(np.testing.assert_array_equal, loaded[1], new)
    stats = a4.calibrate((model, variables), [(TOKENS,)])
    assert stats["blocks.w"].stack == (2,) and stats["dense"].stack == ()


@pytest.mark.parametrize("says", [a4.Einsum("BTD,NDH->BTNH"), a4.Einsum("...D,NDH -> ...NH"), a4.Axes("NKN")])
def test_a_declaration_serves_every_kind_of_model(says, tmp_path) -> None:
    kernel = np.asarray(normal(nnx.Rngs(0), H, D, 3))
    raw = Einsum("?", kernel.shape, nnx.Rngs(0))
    models = {"nnx": nnx.Dict(q=raw), "tree": {"q": {"w": jnp.asarray(kernel)}}}
    for kind, model in models.items():
        new = a4.quantize_model(model, None, rules=[(r"q\.w", NF, says)])
        (found,) = quantized_leaves(new).values()
        expected = a4.quantize(jnp.asarray(kernel).transpose(0, 2, 1).reshape(H * 3, D), NF)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        a4.save(tmp_path / kind, new)
        loaded = a4.load(tmp_path / kind, into=model)
        assert quantized_leaves(loaded).keys() == {"q.w"}
        if kind == "nnx":
            assert new.recipe.rules[0] == (r"q\.w", NF)


@pytest.mark.parametrize("equation", ["BTD", "BTD,NDH", "BTD,DD->BT", "BTD,D->BT", "BTD,NDH->BTN", "BD,BNH->BDNH", 3])
def test_an_equation_of_another_form_is_refused(equation) -> None:
    with pytest.raises(ValueError, match="need two factors and an output"):
        a4.Einsum(equation)


def test_a_declaration_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match='got the axes "?.NX"?'):
        a4.Axes("NX")
    tree = {"w": jnp.ones((4, 8))}
    with pytest.raises(ValueError, match=r"w: got a kernel \[4, 8\], and .* has 3 axes"):
        a4.quantize_model(tree, None, rules=[("w", NF, a4.Axes("NKN"))])
    with pytest.raises(TypeError, match="need pairs of a regex and a method"):
        a4.quantize_model(tree, None, rules=[("w", NF, "NKN")])


@pytest.mark.parametrize("roles", ["KN", "NK", "NKN", "LKN", "KLN", "KKN", "LNLK"])
def test_a_layout_turns_a_kernel_into_a_matrix_and_back(roles: str) -> None:
    dims = tuple(range(2, 2 + len(roles)))
    layout, kernel = Layout(roles, dims), jnp.arange(np.prod(dims)).reshape(dims)
    matrix = layout.matrix(kernel)
    assert matrix.shape == layout.shape
    np.testing.assert_array_equal(layout.kernel(matrix), kernel)
    more = jnp.stack([kernel, kernel])
    np.testing.assert_array_equal(layout.kernel(layout.matrix(more)), more)
    assert layout.stacked((9, *layout.shape[:-2])).dims == (9, *dims)
    if "L" in roles:
        assert layout.stacked(layout.shape[1:-2]).roles == roles.replace("L", "", 1)


def test_a_kernel_that_modules_share_stays_shared() -> None:
    first, second = (Einsum("BTD,DE->BTE", (D, D), nnx.Rngs(0)) for _ in range(2))
    second.w = first.w
    new = a4.quantize_model(nnx.Sequential(first, second), NF)
    assert len(quantized_leaves(new)) == 1 and new.layers[0].w is new.layers[1].w


@pytest.mark.parametrize("shared", ["kernel", "bias"])
def test_what_linears_share_stays_shared(shared: str, tmp_path) -> None:
    pair = nnx.Sequential(*(nnx.Linear(D, D, rngs=nnx.Rngs(i)) for i in range(2)))
    setattr(pair.layers[1], shared, getattr(pair.layers[0], shared))
    new = a4.quantize_model(pair, NF)
    a4.save(tmp_path / "net", new)
    for each in (new, a4.load(tmp_path / "net", into=pair), a4.load(tmp_path / "net", into=new)):
        first, second = each.layers
        alike = first.arrays is second.arrays if shared == "kernel" else first.bias is second.bias
        assert alike and len(quantized_leaves(each)) == (1 if shared == "kernel" else 2)
        np.testing.assert_array_equal(each(X), new(X))


def test_an_array_of_a_layer_and_of_another_module_is_refused() -> None:
    first, second = nnx.Linear(D, D, rngs=nnx.Rngs(0)), Einsum("BTD,DE->BTE", (D, D), nnx.Rngs(0))
    second.w = first.kernel
    with pytest.raises(ValueError, match=r"layers\.0 \(with an array that layers\.1\.w holds too\)"):
        a4.quantize_model(nnx.Sequential(first, second), NF)


@pytest.mark.parametrize("roles", ["KN", "NK", "KLN", "LKN", "LKNN", "NKKL"])
def test_the_names_of_a_boxed_kernels_axes_survive_surgery(roles: str) -> None:
    dims, names = (8,) * len(roles), tuple(f"{role}{at}" for at, role in enumerate(roles))
    tree = {"w": linen.LogicallyPartitioned(jnp.ones(dims), names)}
    new = a4.quantize_model((linen.Dense(1), tree), None, rules=[("w", NF, a4.Axes(roles))])
    at = {role: names[roles.index(role)] for role in "NK"}
    stack = [name for name in names if name.startswith("L")]
    for each in (new, a4.add_lora(new, 2)):
        codes = jax.tree.leaves(each[1]["w"], is_leaf=lambda node: isinstance(node, linen.Partitioned))[0]
        assert codes.names == (*stack, at["N"], at["K"])
