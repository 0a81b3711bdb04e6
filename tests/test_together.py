"""Products of one input with several weights: the same numbers as one by one, in one call where there is one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import any4_jax as a4
from any4_jax import choice
from any4_jax.product import BACKENDS, matmul, matmul_each, plan
from any4_jax.weights import Operator, operator, product
from cuda_ffi import registration
from cuda_ffi.lut_product import TARGET

needs_library = pytest.mark.skipif(
    registration.why_not("cpu") is not None, reason=f"no C++ library: {registration.why_not('cpu')}"
)
NF4, INT4, INT8 = a4.methods.NF4(group_size=32), a4.methods.Int(4, group_size=32), a4.methods.Int(8, group_size=32)


def weights(*recipes) -> list:
    """Weights [7 + i, 200], the last group short."""
    draws = np.random.default_rng(0)
    return [
        a4.quantize(jnp.asarray(draws.normal(size=(7 + i, 200)), jnp.float32), method)
        for i, method in enumerate(recipes)
    ]


def own_tables(w):
    """The same weight with a table for each row."""
    return w.__class__(**{**vars(w), "lut": jnp.tile(w.lut, (w.shape[0], 1))})


def inputs(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def calls(x, ws) -> int:
    return jax.jit(matmul_each).lower(x, tuple(ws)).as_text().count(f"@{TARGET}(")


@pytest.mark.parametrize("m", [1, 2, 3, 40])
@pytest.mark.parametrize("recipes", [(NF4, INT4, NF4), (INT8, INT8)])
def test_results_are_those_of_single_products(m: int, recipes) -> None:
    """Offsets or none, one table or a table a row, in one call: bit for bit what each gives alone."""
    x, ws = inputs(m, 200), weights(*recipes)
    ws[-1] = own_tables(ws[-1])
    for y, w in zip(jax.jit(matmul_each)(x, tuple(ws)), ws, strict=True):
        np.testing.assert_array_equal(y, jax.jit(matmul)(x, w))


@needs_library
def test_alike_weights_share_a_call() -> None:
    assert calls(inputs(1, 200), weights(NF4, INT4, NF4)) == 1
    assert calls(inputs(1, 200), weights(NF4, INT8)) == 2
    assert calls(inputs(1, 200), [*weights(NF4, NF4), inputs(3, 200)]) == 2


@needs_library
def test_a_block_makes_four_calls() -> None:
    """q, k, v; o; gate, up; down: the blocks of a model share one program."""
    model = a4.quantize_model(a4.models.load("tiny"), NF4)
    assert jax.jit(lambda tokens: model(tokens)).lower(jnp.ones((1, 4), jnp.int32)).as_text().count(f"@{TARGET}(") == 4


def test_leading_axes_of_x_and_vmap() -> None:
    x, ws = inputs(2, 3, 200), weights(NF4, NF4)
    whole = matmul_each(x, ws)
    for y, mapped, w in zip(whole, jax.vmap(lambda row: matmul_each(row, ws))(x), ws, strict=True):
        assert y.shape == (2, 3, w.shape[0])
        np.testing.assert_array_equal(y, mapped)


def test_gradients_are_those_of_single_products() -> None:
    x, ws = inputs(3, 200), weights(NF4, INT4)

    def loss(function):
        return jax.grad(
            lambda x, scales: sum(
                jnp.sum(jnp.sin(y))
                for y in function(x, [w.__class__(**{**vars(w), "scales": s}) for w, s in zip(ws, scales, strict=True)])
            ),
            argnums=(0, 1),
        )(x, [w.scales for w in ws])

    together, single = loss(matmul_each), loss(lambda x, ws: [matmul(x, w) for w in ws])
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(single), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_wrong_input_is_told_as_by_matmul() -> None:
    with pytest.raises(ValueError, match="must end in K=200"):
        matmul_each(inputs(1, 3), weights(NF4, NF4))
    with pytest.raises(TypeError, match="need a floating dtype"):
        matmul_each(jnp.ones((1, 200), jnp.int32), weights(NF4, NF4))
    with pytest.raises(ValueError, match=r"got x of shape \(\) "):
        matmul_each(jnp.float32(1), weights(NF4, NF4))


@operator()
class Beside(Operator):
    """Rows of several operators of one K, one below the other; its product asks for all of them together."""

    blocks: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(block.shape[-2] for block in self.blocks), self.blocks[0].shape[-1])


@product.register
def _(w: Beside, x, backend=None):
    return jnp.concatenate(matmul_each(x, w.blocks), axis=1)


@pytest.mark.parametrize("recipes", [(NF4, INT4, NF4), (NF4, INT8)])
def test_products_together_are_explained(recipes) -> None:
    x, ws = inputs(2, 200), weights(*recipes)
    stacked = Beside(tuple(ws))

    def verdicts(w: Operator) -> list[str]:
        """Without the numbers of products that are several."""
        return [line for line in a4.explain(x, w, "cpu").splitlines() if not line.startswith("product ")]

    words = [line for w in ws for line in verdicts(w)]
    assert verdicts(stacked) == words
    np.testing.assert_array_equal(a4.matmul(x, stacked), jnp.concatenate(matmul_each(x, ws), axis=1))
    assert verdicts(stacked) == words
    assert [w.shape for _, w in plan.problems(matmul_each, x, tuple(ws))] == [w.shape for w in ws]


def test_each_weight_gets_the_backend_that_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call is shared where the plan has different backends for the weights, nor where theirs has no such call."""
    seen = []

    def run(x, w):
        seen.append(w.shape[0])
        return BACKENDS.named("xla").run(x, w)

    def supports(x, w, platform):
        return None if w.shape[0] == 8 and platform == "cpu" else "N isn't 8, or it isn't a CPU"

    eight = dataclasses.replace(BACKENDS.named("xla"), name="eight", supports=supports, run=run)
    monkeypatch.setattr(plan, "BACKENDS", choice.Choice((eight, *BACKENDS.options)))
    x, ws = inputs(1, 200), weights(NF4, NF4)
    for y, w in zip(matmul_each(x, ws), ws, strict=True):
        np.testing.assert_allclose(y, matmul(x, w, "xla"), rtol=1e-5, atol=1e-5)
    assert seen == [8]


def test_arrays_in_hand_are_multiplied_where_they_lie(monkeypatch) -> None:
    """`jax.lax.platform_dependent` outside of a program takes the default platform's branch, wherever operands are."""

    def refused(*operands, **branches):
        raise AssertionError("platform_dependent was asked")

    monkeypatch.setattr(jax.lax, "platform_dependent", refused)
    x, ws = inputs(2, 200), weights(NF4, NF4)
    for y, w in zip(matmul_each(x, ws), ws, strict=True):
        np.testing.assert_array_equal(y, matmul(x, w))
