"""SmoothQuant: the published factors, what smoothing keeps, rounded inputs in models and checkpoints, its products."""

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same

import any4_jax as a4
from any4_jax import statistics
from any4_jax.checkpoint import load, save
from any4_jax.checkpoint.laws import check_operator
from any4_jax.checkpoint.operators import operator_from_spec, operator_spec
from any4_jax.cli.methods import add_method, method_from
from any4_jax.methods import Int, Result, SmoothQuant, quantize
from any4_jax.methods.apply import apply_site
from any4_jax.methods.base import SiteWeights
from any4_jax.methods.smoothquant import factors
from any4_jax.models.fold import fold
from any4_jax.models.tiny import random_llama
from any4_jax.product.quantized_input import quantize_input
from any4_jax.surgery import map_operators, quantized_leaves
from any4_jax.weights import QuantizeInput, ScaleInput, Sum, dequantize, take

TOKENS = np.random.default_rng(0).integers(0, 128, (3, 12), dtype=np.int32)
K = 24
WHOLE = Int(bits=8, symmetric=True, group_size=K)
W6 = Int(bits=6, symmetric=True, group_size=1 << 30)


@dataclasses.dataclass(frozen=True)
class Exact:
    """Keeps the matrix that it is given."""

    name: ClassVar[str] = "toy-exact"
    needs: ClassVar[tuple[statistics.Statistic, ...]] = ()
    sequential: bool = False

    def check(self, gathered: bool) -> None:
        del gathered

    def apply(self, w, gathered) -> Result:
        del gathered
        return Result(Sum((w,)))


def layer(seed: int = 0) -> dict[str, jax.Array]:
    """Two matrices of K inputs, one of which is hardly read."""
    rng = np.random.default_rng(seed)
    columns = np.where(np.arange(K) == 7, 1e-3, 10 ** rng.uniform(-0.5, 0.5, K))
    return {name: jnp.asarray(rng.normal(size=(n, K)) * columns, jnp.float32) for name, n in (("q", 8), ("k", 5))}


def inputs(tokens: int = 64) -> jax.Array:
    """Tokens with channels of different sizes, one of which is always zero."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(tokens, K)) * np.where(np.arange(K) == 4, 0, 10 ** rng.uniform(-1, 1.5, K))
    return jnp.asarray(x, jnp.float32)


def smoothed(method: SmoothQuant, x: jax.Array | None = None, **site):
    gathered = statistics.from_activations(inputs() if x is None else x, statistics=method.needs)
    return apply_site(SiteWeights(layer(), **site), method, gathered, "site")


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_published_factors(alpha: float) -> None:
    """Equation 4 over all matrices of the site: with 1/2 the largest input and weight of a channel are equal, with 1
    every input is at most 1, with 0 every weight."""
    made = smoothed(SmoothQuant(inner=Exact(), alpha=alpha, size="max"))
    x = np.abs(np.asarray(inputs(), np.float64)).max(0)
    w = np.max([np.abs(np.asarray(m, np.float64)).max(0) for m in layer().values()], axis=0)
    floored = np.maximum(x, 1e-5 * x.max())
    np.testing.assert_allclose(made.input_scale, w ** (1 - alpha) / floored**alpha, rtol=1e-5)
    scaled = np.max([np.abs(dequantize(result.operator)).max(0) for result in made.results.values()], axis=0)
    largest = x * np.asarray(made.input_scale)
    live = x > 0
    expected = {0.0: (None, 1.0), 0.5: (scaled, None), 1.0: (1.0, None)}.get(alpha, (None, None))
    for found, need in zip((largest, scaled), expected, strict=True):
        if need is not None:
            np.testing.assert_allclose(found[live], np.broadcast_to(need, K)[live], rtol=1e-5)
    assert np.isfinite(made.input_scale).all()


def test_channels_that_repeat_share_a_factor_where_it_is_folded() -> None:
    shared, own = (
        smoothed(SmoothQuant(inner=Exact()), repeat=3, width=4, foldable=foldable).input_scale.reshape(2, 3, 4)
        for foldable in (True, False)
    )
    assert (shared == shared[:, :1]).all() and not np.isclose(own, own[:, :1]).all()


def test_other_sizes_are_evened_out() -> None:
    """With the root mean square and 1/2, those of a channel's inputs and of its weights are equal."""
    made = smoothed(SmoothQuant(inner=Exact(), alpha=0.5))
    scaled = np.concatenate([dequantize(result.operator) for result in made.results.values()])
    x = np.asarray(inputs(), np.float64) * made.input_scale
    live = x.any(axis=0)
    sizes = (np.sqrt(np.square(each).mean(axis=0))[live] for each in (x, np.asarray(scaled, np.float64)))
    np.testing.assert_allclose(*sizes, rtol=1e-5)


def test_the_search_takes_what_has_the_least_error() -> None:
    """Here the channels' root mean squares even out more than their outliers in single tokens do."""
    method, x = SmoothQuant(W6, search=5, input_bits=6), inputs().at[jnp.arange(5), jnp.arange(5)].multiply(40)
    w, found = jnp.concatenate(list(layer().values())), {}
    y = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    largest = [jnp.abs(each).max(axis=0) for each in (x, w)]
    rms = [jnp.sqrt(jnp.square(each).mean(axis=0)) for each in (x, w)]
    for size, alpha in itertools.product((0, 1), np.linspace(0, 1, method.search, dtype=np.float32)):
        s = factors(*(largest, rms)[size], alpha)
        smooth = QuantizeInput(quantize(w * s, W6), None, 6, False, "token")
        rounded = np.asarray(quantize_input(x / s, smooth), np.float64)
        error = np.square(rounded @ np.asarray(dequantize(smooth), np.float64).T - y).sum(axis=1)
        found[size, float(alpha)] = (error / np.square(y).sum(axis=1)).mean()
    made, best = smoothed(method, x), min(found, key=found.__getitem__)
    for result in made.results.values():
        assert (int(result.notes["rms"]), float(result.notes["alpha"])) == best
        np.testing.assert_allclose(result.notes["output_error"], found[best], rtol=1e-2)
    assert best[0] == 1 and 0 < best[1] < 1, "else any rule would do"


@pytest.fixture(scope="module")
def model():
    """A Llama of one block, two inputs of which are a hundred times as large as they were; it computes the same."""
    plain = random_llama(dataclasses.replace(random_llama().config, num_hidden_layers=1, intermediate_size=48))
    block = plain.blocks[0]
    for site in plain.sites(0)[::2]:
        block, _ = fold(block, site, np.where(np.isin(np.arange(48), (5, 30)), 100, 1))
    plain.layers[0] = block
    return plain


def logits(model, tokens=TOKENS) -> np.ndarray:
    return np.asarray(model(tokens))


@pytest.mark.parametrize("sequential", [False, True])
def test_smoothing_alone_changes_nothing(model, sequential: bool) -> None:
    """All factors are folded, also where the inner method looks at the model as quantized so far."""
    new = a4.quantize_model(model, SmoothQuant(inner=Exact(sequential=sequential)), data=TOKENS)
    assert not any(isinstance(w, ScaleInput) for w in quantized_leaves(new).values())
    assert not np.allclose(new.layers[0].input_layernorm.scale[...], model.layers[0].input_layernorm.scale[...])
    unrounded = map_operators(new, lambda path, w: w.inner)
    assert np.abs(logits(unrounded) - logits(model)).max() < 1e-5 * np.abs(logits(model)).max()


def test_outliers_cost_less_once_they_are_smoothed(model) -> None:
    float_logits = logits(model)
    smooth, plain = (
        np.square(logits(a4.quantize_model(model, method, data=TOKENS)) - float_logits).mean()
        for method in (SmoothQuant(), SmoothQuant(alpha=None))
    )
    assert smooth < 0.05 * plain


def test_a_static_scale_is_the_same_for_any_batch_and_is_kept(model, tmp_path: Path) -> None:
    new = a4.quantize_model(model, SmoothQuant(per="tensor", symmetric=True), data=TOKENS)
    assert all(w.scale.shape == () and w.per == "tensor" for w in quantized_leaves(new).values())
    save(tmp_path / "model", new)
    back = load(tmp_path / "model")
    assert_same(quantized_leaves(back), quantized_leaves(new))
    assert back.recipe == new.recipe
    both = logits(back, TOKENS[:2])
    for row in range(2):
        np.testing.assert_allclose(logits(back, TOKENS[row : row + 1])[0], both[row], rtol=1e-5, atol=1e-5)


def test_what_is_larger_than_a_static_scale_is_clipped() -> None:
    w = QuantizeInput(quantize(jnp.ones((2, 4)), WHOLE), None, 8, True, "tensor", jnp.float32(2.54))
    x = jnp.asarray([[0.02, -0.029, 2.54, 9.0], [-9.0, 0.0, 1.0, 0.011]])
    np.testing.assert_allclose(
        quantize_input(x, w), [[0.02, -0.02, 2.54, 2.54], [-2.56, 0, 1, 0.02]], rtol=1e-6, atol=1e-6
    )
    levels = dataclasses.replace(w, levels=jnp.asarray([-1.0, 0, 0.5, 1]), bits=2)
    np.testing.assert_allclose(quantize_input(x, levels), [[0, 0, 2.54, 2.54], [-2.54, 0, 1.27, 0]], rtol=1e-6)
    zero = dataclasses.replace(w, scale=jnp.float32(0))
    assert np.isfinite(quantize_input(x, zero)).all()


PRODUCTS = [
    (8, 8, True, "token", None),
    (6, 6, True, "token", None),
    (6, 6, False, "token", None),
    (4, 8, False, "token", None),
    (4, 8, True, "tensor", 3.0),
]


@pytest.mark.parametrize("bits, input_bits, symmetric, per, scale", PRODUCTS)
def test_products_are_of_integers(bits: int, input_bits: int, symmetric: bool, per, scale) -> None:
    leaf = quantize(layer()["q"], Int(bits=bits, symmetric=symmetric, group_size=1 << 30))
    w = QuantizeInput(leaf, None, input_bits, symmetric, per, None if scale is None else jnp.float32(scale))
    stack, x = jax.tree.map(lambda a: jnp.stack([a, a]), w), inputs(6)
    traced = jax.jit(lambda x, stack: a4.matmul(x, take(stack, 1), backend="xla")).trace(x, stack)
    for lowered in (traced.lower(), traced.lower(lowering_platforms=("cuda",))):
        (dot,) = (line for line in lowered.as_text().splitlines() if "dot_general" in line)
        assert dot.count("xi8>") == 2 and "xi32>" in dot
    run = traced.lower().compile()
    assert any("= s32[" in line and " dot(" in line for line in run.as_text().splitlines())
    y = np.asarray(quantize_input(x, w), np.float64) @ np.asarray(dequantize(leaf), np.float64).T
    np.testing.assert_allclose(run(x, stack), y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


def test_checkpoints_without_the_scale_of_inputs_are_read() -> None:
    arrays: dict[str, jax.Array] = {}
    w = QuantizeInput(quantize(layer()["q"], WHOLE), None, 8, True, "token")
    spec = operator_spec(w, "w", arrays)
    del spec["scale"]
    assert_same(operator_from_spec(spec, arrays.__getitem__), w)


@pytest.mark.parametrize("fields", [dict(symmetric=False), dict(per="token"), dict(scale=jnp.ones(2))])
def test_a_scale_of_inputs_that_fits_nothing_is_refused(fields: dict[str, Any]) -> None:
    w = QuantizeInput(quantize(layer()["q"], WHOLE), None, 8, True, "tensor", jnp.float32(2))
    check_operator("w", w)
    with pytest.raises(ValueError, match="w: the arrays of its QuantizeInput don't belong together: scale is"):
        check_operator("w", dataclasses.replace(w, **fields))


@pytest.mark.parametrize(
    "method, gathered, words",
    [
        (SmoothQuant(), False, "with alpha=0.4 and per='token' needs the size of each layer's inputs; pass data"),
        (SmoothQuant(alpha=None, per="tensor"), False, "alpha=None and per='tensor' needs the size of each"),
        (SmoothQuant(search=1), True, "got search=1, at least 2 values of alpha are compared"),
        (SmoothQuant(alpha=None, search=3), True, "got search=3 with alpha=None, which smooths nothing"),
        (SmoothQuant(per="tensor", symmetric=False), True, "got symmetric=False with per='tensor'"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(method: SmoothQuant, gathered: bool, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        method.check(gathered)


def test_the_command_line_gives_all_fields() -> None:
    argv = ["--method", "smoothquant", "--inner-bits", "6", "--input-bits", "6", "--search", "20", "--alpha", "0.55"]
    argv += ["--order", "by_site"]
    parser = argparse.ArgumentParser()
    add_method(parser, argv)
    assert method_from(parser.parse_args(argv)) == SmoothQuant(
        inner=W6, input_bits=6, search=20, alpha=0.55, order="by_site"
    )
    # The help tells the defaults of the inner method that is there, not those of its class.
    for inner, told in ((None, "width of a code. (default: 8)"), ("gptq", "width of a code. (default: 4)")):
        parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=999))
        add_method(parser, ["--method", "smoothquant", *(["--inner", inner, "--inner-inner", "int"] if inner else [])])
        assert told in parser.format_help()
