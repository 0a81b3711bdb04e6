"""Analyses: statistics and losses equal to numpy's, for stacks and transposed kernels too, told, drawn and reported."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import any4_jax as a4
from any4_jax.cli import main
from any4_jax.evaluation.analysis import SAMPLE, Analysis, Loss, _levels, _loss, analyze
from any4_jax.evaluation.weight_stats import WeightStats, code_entropy, entropy
from any4_jax.methods.matrices import Matrix, quantize_matrix
from any4_jax.models.base import Decoder
from any4_jax.models.tiny import random_llama, tiny

METHODS = {"int3": a4.methods.Int(3, group_size=16), "nf4": a4.methods.NF4(group_size=16)}
TEXT = "Once upon a time there was a cat."
PATH = "layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def small() -> Decoder:
    model = random_llama(dataclasses.replace(random_llama().config, num_hidden_layers=1, vocab_size=512))
    model.tokenizer = tiny().tokenizer
    return model


@pytest.fixture(scope="module")
def analysis(small) -> Analysis:
    return analyze(small, METHODS, TEXT, layers=r"layers\.\d\.mlp\.(up|down)_proj", row=(PATH, 2))


def test_weight_stats_are_numpy_s(rng) -> None:
    w = rng.standard_t(5, (3, 20, 30)).astype(np.float32) + 1
    stats, wide = WeightStats.of(jnp.asarray(w)), w.astype(np.float64)
    counts = np.histogram(w, 256)[0]
    assert stats.shape == (3, 20, 30) and (stats.low, stats.high) == (w.min(), w.max())
    np.testing.assert_allclose((stats.mean, stats.std), (wide.mean(), wide.std()), rtol=1e-5)
    assert stats.kurtosis == pytest.approx(((wide - wide.mean()) ** 4).mean() / wide.var() ** 2 - 3, rel=1e-4)
    assert stats.entropy == pytest.approx(entropy(counts), abs=0.01)
    flat = WeightStats.of(jnp.ones((2, 4)))
    assert (flat.std, flat.entropy) == (0, 0) and math.isnan(flat.kurtosis)
    assert entropy([1, 1, 2, 0]) == 1.5 and entropy([7]) == 0


def test_codes_carry_the_entropy_of_their_histogram() -> None:
    q = a4.quantize(jnp.asarray([[0.0, 5.0, 10.0, 15.0] * 4]), a4.methods.Int(4, group_size=16))
    assert code_entropy(q) == 2 and code_entropy(a4.weights.ScaleInput(q, jnp.ones(16))) == 2
    assert math.isnan(code_entropy(a4.weights.Sum((q, q))))


def test_losses_are_those_of_the_quantized_layer(small, analysis) -> None:
    assert [each.path for each in analysis.layers] == ["layers.0.mlp.up_proj", PATH]
    (layer,) = (each for each in analysis.layers if each.path == PATH)
    w = np.asarray(small.layers[0].mlp.down_proj.kernel[...], np.float64).T
    seen = a4.calibrate(small, TEXT, also=(SAMPLE,))[PATH][SAMPLE]
    x = np.asarray(seen.x, np.float64)[: int(seen.count)]
    for label, method in METHODS.items():
        operator, loss = a4.quantize(jnp.asarray(w, jnp.float32), method), layer.methods[label]
        d = np.asarray(a4.dequantize(operator), np.float64) - w
        assert loss.bits_per_weight == operator.bits_per_weight and loss.code_entropy == code_entropy(operator)

        def expected(power: Any, d: np.ndarray = d) -> tuple[float, float]:
            return power(d), power(w)

        wanted = {
            "weights": expected(lambda m: (m**2).mean()),
            "normal": expected(lambda m: (m**2).sum(1).mean()),
            "uniform": expected(lambda m: ((m**2).sum(1) / 12 + m.sum(1) ** 2 / 4).mean()),
            "calibrated": expected(lambda m: ((x @ m.T) ** 2).mean()),
        }
        for kind, (mse, power) in wanted.items():
            got = getattr(loss, kind)
            assert (got.mse, got.power) == pytest.approx((mse, power), rel=1e-4), kind
            assert got.sqnr == pytest.approx(10 * math.log10(power / mse), abs=1e-3)
    assert layer.methods["nf4"].output.sqnr > layer.methods["int3"].output.sqnr + 3
    assert Loss(0, 1).sqnr == math.inf and Loss(1, 0).sqnr == -math.inf


def test_expectations_are_those_of_many_inputs(rng, analysis, small) -> None:
    w = small.layers[0].mlp.down_proj.kernel[...].T
    d = np.asarray(a4.dequantize(a4.quantize(w, METHODS["nf4"])) - w)
    for kind, x in (("uniform", rng.random((20000, w.shape[1]))), ("normal", rng.standard_normal((20000, w.shape[1])))):
        loss = getattr(analysis.layers[1].methods["nf4"], kind)
        assert loss.mse == pytest.approx(((x @ d.T) ** 2).mean(), rel=0.03)


def test_a_stack_is_the_mean_of_its_matrices(small) -> None:
    one = np.asarray(small.layers[0].mlp.down_proj.kernel[...]).T
    stack = Matrix(jnp.asarray(np.stack([one, 2 * one])), transposed=False)
    operator = quantize_matrix(stack, METHODS["nf4"], None, "experts").operator
    alone = _loss(jnp.asarray(one), a4.quantize(one, METHODS["nf4"]), None)
    whole = _loss(stack.array, operator, None)
    assert whole.calibrated is None and whole.output is whole.normal
    for kind in ("weights", "uniform", "normal"):
        assert getattr(whole, kind).mse == pytest.approx(2.5 * getattr(alone, kind).mse)
        assert getattr(whole, kind).sqnr == pytest.approx(getattr(alone, kind).sqnr)


def test_a_row_has_the_levels_of_each_method(small, analysis) -> None:
    row = analysis.row
    assert row is not None and (row.path, row.index) == (PATH, 2)
    w = np.asarray(small.layers[0].mlp.down_proj.kernel[...])[:, 2]
    np.testing.assert_array_equal(row.weights, w)
    assert {label: len(levels) for label, levels in row.levels.items()} == {"int3": 8, "nf4": 16}
    mx4 = a4.methods.MX4()  # its scales are stored as exponents
    alone = _levels(PATH, 2, Matrix(jnp.asarray(small.layers[0].mlp.down_proj.kernel[...]), True), {"mx4": mx4}, None)
    for label, method in {**METHODS, "mx4": mx4}.items():
        levels = {**row.levels, **alone.levels}[label]
        whole = a4.quantize(w[None], dataclasses.replace(method, group_size=len(w)))
        near = np.abs(np.asarray(a4.dequantize(whole))[0][:, None] - levels).min(axis=1)
        assert near.max() < 1e-6 and (np.diff(levels) >= 0).all()


def test_a_quantized_model_is_refused(small) -> None:
    done = a4.quantize_model(small, None, rules=[(r".*up_proj", METHODS["nf4"])])
    with pytest.raises(ValueError, match="got a Llama with 1 of its layers quantized already; pass the float model"):
        analyze(done, METHODS)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"methods": {}}, "got no method, and at least one is needed"),
        ({"methods": {"awq": a4.methods.AWQ()}}, "got awq, which quantizes the matrices of a site together"),
        ({"methods": {"gptq": a4.methods.GPTQ()}}, "gptq needs the Hessian of each layer's input; pass data"),
        ({"layers": "none"}, "'none' matches none of the"),
        ({"row": (PATH, 48)}, f"got row 48 of {PATH}, and there is no such row"),
        ({"row": ("layers.7", 0)}, "got row 0 of layers.7, and there is no such row"),
    ],
)
def test_what_can_t_be_analyzed_is_refused(small, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        analyze(small, **{"methods": METHODS, **settings})


@pytest.fixture
def told(small, analysis, monkeypatch) -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = []

    def analyze(model, methods, data, **settings):
        asked.append({"methods": methods, "data": data, **settings})
        return analysis

    monkeypatch.setattr("any4_jax.cli.analyze.open_model", lambda name: small)
    monkeypatch.setattr("any4_jax.cli.analyze.analyze", analyze)
    return asked


def test_the_command_tells_and_keeps_the_numbers(told, analysis, tmp_path: Path, capsys) -> None:
    argv = ["analyze", "small", "--method", "nf4", "--group-size", "16", "--beside", "int3", "any4"]
    assert main([*argv, "--csv", f"{tmp_path}/all.csv"]) == 0
    assert {label: method.group_size for label, method in told[0]["methods"].items()} == dict.fromkeys(
        ("int3", "any4", "nf4"), 16
    )
    assert told[0]["methods"]["int3"].bits == 3 and told[0]["row"] is None
    out = capsys.readouterr().out
    assert "nearest in 2 of 2 layers" in out.splitlines()[-1] and out.splitlines()[-1].startswith("nf4: ")
    with open(tmp_path / "all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"], row["method"]) for row in rows[-2:]] == [(PATH, "int3"), (PATH, "nf4")]
    assert float(rows[-1]["calibrated_mse"]) == analysis.layers[1].methods["nf4"].calibrated.mse
    assert main([*argv, "--text", "none", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert told[1]["data"] is None and content["methods"]["nf4"]["nearest_in_layers"] == 2
    assert content["layers"][0]["kurtosis"] == analysis.layers[0].weights.kurtosis


@pytest.mark.parametrize(
    "flags, code, words",
    [
        (["--beside", "int9"], 2, "got 'int9', need one of"),
        (["--method", "awq"], 2, "got the method awq, which quantizes the matrices of a site together"),
        (["--row", "layer"], 2, "got 'layer', need the number of a row, or LAYER:N"),
        (["--text", "none", "--samples", "2"], 2, "with --text none"),
        (["--csv", "{none}/a.csv"], 1, "its folder is missing"),
    ],
)
def test_command_lines_that_say_something_else(told, flags, code: int, words: str, tmp_path: Path, capsys) -> None:
    assert main(["analyze", "small", *(flag.replace("{none}", f"{tmp_path}/none") for flag in flags)]) == code
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not told


class Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_pictures_and_a_page_that_needs_nothing_else(told, analysis, monkeypatch, tmp_path: Path) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    save = figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    flags = ["--png", "map.png", "--row-png", "row.png", "--html", "page.html", "--row", f"{PATH}:2"]
    assert main(["analyze", "a <model>", *(f"{tmp_path}/{x}" if "." in x and ":" not in x else x for x in flags)]) == 0
    assert told[0]["row"] == (PATH, 2)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("map.png", "row.png"))
    int3, nf4, _ = drawn[0].axes
    assert [axes.get_title() for axes in (int3, nf4)] == ["int3, 5.12 bits", "nf4, 5.11 bits"]
    assert [label.get_text() for label in int3.get_xticklabels()] == ["up_proj", "down_proj"]
    shown = [each.methods["nf4"].output.sqnr for each in analysis.layers]
    assert [text.get_text() for text in nf4.texts] == [f"{level:.0f}" for level in shown]
    below = drawn[1].axes[1]
    assert [label.get_text() for label in below.get_yticklabels()] == ["int3", "nf4"]
    page = (tmp_path / "page.html").read_text()
    seen = Seen()
    seen.feed(page)
    assert not seen.open and "<title>a &lt;model&gt;: " in page
    sources = [value for tag, attributes in seen.tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(sources) == 3 and all(source.startswith("data:") for source in sources)
    assert page.count("<tr>") == 1 + 2 + 1 + 2 and not any(tag == "script" for tag, _ in seen.tags)
