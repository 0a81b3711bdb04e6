"""An operator from outside the package, registered once, goes everywhere that those of the package go."""

import dataclasses
import re
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import any4_jax as a4
from any4_jax import methods
from any4_jax.cli import main
from any4_jax.methods import Int, Result
from any4_jax.nn.linen import boxed
from any4_jax.nn.nnx import Codes, Tables
from any4_jax.product import lookup, planned
from any4_jax.surgery import quantized_leaves
from any4_jax.surgery.trees import box_of
from any4_jax.weights import Operator, Sum, dequantize, is_operator, operator, places, product, take, take_rows

N, K = 12, 32
X = np.random.default_rng(1).normal(size=(5, K)).astype(np.float32)


@operator(
    static=("tied",),
    axes={"left": "..", "right": "..", "gain": "N"},
    trains={"left": lambda w: None if w.tied else "tables", "gain": "tables"},
)
class Kronecker(Operator):
    """W = gain[:, None] * kron(left, right): left [*L, A, B], an operator right [*L, C, D], gain [*L, A * C]."""

    left: jax.Array
    right: Any
    gain: jax.Array
    tied: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.gain.shape, self.left.shape[-1] * self.right.shape[-1])


@dequantize.register
def _(w: Kronecker, dtype=jnp.float32):
    blocks = jnp.einsum("...ab,...cd->...acbd", w.left.astype(jnp.float32), dequantize(w.right))
    return (w.gain[..., None] * blocks.reshape(w.shape)).astype(dtype)


@product.register
def _(w: Kronecker, x, backend=None):
    b = w.left.shape[1]
    inner = product(w.right, x.reshape(x.shape[0] * b, -1), backend).reshape(x.shape[0], b, -1)
    y = jnp.einsum("ab,mbc->mac", w.left, inner.astype(jnp.float32), precision="highest")
    return (y.reshape(x.shape[0], -1) * w.gain).astype(x.dtype)


@take_rows.register
def _(w: Kronecker, rows):
    outer, inner = jnp.divmod(rows, w.right.shape[0])
    right = dequantize(take_rows(w.right, inner))
    blocks = w.left[outer][:, :, None] * right[:, None, :]
    return w.gain[rows][:, None] * blocks.reshape(rows.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Two by two blocks, each a multiple of the first, which is rounded to 8 bits."""

    name: ClassVar[str] = "blocks"
    sequential: ClassVar[bool] = False
    needs: ClassVar[tuple] = ()
    group_size: int = 16

    def apply(self, w: jax.Array, gathered: Any) -> Result:
        c, d = w.shape[0] // 2, w.shape[1] // 2
        blocks = w.reshape(2, c, 2, d).transpose(0, 2, 1, 3)
        first = blocks[0, 0]
        left = (blocks * first).sum((2, 3)) / (first**2).sum()
        right = Int(8, group_size=self.group_size).apply(first, None).operator
        return Result(Kronecker(left, right, jnp.ones(w.shape[0]), False))

    def check(self, gathered: bool) -> None: ...


def matrix(n: int = N, k: int = K, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, k)), jnp.float32)


def weight(seed: int = 0) -> Kronecker:
    return a4.quantize(matrix(seed=seed), Blocks())


def stacked() -> Kronecker:
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), weight(0), weight(1))


def same(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_it_stands_for_its_matrix() -> None:
    w = weight()
    assert is_operator(w) and w.shape == (N, K)
    dense = np.kron(w.left, dequantize(w.right)) * np.asarray(w.gain)[:, None]
    np.testing.assert_allclose(dequantize(w), dense, rtol=1e-6)
    assert w.nbytes == sum(array.nbytes for array in jax.tree.leaves(w))
    assert w.bits_per_weight == 8 * w.nbytes / (N * K)


@pytest.mark.parametrize("backend", [None, "xla"])
def test_products(backend: str | None) -> None:
    w = weight()
    expected = X.astype(np.float64) @ np.asarray(dequantize(w), np.float64).T
    np.testing.assert_allclose(jax.jit(a4.matmul, static_argnums=2)(X, w, backend), expected, rtol=1e-4, atol=1e-4)
    both = Sum((w, matrix(seed=3)))
    np.testing.assert_allclose(a4.matmul(X, both), X @ np.asarray(dequantize(both)).T, rtol=1e-4, atol=1e-4)
    # `take` goes through it: the leaf within is read out of its stack.
    np.testing.assert_allclose(a4.matmul(X, take(stacked(), 0), backend), expected, rtol=1e-4, atol=1e-4)
    for y in a4.matmul_each(X, [w, w]):
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_explain_tells_what_its_product_asks_for() -> None:
    lines = a4.explain(X, weight(), "tpu").splitlines()
    assert lines == a4.explain(X.reshape(10, K // 2), weight().right, "tpu").splitlines()
    assert lines[-1] == "xla: taken"
    with pytest.raises(ValueError, match="backend 'cuda' can't do this: it runs on cuda, not on cpu"):
        a4.matmul(X, weight(), "cuda")


def test_rows_are_looked_up() -> None:
    w, rows = weight(), jnp.asarray([[0, 11], [7, 7]])
    np.testing.assert_allclose(lookup(w, rows), dequantize(w)[rows], rtol=1e-6)


class Net(nnx.Module):
    def __init__(self) -> None:
        self.up = nnx.Linear(K, N, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(N, 4, rngs=nnx.Rngs(1))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.relu(self.up(x)))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.CATALOGUE, "blocks", Blocks)


@pytest.mark.usefixtures("known")
def test_a_model_of_it_is_saved_and_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = a4.quantize_model(Net(), Blocks())
    assert all(isinstance(w, Kronecker) for w in quantized_leaves(model).values())
    arrays = model.up.arrays
    assert {name: type(variable) for name, variable in arrays.items()} == {
        "left": Tables,
        "right/codes": Codes,
        "right/lut": nnx.Variable,
        "right/scales": Tables,
        "right/offsets": Tables,
        "gain": Tables,
    }
    a4.save(tmp_path / "net", model)
    again = a4.load(tmp_path / "net", into=nnx.eval_shape(Net))
    np.testing.assert_array_equal(again(X), model(X))
    same(a4.load(tmp_path / "net")["up"]["kernel"], model.up.weight)
    rebuilt = a4.from_arrays(*a4.to_arrays({"w": weight()}))
    same(rebuilt["w"], weight())
    assert main(["inspect", str(tmp_path / "net")]) == 0
    assert f"{weight().bits_per_weight:.3f}" in capsys.readouterr().out


def test_sharding_names_follow_its_axes() -> None:
    kernel = linen.Partitioned(jnp.zeros((2, K, N)), ("layers", "embed", "mlp"))
    boxes = boxed(stacked(), kernel)
    assert boxes.left.names == boxes.right.codes.names == boxes.right.scales.names == ("layers", None, None)
    assert boxes.gain.names == ("layers", "mlp")
    assert box_of(boxes).names == ("layers", None, "mlp")
    layer = a4.nn.nnx.Any4Linear.of(stacked(), kernel_metadata={"out_sharding": ("embed", "mlp")})
    assert layer.arrays["gain"].out_sharding == (None, "mlp")
    found = {place.name: (place.axes, place.trained) for place, _ in places(weight())}
    assert found["right/codes"] == ("*..", "floats") and found["gain"] == ("*N", "tables")


def test_training_marks_what_was_registered() -> None:
    free, tied = weight(), dataclasses.replace(weight(), tied=True)
    for w, marked in (
        (free, {"left", "gain", "right/scales", "right/offsets"}),
        (tied, {"gain", "right/scales", "right/offsets"}),
    ):
        marks = a4.trainable({"w": w, "norm": jnp.ones(3)}, "tables")
        names = {place.name for place, mark in places(marks["w"]) if mark}
        assert names == marked and not marks["norm"]
    trained, frozen = a4.partition(tied, a4.trainable(tied))
    assert trained.left is None and frozen.gain is None
    target = 2 * a4.matmul(X, tied)
    optimizer = optax.adam(0.001)
    state, losses = optimizer.init(trained), []

    @jax.jit
    def step(trained: Any, state: Any) -> Any:
        loss = lambda trained: ((a4.matmul(X, a4.combine(trained, frozen)) - target) ** 2).mean()  # noqa: E731
        value, slope = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(trained, updates), state, value

    for _ in range(20):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("make", [weight, lambda: a4.quantize(matrix(), Int(4, group_size=16))])
def test_low_rank_updates_go_on_top_and_are_counted(make: Any, tmp_path: Path, capsys: Any) -> None:
    tree = a4.add_lora({"layer": {"weight": make()}}, 2)
    total = tree["layer"]["weight"]
    assert isinstance(total, Sum)
    np.testing.assert_allclose(a4.matmul(X, total), a4.matmul(X, make()), rtol=1e-6)
    a4.save(tmp_path / "tuned", tree)
    assert main(["inspect", str(tmp_path / "tuned")]) == 0
    bits = 8 * sum(term.nbytes for term in total.terms) / (N * K)
    assert re.search(
        rf"^layer\.weight +\w+ \+ LoRA rank 2 +{bits:.3f} +{N} x {K}", capsys.readouterr().out, re.MULTILINE
    )


def test_registrations_are_checked() -> None:
    def shaped(name: str, **fields: Any) -> type:
        return type(name, (Operator,), {"__annotations__": fields, "shape": property(lambda w: (1, 1))})

    with pytest.raises(
        ValueError, match="got an operator Sum, but in checkpoints that name means any4_jax.weights.sum.Sum"
    ):
        operator()(shaped("Sum", terms=tuple))
    with pytest.raises(ValueError, match="got the field 'lutt', Toy has lut; name one of these"):
        operator(axes={"lutt": "N"})(shaped("Toy", lut=Any))
    with pytest.raises(ValueError, match="got Toy with a field 'operator'"):
        operator()(shaped("Toy", operator=Any))
    with pytest.raises(TypeError, match="got the class int, need a subclass of Operator with a shape"):
        operator()(int)
    with pytest.raises(TypeError, match="got the class Shapeless"):
        operator()(type("Shapeless", (Operator,), {}))


def test_what_is_no_operator_is_refused() -> None:
    @operator()
    class Half(Operator):
        array: jax.Array

        @property
        def shape(self) -> tuple[int, ...]:
            return self.array.shape

    w = Half(matrix())
    for call, name in (
        (lambda: a4.matmul(X, w), "product"),
        (lambda: dequantize(w), "dequantize"),
        (lambda: lookup(w, jnp.arange(2)), "take_rows"),
    ):
        with pytest.raises(TypeError, match=f"got a Half, need an array or an operator.*; register {name} for it"):
            call()


def test_a_product_that_leaves_its_own_type_to_kernels_is_refused() -> None:
    @operator()
    class Whole(Operator):
        array: jax.Array

        @property
        def shape(self) -> tuple[int, ...]:
            return self.array.shape

    @product.register
    def _(w: Whole, x, backend=None):
        return planned(x, w, backend)

    for call in (a4.matmul, a4.explain):
        with pytest.raises(
            ValueError, match="none of the backends 'cuda', .*because it multiplies by the parts of a W"
        ):
            call(X, Whole(matrix()))


def test_a_checkpoint_of_an_unknown_operator_says_what_to_import(tmp_path: Path) -> None:
    arrays, spec = a4.to_arrays({"w": weight()})
    spec["tree"]["dict"]["w"]["leaf"]["operator"] = "Hadamard"
    with pytest.raises(ValueError, match="got an operator 'Hadamard', .*; import the module that registers it"):
        a4.from_arrays(arrays, spec)
    with pytest.raises(TypeError, match="w/tied: got a set, and a checkpoint takes arrays"):
        a4.to_arrays({"w": dataclasses.replace(weight(), tied={1})})
