"""The ablation command and `any4 bench quantize`: what they would run is valid, and a small run writes its figures."""

import importlib
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from any4_jax import benchmarks, cli
from any4_jax.benchmarks import gemm, quantize
from any4_jax.data import texts
from any4_jax.methods import AWQ, GPTQ, NF4, Any4, SmoothQuant
from any4_jax.methods.base import scope_of
from any4_jax.statistics import Drift, Hessian, Moments

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "benchmarks"


with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(FOLDER)
    CASE, CASES = map(importlib.import_module, ("ablation_case", "ablation_cases"))


@pytest.mark.parametrize("study", CASES.STUDIES)
def test_every_case_can_run_and_is_one_of_its_kind(study: str) -> None:
    cases = CASES.STUDIES[study](64)
    assert len({(case.name, case.calibration) for case in cases}) == len(cases) >= 4
    assert len({(case.described, case.calibration) for case in cases}) == len(cases)
    for case in cases:
        for method in (case.method, *(method for _, method in case.rules)):
            method.check(case.calibrated)


@pytest.mark.parametrize(
    ("method", "walked"),
    [
        (NF4(), False),
        (Any4(), False),
        (Any4(solver="gradient"), False),
        (Any4.paper(), True),
        (GPTQ(), True),
        (GPTQ(sequential=False), True),
        (AWQ(sequential=False), True),
        (SmoothQuant(), True),
    ],
)
def test_methods_that_need_a_walk_get_one(method, walked: bool) -> None:
    assert CASE.Case("", method).walked == walked
    assert CASE.Case("", method, CASE.NONE).walked == (scope_of(method) == "site")


def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: dict[str, list], *flags: str):
    """Runs the command on the tiny model, with studies of these cases, and reads what it wrote."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(CASES, "STUDIES", {name: lambda g, found=found: found for name, found in cases.items()})
    monkeypatch.chdir(tmp_path)
    sizes = ["--model", "tiny", "--seqlen", "128", "--windows", "4", "--group-size", "32", "--out", "a.json"]
    monkeypatch.setattr(sys, "argv", ["ablations.py", *sizes, *flags])
    runpy.run_path(str(FOLDER / "ablations.py"), run_name="__main__")
    return benchmarks.read("a.json")


STORIES = str(FOLDER.parent.parent / "any4_jax" / "data" / "stories.txt")
ESSAYS = str(FOLDER.parent.parent / "any4_jax" / "data" / "essays.txt")


def test_the_command_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """nf4 in smaller groups loses less; the case that needs a text is skipped with a note."""
    fixed = CASE.Case("nf4, small groups", NF4(group_size=8), CASE.NONE)
    cases = [fixed, CASE.Case("nf4 of a text", NF4(), CASE.TEXT, samples=2, length=16)]
    result = command(tmp_path, monkeypatch, {"small": cases}, "--text", STORIES)
    first, second = result.rows
    assert (first["study"], second["case"], second["calibration"]) == ("reference", "nf4, small groups", "none")
    assert first["share_recovered"] == first["kl_share_recovered"] == 0
    assert 0 < second["share_recovered"] < 1 and 0 < second["kl_share_recovered"] < 1
    assert second["error_q_proj"] < first["error_q_proj"] < 0.1
    assert 0 < second["kl_nats_error"] < second["kl_nats"] < first["kl_nats"]
    assert first["top1_share"] < second["top1_share"] < 1
    windows = [float(value) for value in second["window_kl_nats"].split()]
    assert len(windows) == 4 and sum(windows) / 4 == pytest.approx(second["kl_nats"], abs=1e-6)
    assert result.settings["windows"] == 4 and "nf4 of a text: skipped" in result.notes[0]
    assert "small" in capsys.readouterr().out


def test_a_file_is_continued_with_the_same_settings_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case is measured once, whatever study names it, and a rerun measures what is missing."""
    one, two = (CASE.Case(f"nf4, groups of {g}", NF4(group_size=g), CASE.NONE) for g in (8, 16))
    # Of the text that is measured itself, it is skipped.
    other = CASE.Case("any4", Any4(), CASE.OTHER)
    first = command(tmp_path, monkeypatch, {"a": [one, other]})
    assert [row["case"] for row in first.rows] == ["nf4, float32 scales", one.name] and "bundled essays" in first.notes[
        0
    ]
    both = {"a": [one, two], "b": [CASE.Case("again", one.method, CASE.NONE)]}
    second = command(tmp_path, monkeypatch, both)
    assert second.rows[:2] == first.rows
    assert [(row["study"], row["case"]) for row in second.rows[2:]] == [("a", two.name), ("b", "again")]
    assert second.rows[3] == first.rows[1] | {"study": "b", "case": "again"}
    monkeypatch.setattr(sys, "argv", ["quality_plot.py", "a.json", "a.json", "a.svg", "--study", "a"])
    runpy.run_path(str(FOLDER / "quality_plot.py"), run_name="__main__")
    assert Path("a.svg").read_text().count("<circle") == 4 + 1  # of the legend
    with pytest.raises(SystemExit, match=r"stories.txt has passages of what is measured on; give texts that have none"):
        command(tmp_path, monkeypatch, both, "--text", STORIES, "--calibration-text", STORIES)
    with pytest.raises(SystemExit, match="measured with another text"):
        command(tmp_path, monkeypatch, both, "--text", STORIES)


def test_a_method_in_a_walk_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = GPTQ(inner=NF4(group_size=32))
    cases = [
        CASE.Case("GPTQ nf4", method, CASE.TEXT, samples=2, length=64),
        *(CASE.Case(f"{b} bits", SmoothQuant(alpha=None, input_bits=b), CASE.NONE) for b in (8, 3)),
    ]
    result = command(tmp_path, monkeypatch, {"walk": cases}, "--text", STORIES, "--calibration-text", ESSAYS)
    first, row, bytes_, few = result.rows
    assert bytes_["kl_nats"] < 0.1 * first["kl_nats"] < 0.1 * few["kl_nats"], "inputs are rounded where it is measured"
    assert few["error_q_proj"] is None
    assert (row["calibration"], row["method"]) == ("text, 2 x 64 tokens", repr(method))
    assert result.settings["calibration_text"] == "essays.txt"
    # The codes differ from the nearest ones, and the scales have 16 bits in place of 32.
    assert row["kl_nats"] != pytest.approx(first["kl_nats"], rel=0.01)
    assert row["bits_per_weight"] < first["bits_per_weight"]


def test_the_data_of_each_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    data = importlib.import_module("ablation_bench").data
    text = np.arange(1000)
    assert data(CASE.Case("", NF4()), str.encode, None) == texts.prompt()
    pieces = data(CASE.Case("", NF4(), CASE.TEXT, samples=3, length=10), str.encode, text)
    assert pieces.tolist() == [list(range(at, at + 10)) for at in (0, 495, 990)]
    other = data(CASE.Case("", NF4(), CASE.OTHER), lambda words: list(words.encode()), None)
    assert other.shape[1] == 512 and bytes(other.ravel().tolist()) in (texts.essays() + texts.stories()).encode()
    assert other.size > len(texts.essays())


def test_bench_quantize_counts_a_models_linears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(gemm.SHAPES, "small", ((8, 16),) * 4)
    monkeypatch.setitem(quantize.BLOCKS, "small", 3)
    out = tmp_path / "q.json"
    flags = ["--solver", "lloyd", "--bits", "2", "--group-size", "8", "--no-refit"]
    assert cli.main(["bench", "quantize", "--shape", "small", "--matrices", "2", "--out", str(out), *flags]) == 0
    result = benchmarks.read(out)
    assert [(row["n"], row["k"], row["measured"]) for row in result.rows] == [(8, 16, 2)] * 4
    assert [row["matrices"] for row in result.rows] == [6, 6, 6, 3]
    assert "refit=False" in result.settings["method"] and "21 linears" in capsys.readouterr().out


def test_bench_quantize_takes_methods_with_a_hessian(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(gemm.SHAPES, "small", ((8, 16),) * 4)
    monkeypatch.setitem(quantize.BLOCKS, "small", 1)
    assert cli.main(["bench", "quantize", "--shape", "small", "--matrices", "1", "--method", "gptq"]) == 0
    assert "7 linears" in capsys.readouterr().out


def test_random_statistics_are_of_inputs_that_occur_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "TOKENS", 64)
    found = quantize.random_statistics(jax.random.key(0), 96, (Moments(), Hessian(), Drift()))
    hessian = np.asarray(found[Hessian()].mean, np.float64)
    energy = np.diag(hessian)
    assert found[Hessian()].count == 128 and np.linalg.eigvalsh(hessian)[0] > 0
    np.testing.assert_allclose(energy, found[Moments()].second_moment, rtol=1e-4)
    assert energy.max() > 30 * energy.min()
    correlation = hessian / np.sqrt(energy * energy[:, None])
    assert np.abs(correlation - np.eye(96)).mean() > 0.1
    assert 0 < np.abs(found[Drift()].mean).max() < 0.2 * energy.max()


def test_the_models_are_those_whose_shapes_are_known() -> None:
    assert all(len(gemm.SHAPES[model]) == len(quantize.PER_BLOCK) for model in quantize.BLOCKS)
    assert sum(quantize.BLOCKS["llama-3.1-8b"] * times for times in quantize.PER_BLOCK) == 224
