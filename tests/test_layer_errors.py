"""Errors by layer: exact where one weight is changed, without padding, for experts too, and told in all forms."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_goldens import golden
from flax import nnx

from any4_jax.cli import main
from any4_jax.evaluation.layer_errors import Deviation, LayerErrors, layer_errors
from any4_jax.models.base import Decoder
from any4_jax.models.fold import module_at
from any4_jax.models.tiny import random_llama, tiny

CHANGED = "layers.1.mlp.down_proj"
TEXTS = ["Once upon a time there was a cat.", "One day"]


@pytest.fixture(scope="module")
def small() -> Decoder:
    model = random_llama(dataclasses.replace(random_llama().config, num_hidden_layers=3, vocab_size=512))
    model.tokenizer = tiny().tokenizer
    return model


@pytest.fixture(scope="module")
def doubled(small) -> Decoder:
    """With one linear whose outputs are twice those of `small`."""
    model: Any = nnx.clone(small)
    kernel = module_at(model, CHANGED).kernel
    kernel.set_value(kernel.get_value() * 2)
    return model


@pytest.fixture(scope="module")
def errors(small, doubled) -> LayerErrors:
    return layer_errors(small, doubled, TEXTS, batch_size=2)


def test_a_deviation_is_that_of_its_values() -> None:
    a, b = np.array([3.0, 0.0, 4.0]), np.array([3.0, 1.0, 4.0])
    made = Deviation(3, (a * a).sum(), (b * b).sum(), ((a - b) ** 2).sum(), (a * b).sum())
    assert made.mse == pytest.approx(1 / 3) and made.sqnr == pytest.approx(10 * math.log10(25))
    assert made.cosine == pytest.approx(25 / (5 * math.sqrt(26)))
    assert (made + made).mse == made.mse and (made + Deviation()) == made
    assert Deviation(3, 2, 2, 0, 2).sqnr == math.inf and math.isnan(Deviation().mse)


def test_errors_start_where_a_weight_is_changed(small, errors) -> None:
    paths = [each.path for each in errors.linears]
    sites = [f"layers.{i}.{path}" for i in range(3) for site in small.sites(i) for path in site.linears]
    assert paths[:-1] == sites and errors.first == CHANGED
    at = {each.path: each for each in (*errors.linears, *errors.blocks)}
    for path in paths[: paths.index(CHANGED)] + ["layers.0"]:
        assert at[path].total.noise == at[path].own.noise == 0
    for part in (at[CHANGED].total, at[CHANGED].own):
        assert part.sqnr == pytest.approx(0, abs=1e-4) and part.cosine == pytest.approx(1)
        assert part.mse * part.count == pytest.approx(part.signal)
    for path in paths[paths.index(CHANGED) + 1 :] + ["layers.2"]:
        assert at[path].total.noise > 0 and at[path].own.noise == 0
    assert errors.worst.path == "layers.1" and errors.worst.own.sqnr == errors.worst.total.sqnr > 0
    assert dataclasses.replace(errors, embedding=Deviation(noise=1.0)).first == "embedding"
    assert errors.embedding.sqnr == math.inf and errors.embedding.count == errors.tokens * small.config.hidden_size


def test_predictions_are_compared_and_padding_does_not_count(small, doubled, errors) -> None:
    rows = [small.tokenizer.encode(text) for text in TEXTS]
    ids, mask = np.zeros((2, max(map(len, rows))), np.int32), np.zeros((2, max(map(len, rows))), bool)
    for row, own, kept in zip(rows, ids, mask, strict=True):
        own[: len(row)], kept[: len(row)] = row, True
    logits = [np.asarray(model(ids), np.float64)[mask] for model in (small, doubled)]
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
    assert errors.tokens == len(p) and errors.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    assert errors.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean()) and errors.top1 < 1
    assert errors.linears[-1].total.mse == pytest.approx(np.square(logits[0] - logits[1]).mean(), rel=1e-4)


def test_experts_are_compared_by_the_tokens_that_reach_them() -> None:
    wanted = golden("mixtral")
    model = wanted.model()
    other, path = nnx.clone(model), "layers.1.mlp.experts.down_proj"
    kernel = module_at(other, path).kernel
    kernel.set_value(kernel.get_value().at[0].multiply(2.0))
    errors = layer_errors(model, other, wanted.tokens)
    at = {each.path: each.total for each in errors.linears}
    assert errors.first == path
    experts, hidden = kernel.get_value().shape[0], model.config.hidden_size
    assert at[path].count == 2 * errors.tokens * hidden and experts > 2  # each token reaches two
    assert 0 < at[path].noise < at[path].signal


def test_other_models_are_refused(small) -> None:
    other = random_llama(dataclasses.replace(small.config, num_hidden_layers=2))
    with pytest.raises(ValueError, match="got models of 3 and 2 blocks, and both need the same blocks"):
        layer_errors(small, other, TEXTS)
    wide = random_llama(dataclasses.replace(small.config, vocab_size=600))
    with pytest.raises(ValueError, match="got models of 512 tokens and 48 channels and of 600 and 48"):
        layer_errors(small, wide, TEXTS)


@pytest.fixture
def told(errors, small, doubled, monkeypatch):
    models = {"float": small, "double": doubled}
    monkeypatch.setattr("any4_jax.cli.diff.open_model", lambda name, inputs=None: models[name])
    monkeypatch.setattr("any4_jax.cli.diff.layer_errors", lambda a, b, data, **_: errors)


def test_the_command_tells_them_in_all_forms(told, errors, tmp_path: Path, capsys) -> None:
    assert main(["diff", "float", "double", "--csv", f"{tmp_path}/errors.csv"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["layers.0.self_attn.q_proj", "0.00e+00", "1.00000", "equal", "equal"]
    assert next(line for line in out if line.startswith(CHANGED)).replace("-0.00", "0.00").split()[2:] == [
        "1.00000",
        "0.00",
        "0.00",
    ]
    assert f"errors start in {CHANGED}; layers.1 adds most" in "\n".join(out)
    assert out[-1].startswith(f"logits: KL {errors.kl:.5f} nats per token")
    with open(tmp_path / "errors.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == [each.path for each in (*errors.linears, *errors.blocks)]
    assert rows[0]["sqnr_db"] == "inf" and float(rows[-1]["sqnr_db"]) == errors.blocks[-1].total.sqnr
    assert main(["diff", "float", "double", "--prompt", "Once", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["errors_start_in"] == CHANGED and told["blocks"][0]["sqnr_db"] is None
    assert told["linears"][-1]["mse"] == errors.linears[-1].total.mse
    assert main(["diff", "float", "double", "--csv", f"{tmp_path}/none/errors.csv"]) == 1


def test_they_are_drawn_block_by_block(told, errors, monkeypatch, tmp_path: Path) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    save = figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    assert main(["diff", "float", "double", "--png", f"{tmp_path}/errors.png"]) == 0
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    assert axes.get_title() == "double against float"
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert len(lines) == 9 and np.isnan(lines["mlp.down_proj"][0])
    np.testing.assert_allclose(
        lines["mlp.down_proj"][1:], [errors.linears[13].total.sqnr, errors.linears[20].total.sqnr]
    )
    assert lines["output of the block"][2] == errors.blocks[2].total.sqnr


def test_a_page_tells_them_and_needs_nothing_else(told, errors, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["diff", "float", "double", "--html", f"{tmp_path}/errors.html"]) == 0
    page = (tmp_path / "errors.html").read_text()
    assert "<h1>double against float</h1>" in page and f"<p>errors start in {CHANGED}; layers.1 adds most" in page
    assert page.count("<tr>") == 2 + len(errors.blocks) + len(errors.linears)
    assert page.count("<td>exact</td>") == sum(
        not deviation.noise for each in (*errors.blocks, *errors.linears) for deviation in (each.total, each.own)
    )
    sources = re.findall(r"(?:src|href)=.([^'\" ]+)", page)
    assert len(sources) == 2 and all(source.startswith("data:") for source in sources)
