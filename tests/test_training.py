"""Training over quantized weights: what is marked, exact gradients, LoRA and tables in NNX and Linen."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import any4_jax as a4
from any4_jax import weights
from any4_jax.methods import MX4, NF4, Int, quantize
from any4_jax.nn.nnx import Codes, Tables
from any4_jax.partition import combine, partition
from any4_jax.surgery import quantized_leaves
from any4_jax.training import add_lora, trainable
from any4_jax.weights import LowRank, PermuteInput, Sum

N, K, R = 6, 16, 2
FLOAT32 = NF4(group_size=8, table_dtype="float32", scale_dtype="float32")
X = np.random.default_rng(1).normal(size=(32, K)).astype(np.float32)
Y = np.random.default_rng(2).normal(size=(32, N)).astype(np.float32)


def matrix(seed: int = 0, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape or (N, K)), jnp.float32)


def low_rank(seed: int = 5, scale: float = 0.5) -> LowRank:
    return LowRank(matrix(seed, R, K), matrix(seed + 1, N, R), jnp.float32(scale))


def doubly_quantized(uniform: bool) -> weights.QuantizedTensor:
    plain = quantize(matrix(), FLOAT32)
    table = jnp.linspace(0, 2, 256)[None]
    scales = weights.encode(plain.scales, table, jnp.ones((N, 1)), None, bits=8, group_size=2, uniform=uniform)
    return dataclasses.replace(plain, scales=scales)


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(K, 24, rngs=rngs)
        self.down = nnx.Linear(24, N, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x)))


class LinenMlp(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.Dense(N, name="down")(linen.gelu(linen.Dense(24, name="up")(x)))


def nnx_model() -> Mlp:
    return a4.quantize_model(Mlp(nnx.Rngs(0)), FLOAT32)


def linen_pair() -> tuple:
    net = LinenMlp()
    return a4.quantize_model((net, net.init(jax.random.key(0), X)["params"]), FLOAT32)


def tree() -> dict:
    return {"block": {"up": {"weight": quantize(matrix(), FLOAT32)}, "norm": jnp.ones(K)}}


def outputs(model) -> jax.Array:
    if isinstance(model, dict):
        return a4.matmul(X, model["block"]["up"]["weight"])
    return model[0].apply({"params": model[1]}, X) if isinstance(model, tuple) else model(X)


@functools.cache
def mixed() -> dict:
    return {
        "norm": np.ones(K, np.float32),
        "tuned": Sum((PermuteInput(quantize(matrix(), Int(4, group_size=8)), jnp.arange(K)), low_rank())),
        "any4": quantize(matrix(), FLOAT32),
        "mx4": quantize(matrix(), MX4()),
        "double": doubly_quantized(uniform=False),
        "ramp": doubly_quantized(uniform=True),
    }


TABLES = {
    *("['tuned'].terms[0].inner.scales", "['tuned'].terms[0].inner.offsets"),
    *("['any4'].lut", "['any4'].scales", "['mx4'].lut", "['ramp'].lut", "['ramp'].scales.scales"),
    *("['double'].lut", "['double'].scales.lut", "['double'].scales.scales"),
}
FACTORS = {"['tuned'].terms[1].a", "['tuned'].terms[1].b"}


@pytest.mark.parametrize(
    "what, expected", [("floats", {"['norm']"} | TABLES | FACTORS), ("tables", TABLES), ("lora", FACTORS)]
)
def test_trainable_marks(what: str, expected: set[str]) -> None:
    marks = trainable(mixed(), what)
    assert jax.tree.structure(marks) == jax.tree.structure(mixed())
    flat = jax.tree_util.tree_leaves_with_path(marks)
    assert all(type(mark) is bool for _, mark in flat)
    assert {jax.tree_util.keystr(path) for path, mark in flat if mark} == expected
    assert trainable(jax.eval_shape(lambda: mixed()), what) == marks


@pytest.mark.parametrize(
    "given, what, message",
    [
        ({"norm": np.ones(3)}, "lora", "'lora' marks nothing: it has no low-rank update; call add_lora"),
        ({"norm": np.ones(3), "low": low_rank()}, "tables", "'tables' marks nothing: it has no table"),
        ({"ids": np.arange(3)}, "floats", "'floats' marks nothing: it has no floating-point leaf"),
        ({"norm": np.ones(3)}, "codes", "got what='codes', .* pass one of 'floats', 'tables', 'lora'"),
    ],
)
def test_trainable_refuses(given: dict, what: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainable(given, what)


def test_gradients_of_every_number_equal_central_differences() -> None:
    """Of a sum of squares through leaf + low-rank pair, the differences taken in float64 by numpy."""
    leaf = quantize(matrix(), Int(4, group_size=8, table_dtype="float32", scale_dtype="float32"))
    leaf = dataclasses.replace(leaf, lut=jnp.tile(leaf.lut, (N, 1)), uniform=False)
    operator = Sum((leaf, low_rank()))
    codes = np.asarray(leaf.unpacked_codes())

    def loss(arrays: dict[str, np.ndarray]) -> float:
        w = np.take_along_axis(arrays["lut"], codes.astype(int), axis=1)
        w = w * arrays["scales"].repeat(8, axis=1) + arrays["offsets"].repeat(8, axis=1)
        w = w + 0.5 * arrays["b"] @ arrays["a"]
        return ((X.astype(np.float64) @ w.T) ** 2).mean()

    trained, frozen = partition(operator, trainable(operator))
    slope = jax.jit(jax.grad(lambda trained: (a4.matmul(X, combine(trained, frozen)) ** 2).mean()))(trained)
    values = {name: getattr(leaf, name) for name in ("lut", "scales", "offsets")}
    values |= {name: getattr(operator.terms[1], name) for name in ("a", "b")}
    values = {name: np.asarray(array, np.float64) for name, array in values.items()}
    for name, array in values.items():
        got = np.asarray(getattr(slope.terms[name in "ab"], name))
        expected = np.empty_like(got)
        for index in np.ndindex(array.shape):
            moved = []
            for step in (1e-4, -1e-4):
                shifted = array.copy()
                shifted[index] += step
                moved.append(loss(values | {name: shifted}))
            expected[index] = (moved[0] - moved[1]) / 2e-4
        assert np.abs(expected).max() > 0.01
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("model", [nnx_model, linen_pair, tree])
def test_add_lora_changes_no_output_and_no_quantized_array(model) -> None:
    before = model()
    after = add_lora(before, R, alpha=1.0)
    np.testing.assert_array_equal(outputs(before), outputs(after))
    shared = quantized_leaves(before)
    assert len(shared) > 0
    for path, operator in quantized_leaves(after).items():
        leaf, pair = operator.terms
        *_, n, k = leaf.shape
        assert (pair.a.shape, pair.b.shape, float(pair.scale)) == ((R, k), (n, R), 1.0 / R)
        for ours, theirs in zip(jax.tree.leaves(leaf), jax.tree.leaves(shared[path]), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_factor_a_is_normal_seeded_and_of_its_layer_alone() -> None:
    both = {name: {"weight": quantize(matrix(0, N, 4096), FLOAT32)} for name in ("one", "two")}

    def factor(model: dict, name: str, seed: int = 0) -> np.ndarray:
        return np.asarray(add_lora(model, 8, seed=seed)[name]["weight"].terms[1].a)

    np.testing.assert_allclose(factor(both, "one").std(), 4096**-0.5, rtol=0.02)
    np.testing.assert_array_equal(factor(both, "two"), factor({"two": both["two"]}, "two"))
    assert (factor(both, "one") != factor(both, "two")).any()
    assert (factor(both, "one") != factor(both, "one", seed=1)).any()


def test_a_pattern_chooses_layers() -> None:
    operators = quantized_leaves(add_lora(nnx_model(), R, pattern="down"))
    assert isinstance(operators["down"], Sum) and not isinstance(operators["up"], Sum)


@pytest.mark.parametrize(
    "model, arguments, message",
    [
        (tree, dict(rank=0), "got rank=0"),
        (tree, dict(rank=2, alpha=0), "got alpha=0.0, need a positive finite number"),
        (tree, dict(rank=2, pattern="sideways"), "'sideways' matches none of the 1"),
        (lambda: {"weight": matrix()}, dict(rank=2), "got a model without quantized layers"),
        (lambda: add_lora(tree(), 2), dict(rank=2), r"block\.up\.weight already has a low-rank update"),
    ],
)
def test_add_lora_refuses(model, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_lora(model(), **arguments)


@pytest.mark.parametrize("rank,error", [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError)])
def test_a_rank_is_a_whole_number_of_at_least_one(rank, error: type) -> None:
    with pytest.raises(error, match=f"got rank={rank!r}, a low-rank update needs"):
        add_lora(tree(), rank)


@pytest.mark.parametrize("wrt", [nnx.LoRAParam, Tables])
def test_twenty_steps_in_nnx(wrt: type) -> None:
    model = add_lora(nnx_model(), R)
    start = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Not(wrt))))
    optimizer = nnx.Optimizer(model, optax.adam(0.02), wrt=wrt)

    @nnx.jit
    def step(model, optimizer):
        loss, slope = nnx.value_and_grad(lambda m: ((m(X) - Y) ** 2).mean(), argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, slope)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    assert len(jax.tree.leaves(nnx.state(model, Codes))) == 2
    end = nnx.to_pure_dict(nnx.state(model, nnx.Not(wrt)))
    jax.tree.map(np.testing.assert_array_equal, start, end)


@pytest.mark.parametrize("what", ["lora", "tables", "floats"])
def test_twenty_steps_in_linen(what: str) -> None:
    module, params = add_lora(linen_pair(), R)
    mask = trainable(params, what)
    trained, frozen = partition(params, mask)
    optimizer = optax.adam(0.02)

    @jax.jit
    def step(trained, state):
        def loss(trained):
            return ((module.apply({"params": combine(trained, frozen)}, X) - Y) ** 2).mean()

        value, slope = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(trained, updates), state, value

    state, losses = optimizer.init(trained), []
    for _ in range(20):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    same = jax.tree.map(lambda x, y: bool((x == y).all()), combine(trained, frozen), params)
    assert jax.tree.structure(same) == jax.tree.structure(mask)
    # No weight of the tables' half stays where it was, and none of the rest moves.
    assert [not x for x in jax.tree.leaves(same)] == jax.tree.leaves(mask)


def test_optax_masked_keeps_no_state_for_the_rest() -> None:
    params = {"layer": {"kernel": Sum((quantize(matrix(), NF4(group_size=8)), low_rank())), "bias": jnp.zeros(N)}}
    state = optax.masked(optax.adam(1e-3), trainable(params, "lora")).init(params)
    moments = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim > 0]
    assert moments == [(R, K), (N, R)] * 2


def test_a_scanned_stack_gets_a_pair_for_each_layer() -> None:
    class Stack(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            layers = linen.scan(
                lambda layer, x: (linen.tanh(layer(x)), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return layers(linen.Dense(K, name="layer"), x)[0]

    net = Stack()
    pair = a4.quantize_model((net, net.init(jax.random.key(0), X)["params"]), FLOAT32, inputs=(X,))
    module, params = add_lora(pair, R, alpha=4.0)
    update = params["layer"]["kernel"].terms[1]
    assert (update.a.shape, update.b.shape, update.scale.tolist()) == ((3, R, K), (3, K, R), [2.0] * 3)
    assert (update.a[0] != update.a[1]).any()
    np.testing.assert_array_equal(pair[0].apply({"params": pair[1]}, X), module.apply({"params": params}, X))


def test_a_tuned_tree_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    tuned = {"layer": {"kernel": Sum((quantize(matrix(), NF4(group_size=8)), low_rank())), "bias": jnp.ones(N)}}
    a4.save(tmp_path / "tuned", tuned)
    back = a4.load(tmp_path / "tuned")
    assert jax.tree.structure(back) == jax.tree.structure(tuned)
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(tuned), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
