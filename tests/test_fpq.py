"""FPQ: the published quantizer and search in float64, what shifts keep."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same

import any4_jax as a4
from any4_jax import formats, statistics
from any4_jax.methods import FPQ, SiteWeights
from any4_jax.methods.apply import apply_method, apply_site
from any4_jax.methods.lifts import order_of
from any4_jax.models.fold import fold
from any4_jax.models.tiny import random_llama
from any4_jax.weights import dequantize

N, K, T = 6, 10, 24
SMALL = FPQ(rounds=2, steps=8, low=0.8, high=1.1, tokens=T, scale_dtype="float32")
BARE, KEPT = dataclasses.replace(SMALL, shifts="none"), dataclasses.replace(SMALL, shifts="kept")
PUBLISHED = dataclasses.replace(KEPT, shift_rounding="nearest")
INTEGERS = dataclasses.replace(BARE, rounds=0, exponent_bits=1)
START = {exponent: place for place, (exponent, _) in enumerate(formats.float_formats(4))}


def weights(rows: int = N) -> np.ndarray:
    w = np.random.default_rng(1).standard_t(3, (rows, K)).astype(np.float32)
    w[2] = 0
    return w


def inputs() -> np.ndarray:
    """Tokens whose channels differ in size by up to 2^6; one is always zero."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(T, K)) * 2.0 ** np.array([0, 5, 1, 2, 0, 3, 6, -100, 1, 4])
    return np.where(np.arange(K) == 7, 0, x).astype(np.float32)


def run(method: FPQ, w: np.ndarray | None = None, x: np.ndarray | None = None):
    gathered = statistics.from_activations(jnp.asarray(inputs() if x is None else x), statistics=method.needs)
    return apply_method(jnp.asarray(weights() if w is None else w), method, gathered)


def taken_apart(operator: Any) -> dict[str, Any]:
    """The leaf, the rounding of inputs and 2^-shift of an operator of FPQ."""
    found = {}
    while operator is not None:
        found[type(operator).__name__ + "2" * (type(operator).__name__ in found)] = operator
        operator = getattr(operator, "inner", None)
    return found


def test_a_rare_token_is_not_clipped_because_the_sample_lacks_it() -> None:
    rng = np.random.default_rng(5)
    x, w = rng.standard_normal((2000, K)).astype(np.float32), rng.standard_normal((N, K)).astype(np.float32)
    x[1234] *= 300
    method = dataclasses.replace(BARE, bits=8, steps=40, high=1.2, tokens=16)
    exact, made = x @ w.T, np.asarray(a4.matmul(jnp.asarray(x), run(method, w, x).operator))
    errors = np.linalg.norm(made - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert errors[1234] < 0.35


# The published quantizer and search, in float64.


def quantizer(x: np.ndarray, exponent: int, bias: Any) -> np.ndarray:
    """Section 3 of the paper: x rounded to sign, `exponent` and 3 - `exponent` bits of mantissa with a real bias."""
    mantissa = 3 - exponent
    largest = (2 - 2.0**-mantissa) * 2.0 ** (2**exponent - 1 - bias)
    x = np.clip(x, -largest, largest)
    with np.errstate(divide="ignore"):
        power = np.maximum(np.floor(np.log2(np.abs(x)) + bias + 1e-12), 1)
    step = 2.0 ** (power - mantissa - bias)
    return np.round(x / step) * step


def bias_of(largest: Any, exponent: int) -> Any:
    with np.errstate(divide="ignore"):
        return 2.0**exponent - np.log2(largest) + np.log2(2 - 2.0 ** -(3 - exponent)) - 1


def candidates(largest: Any, exponent: int, method: FPQ) -> list[Any]:
    """Biases: what the multipliers make of the one at the largest magnitude, modulo 1 and below zero."""
    bias = bias_of(largest, exponent)
    part = bias - np.floor(bias) - 6
    grid = [1, *(method.low + i * (method.high - method.low) / method.steps for i in range(method.steps))]
    return [bias - part + m * part for m in grid]


def shifts_of(x: np.ndarray, bias: float, exponent: int, rounding: str) -> np.ndarray:
    """As published for "nearest". Else the largest for which no input is clipped that the common bias doesn't clip."""
    own = bias_of(np.abs(x).max(0), exponent)
    finer = np.round(own) - np.round(bias) if rounding == "nearest" else np.floor(own - bias + 1e-4)
    return np.clip(finer, 0, 2**exponent - 1)


@dataclasses.dataclass
class Emulated:
    """The published search; every error that it has seen."""

    method: FPQ

    def __post_init__(self) -> None:
        self.w, self.x = weights().astype(np.float64), inputs().astype(np.float64)
        self.y, self.rows = self.x @ self.w.T, np.abs(self.w).max(1) > 0
        self.w_hat = self.coded(2, candidates(self.extremes, 2, self.method)[0])
        self.x_hat = self.rounded(2, candidates(np.abs(self.x).max(), 2, self.method)[0])
        self.minmax = self.error()
        for _ in range(self.method.rounds):
            self.search_weights()
            self.search_inputs()

    @property
    def extremes(self) -> np.ndarray:
        return np.where(self.rows, np.abs(self.w).max(1), 1)

    def coded(self, exponent: int, bias: np.ndarray) -> np.ndarray:
        return quantizer(self.w, exponent, bias[:, None])

    def rounded(self, exponent: int, bias: float) -> np.ndarray:
        shifted = self.method.shifts != "none"
        own = shifts_of(self.x, bias, exponent, self.method.shift_rounding) if shifted else np.zeros(K)
        return quantizer(self.x, exponent, bias + own)

    def error(self) -> float:
        return float(((self.y - self.x_hat @ self.w_hat.T) ** 2).sum() / (self.y**2).sum())

    def search_weights(self) -> None:
        best = {}
        for exponent in START:
            tried = [self.coded(exponent, bias) for bias in candidates(self.extremes, exponent, self.method)]
            errors = np.array([((self.y - self.x_hat @ w.T) ** 2).sum(0) for w in tried])
            w = np.stack([tried[c][n] for n, c in enumerate(errors.argmin(0))])
            best[exponent] = errors.min(0).sum(), w
        self.w_exponent = min(best, key=lambda e: best[e][0])
        self.w_hat = best[self.w_exponent][1]

    def search_inputs(self) -> None:
        tried = [
            (exponent, bias) for exponent in START for bias in candidates(np.abs(self.x).max(), exponent, self.method)
        ]
        errors = [((self.y - self.rounded(*one) @ self.w_hat.T) ** 2).sum() for one in tried]
        self.x_exponent, self.x_bias = tried[int(np.argmin(errors))]
        self.x_hat, self.least = self.rounded(self.x_exponent, self.x_bias), min(errors) / (self.y**2).sum()


@pytest.mark.parametrize("method", [BARE, KEPT, PUBLISHED], ids=["none", "down", "nearest"])
def test_the_search_is_the_published_one(method: FPQ) -> None:
    made, theirs = run(method), Emulated(method)
    parts = taken_apart(made.operator)
    assert int(made.notes["exponent_bits"]) == theirs.w_exponent
    assert int(made.notes["input_exponent_bits"]) == theirs.x_exponent
    np.testing.assert_allclose(dequantize(made.operator), theirs.w_hat, rtol=1e-5, atol=1e-6)
    scale = float(parts["QuantizeInput"].scale)
    np.testing.assert_allclose(2**theirs.x_exponent - np.log2(scale), theirs.x_bias, atol=1e-5)
    if method.shifts == "kept":
        own = -np.log2(np.asarray(taken_apart(parts["QuantizeInput"].inner)["ScaleInput"].scale, np.float64))
        np.testing.assert_array_equal(own, shifts_of(theirs.x, theirs.x_bias, theirs.x_exponent, method.shift_rounding))
        assert own.min() == 0 and own.max() == 2**theirs.x_exponent - 1
    # No round makes it worse, and the first candidate is the published MinMax.
    assert theirs.least == pytest.approx(theirs.error()) and theirs.error() < theirs.minmax
    for name, value in (("error", theirs.error()), ("minmax_error", theirs.minmax)):
        assert float(made.notes[name]) == pytest.approx(value, rel=1e-4)
    # One bias and shifted inputs give what a bias for each input gives (folding, exactly).
    y = a4.matmul(jnp.asarray(inputs()), made.operator)
    np.testing.assert_allclose(y, theirs.x_hat @ theirs.w_hat.T, rtol=1e-5, atol=1e-4)


def test_it_is_better_than_what_it_is_compared_with_in_the_paper() -> None:
    ours, fpq, baseline, integers = (run(method).notes for method in (KEPT, PUBLISHED, BARE, INTEGERS))
    assert fpq["error"] < 0.8 * baseline["error"] < 0.8 * baseline["minmax_error"] < 0.8 * integers["error"]
    assert ours["error"] < 0.9 * fpq["error"]


@pytest.mark.parametrize("exponent", [2, 3])
def test_shifts_round_down_so_that_only_the_common_bias_clips(exponent: int) -> None:
    """At the scale of the largest input nothing is clipped; the next larger shift would clip, or is none there is."""
    x = np.abs(inputs()).max(0)
    x = np.concatenate([x, x.max() / 2 ** np.arange(8), [0]]).astype(np.float32)[None]
    method = dataclasses.replace(KEPT, rounds=0, exponent_bits=exponent)
    made = run(method, np.ones((2, x.size), np.float32), x).operator
    scaling = taken_apart(made)
    shift = 1 / np.asarray(scaling["ScaleInput2"].scale, np.float64)
    top, most = float(jnp.abs(made.inner.levels).max() * made.inner.scale), 2.0 ** min(2**exponent - 1, 7)
    assert (x * shift <= top * 1.0001).all()
    assert ((2 * x * shift > top) | (shift == most)).all()


def test_one_exponent_bit_is_symmetric_integers() -> None:
    w, x = weights().astype(np.float64), inputs().astype(np.float64)
    steps = np.where(np.abs(w).max(1, keepdims=True) > 0, np.abs(w).max(1, keepdims=True) / 7, 1)
    made = run(INTEGERS)
    np.testing.assert_allclose(dequantize(made.operator), np.round(w / steps) * steps, rtol=1e-5, atol=1e-6)
    step = np.abs(x).max() / 7
    y = (np.round(x / step) * step) @ (np.round(w / steps) * steps).T
    np.testing.assert_allclose(a4.matmul(jnp.asarray(inputs()), made.operator), y, rtol=1e-5, atol=1e-4)


def test_inputs_of_one_size_have_no_shifts() -> None:
    """Then a bias for each input is what one for all is."""
    x = inputs()
    x = np.where(np.arange(K) == 7, 1, x / np.maximum(np.abs(x).max(0), 1e-30)).astype(np.float32)
    kept, bare = (run(method, x=x).operator for method in (KEPT, BARE))
    assert (np.asarray(kept.scale) == 1).all()
    assert_same(a4.matmul(jnp.asarray(x), kept), a4.matmul(jnp.asarray(x), bare))


def test_a_site_shares_its_shifts_and_rows_of_a_batch_do_not_see_each_other() -> None:
    x = jnp.asarray(inputs())
    gathered = statistics.from_activations(x, statistics=SMALL.needs)
    site = SiteWeights({"q": jnp.asarray(weights()), "k": jnp.asarray(weights(4))}, repeat=2, width=1)
    made = apply_site(site, SMALL, gathered, "site")
    assert made.input_scale is not None
    scale = np.asarray(made.input_scale)
    np.testing.assert_array_equal(scale, np.repeat(scale[::2], 2), "the repeats of a channel share one")
    assert (np.log2(scale) % 1 == 0).all() and scale.max() > 1
    for result in made.results.values():
        inner = taken_apart(result.operator)["ScaleInput"]
        np.testing.assert_array_equal(np.asarray(inner.scale, np.float32) * scale, np.ones(K))
        y = a4.matmul(x * scale, result.operator)
        np.testing.assert_allclose(y[3:4], a4.matmul(x[3:4] * scale, result.operator), rtol=1e-5, atol=1e-5)


def test_what_folds_comes_before_any_linear_of_its_block_is_quantized() -> None:
    assert order_of([FPQ(sequential=True)]) == "at_once"
    assert order_of([FPQ(sequential=True, shifts="kept")]) == "by_site"


def test_shifts_that_are_folded_change_no_logits() -> None:
    model = random_llama()
    data = np.random.default_rng(0).integers(0, 128, (2, 9), dtype=np.int32)
    before = np.asarray(model(data))
    for index, block in enumerate(model.blocks):
        for site in model.sites(index):
            k = a4.surgery.linears(block)[site.linears[0]].in_features
            shifts = np.repeat(
                np.random.default_rng(k).integers(0, 4, k // site.repeat).reshape(-1, site.width), site.repeat, 0
            )
            block, leftover = fold(block, site, 2.0 ** shifts.reshape(-1).astype(np.float32))
            assert leftover is None
        model.layers[index] = block
    np.testing.assert_array_equal(np.asarray(model(data)), before)


@pytest.mark.parametrize(
    "fields,gathered,words",
    [
        ({"exponent_bits": 4}, True, "exponent_bits=4 with bits=4, which has formats of 1 to 3 exponent bits"),
        ({"bits": 8, "exponent_bits": 4}, True, "exponent_bits=4 with input_bits=4"),
        ({"low": 1.0, "high": 1.0}, True, "low=1.0 and high=1.0, need a larger high"),
        ({}, False, "fpq with input_bits=4 needs the size of each layer's inputs; pass data, or input_bits=None"),
        ({"given": True, "input_bits": None}, False, "no search results.*pass stats=load_search_results"),
    ],
)
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], gathered: bool, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FPQ(**fields).check(gathered)
