"""AWQ: its published formulas in float64, the scale applied once, folded or kept, and its error next to the inner's."""

import argparse
import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same
from toy_methods import EvenInputs

from any4_jax import statistics
from any4_jax.checkpoint import load, save
from any4_jax.cli.methods import add_method, method_from
from any4_jax.data import bundled
from any4_jax.methods import AWQ, NF4, Any4, Int, Result, SiteWeights, quantize
from any4_jax.methods.apply import apply_site
from any4_jax.models.tiny import random_llama, tiny
from any4_jax.statistics import Moments, Sample
from any4_jax.surgery import explain, quantized_leaves
from any4_jax.walk import calibrate, quantize_model
from any4_jax.weights import ScaleInput, dequantize

K, G, T = 32, 8, 40
INT = Int(group_size=G, scale_dtype="float32", table_dtype="float32")
FLOAT_ZERO = dataclasses.replace(INT, zero_point="float")
RNG = np.random.default_rng(3)
X = (RNG.normal(size=(T, K)) * 10.0 ** RNG.uniform(-1, 1, K)).astype(np.float32)
W = {name: RNG.standard_t(4, (n, K)).astype(np.float32) for name, n in (("a", 6), ("b", 4))}
TOKENS = np.random.default_rng(0).integers(0, 128, (3, 12), dtype=np.int32)


def applied(method, weights=W, x=X, **site):
    gathered = statistics.from_activations(x, statistics=dict.fromkeys(method.needs))
    arrays = {name: jnp.asarray(w) for name, w in weights.items()}
    return apply_site(SiteWeights(arrays, **site), method, gathered, "site")


def rounded(w: np.ndarray, integer_zero: bool) -> np.ndarray:
    """Integers of 4 bits in groups of G. About an integer zero, as AWQ's code has them; or about the least weight, for
    what clips both ends of a range has its integer zero at 7.5, and float32 and float64 round that differently."""
    groups = w.reshape(len(w), -1, G)
    low, high = groups.min(axis=2)[:, :, None], groups.max(axis=2)[:, :, None]
    if integer_zero:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    step = (high - low) / 15
    zero = np.round(-low / step) if integer_zero else -low / step
    codes = np.clip(np.round(groups / step + zero), 0, 15)
    return ((codes - zero) * step).reshape(w.shape)


def published(x: np.ndarray, method: AWQ):
    """Equations 4 and 5 of the paper, then the clipping of its code, in float64."""
    ratios, clips = method.ratios, method.clips
    quantized = functools.partial(rounded, integer_zero=method.inner.zero_point == "integer")
    x = x.astype(np.float64)
    every = {name: w.astype(np.float64) for name, w in W.items()}

    def factor(ratio: float) -> np.ndarray:
        s = np.maximum(np.abs(x).mean(axis=0) ** ratio, 1e-4)
        return s / np.sqrt(s.max() * s.min())

    def loss(s: np.ndarray) -> float:
        return sum(
            np.square((quantized(w * s) - w * s) @ (x / s).T).sum() / np.square(w @ x.T).sum() for w in every.values()
        )

    losses = [loss(factor(i / ratios)) for i in range(ratios)]
    ratio = int(np.argmin(losses)) / ratios
    s, found = factor(ratio), {}
    for name, w in every.items():
        shares = [1 - i / 20 for i in range(max(clips, 1))]
        peak = np.abs((w * s).reshape(len(w), -1, G)).max(axis=2)
        limits = [np.repeat(peak * share, G, axis=1) for share in shares]
        gaps = [quantized(np.clip(w * s, -limit, limit)) - w * s for limit in limits]
        parts = [np.einsum("ngk,tgk->ntg", gap.reshape(len(w), -1, G), (x / s).reshape(T, -1, G)) for gap in gaps]
        best = np.square(parts).sum(axis=2).argmin(axis=0)
        limit = np.repeat(np.take_along_axis(np.stack([peak * share for share in shares]), best[None], 0)[0], G, axis=1)
        found[name] = quantized(np.clip(w * s, -limit, limit))
    return ratio, s, found, losses[0]


@pytest.mark.parametrize("method", [AWQ(INT, clips=0), AWQ(FLOAT_ZERO)])
def test_the_published_formulas(method) -> None:
    made = applied(method)
    ratio, s, found, before = published(X, method)
    np.testing.assert_allclose(made.input_scale, 1 / s, rtol=1e-5)
    for name, w in found.items():
        result = made.results[name]
        np.testing.assert_allclose(dequantize(result.operator), w, rtol=1e-4, atol=1e-6)
        assert float(result.notes["ratio"]) == np.float32(ratio)
        gap = (w / s - W[name]) @ X.T.astype(np.float64)
        np.testing.assert_allclose(
            result.notes["error"], np.square(gap).sum() / np.square(W[name] @ X.T).sum(), rtol=1e-3
        )
    np.testing.assert_allclose(
        sum(float(one.notes["error_before"]) for one in made.results.values()), before, rtol=1e-3
    )
    assert ratio > 0
    assert sum(float(one.notes["error"]) for one in made.results.values()) < before


@pytest.mark.parametrize(
    "inner", [NF4(group_size=G), Any4(bits=2, group_size=G, refit=False)], ids=lambda method: method.name
)
def test_at_ratio_0_the_result_is_the_inner_methods(inner) -> None:
    made = applied(AWQ(inner, search=INT, ratios=1, clips=0))
    np.testing.assert_array_equal(made.input_scale, np.ones(K))
    gathered = statistics.from_activations(X, statistics=dict.fromkeys(inner.needs))
    for name, w in W.items():
        assert_same(made.results[name].operator, quantize(jnp.asarray(w), inner, gathered))


@pytest.mark.parametrize("search", [Int(2, group_size=K), NF4()], ids=lambda method: method.name)
def test_what_is_clipped_suits_the_inner_methods_codes_and_not_those_of_the_search(search) -> None:
    """Few levels are worth more clipping, which is too much for many: with 8 bits hardly any. A method of which there
    are no such codes leaves the judgement to the inner one."""
    wide = dataclasses.replace(INT, bits=8)
    free, clipped = (
        sum(float(one.notes["error"]) for one in applied(AWQ(wide, search=search, ratios=1, clips=n)).results.values())
        for n in (0, 10)
    )
    assert clipped <= 1.01 * free


@dataclasses.dataclass(frozen=True)
class Seen(Int):
    """Notes what it is given."""

    name: ClassVar[str] = "toy-seen"
    needs: ClassVar[tuple] = (Moments(),)

    def apply(self, w, gathered) -> Result:
        return Result(super().apply(w, gathered).operator, {"w": w, "size": gathered[Moments()].mean_abs})


def test_the_inner_method_sees_the_scale_once() -> None:
    made = applied(AWQ(Seen(group_size=G), clips=0))
    scale = np.asarray(made.input_scale)
    assert scale.max() > 2 * scale.min()
    for name, w in W.items():
        np.testing.assert_allclose(made.results[name].notes["w"], w / scale, rtol=1e-5)
        np.testing.assert_allclose(made.results[name].notes["size"], np.abs(X).mean(axis=0) * scale, rtol=1e-5)


def test_repeats_of_a_channel_share_a_factor_where_it_can_be_folded() -> None:
    for foldable in (True, False):
        made = applied(AWQ(INT, ratios=5, clips=0), {"b": W["b"]}, repeat=2, width=4, foldable=foldable)
        scale = np.asarray(made.input_scale).reshape(-1, 2, 4)
        assert np.isclose(scale[:, 0], scale[:, 1], rtol=0.01).all() == foldable


def test_a_sample_of_zeros_has_no_scale() -> None:
    made = applied(AWQ(INT, clips=0), x=np.zeros_like(X))
    np.testing.assert_array_equal(made.input_scale, np.ones(K))
    assert all(float(one.notes["error"]) == 0 for one in made.results.values())


def test_it_loses_less_than_the_inner_method_on_tokens_that_it_has_not_seen() -> None:
    """What enters the MLPs of a trained model, and their weights."""
    model, inner = tiny(), Int(group_size=32)
    method = AWQ(inner, ratios=10, clips=5, sample_tokens=128)
    with bundled("stories.txt") as file:
        ids = np.asarray(model.tokenizer.encode(file.read_text(encoding="utf-8")[:2000]), np.int32)
    inputs = calibrate(model, ids[None, :256], AWQ(sample_tokens=256, sequential=False))
    for index, block in enumerate(model.blocks):
        path = f"layers.{index}.mlp.gate_proj"
        kernels = {"gate": block.mlp.gate_proj.kernel[...], "up": block.mlp.up_proj.kernel[...]}
        seen, x = np.asarray(inputs[path][Sample(256)].x).reshape(2, 128, -1)
        made, lost = applied(method, {name: kernel.T for name, kernel in kernels.items()}, seen), []
        for found in ((1 / made.input_scale, made.results["gate"].operator), (1, quantize(kernels["gate"].T, inner))):
            gap = np.asarray(dequantize(found[1])) / found[0] - np.asarray(kernels["gate"]).T
            lost.append(np.square(x @ gap.T).sum())
        assert lost[0] < 0.95 * lost[1]


def test_scales_are_folded_or_kept_and_only_the_codes_change_the_function(tmp_path) -> None:
    """Integers so wide that nothing is lost show what the scales do to the rest of the model. Two key/value heads serve
    six query heads, whose factors differ, so that o_proj keeps them."""
    model = random_llama(dataclasses.replace(random_llama().config, num_hidden_layers=1))
    wide = Int(8, group_size=1, scale_dtype="float32", table_dtype="float32")
    method = AWQ(wide, search=Int(3, group_size=16), ratios=5, clips=0, shared=False)
    new = quantize_model(model, method, data=TOKENS)
    wanted, got = np.asarray(model(TOKENS)), np.asarray(new(TOKENS))
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()
    leaves = quantized_leaves(new)
    scaled = {path.removeprefix("layers.0.") for path, one in leaves.items() if isinstance(one, ScaleInput)}
    assert "self_attn.o_proj" in scaled and not scaled & {"self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"}
    notes = {path.removeprefix("layers.0."): dict(noted) for path, _, noted in new.recipe.linears}
    assert notes["self_attn.q_proj"]["input_scale"] == "folded into input_layernorm"
    assert notes["mlp.down_proj"]["input_scale"] == "folded into mlp.up_proj"
    told = "folded into self_attn.v_proj where repeats share it, else kept"
    assert notes["self_attn.o_proj"]["input_scale"] == told and f"scale of the inputs: {told}" in explain(new)
    assert all(0 < noted["ratio"] < 1 and noted["error"] < noted["error_before"] for noted in notes.values())
    save(tmp_path / "saved", new)
    again = load(tmp_path / "saved")
    assert_same(quantized_leaves(again), leaves)
    assert again.recipe == new.recipe
    assert_same(again(TOKENS), got)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ([], AWQ()),
        (["--inner", "any4", "--inner-bits", "3", "--search", "int"], AWQ(Any4(bits=3), search=Int())),
        (
            ["--inner", "nf4", "--ratios", "10", "--clips", "0", "--no-shared"],
            AWQ(NF4(), ratios=10, clips=0, shared=False),
        ),
        (["--no-sequential", "--order", "by_site"], AWQ(sequential=False, order="by_site")),
    ],
)
def test_fields_are_flags(flags: list[str], wanted: AWQ) -> None:
    parser = argparse.ArgumentParser()
    argv = ["quantize", "tiny", "out", "--method", "awq", *flags]
    add_method(parser, argv)
    assert method_from(parser.parse_args(argv[3:])) == wanted


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="got no statistics, awq needs a sample .* pass data"):
        quantize_model(random_llama(), AWQ())
    for method in (AWQ(EvenInputs()), AWQ(search=EvenInputs())):
        with pytest.raises(ValueError, match="=toy-even, which quantizes the matrices of a site together"):
            method.check(True)
    with pytest.raises(ValueError, match="clips=21 for AWQ, need a number less than or equal to 20"):
        AWQ(clips=21)
    with pytest.raises(ValueError, match="awq quantizes the matrices of a site together, not one"):
        quantize(jnp.asarray(W["a"]), AWQ())
