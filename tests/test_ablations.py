"""The ablation command and `any4 bench quantize`: what they would run is valid, and a small run writes its figures."""

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

from any4_jax import benchmarks, cli
from any4_jax.benchmarks import gemm, quantize
from any4_jax.methods import NF4

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "benchmarks"


def load_cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablation_cases", FOLDER / "ablation_cases.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = load_cases()


@pytest.mark.parametrize("study", CASES.STUDIES)
def test_every_case_can_run_and_is_one_of_its_kind(study: str) -> None:
    cases = CASES.STUDIES[study](64)
    assert len({(case.name, case.calibration) for case in cases}) == len(cases) >= 4
    assert len({(case.method, case.calibration) for case in cases}) == len(cases)
    for case in cases:
        case.method.check(case.calibrated)


def test_the_command_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """nf4 in smaller groups loses less; the case that needs a text is skipped with a note."""

    def study(g: int) -> list:
        fixed = CASES.Case("nf4, small groups", NF4(group_size=8), calibrated=False)
        return [fixed, CASES.Case("nf4 of a text", NF4(), samples=2, length=16)]

    monkeypatch.setitem(sys.modules, "ablation_cases", CASES)
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(CASES, "STUDIES", {"small": study})
    monkeypatch.chdir(tmp_path)
    text = str(FOLDER.parent.parent / "any4_jax" / "data" / "stories.txt")
    flags = ["--model", "tiny", "--seqlen", "128", "--windows", "4", "--group-size", "32", "--out", "a.json"]
    monkeypatch.setattr(sys, "argv", ["ablations.py", *flags, "--text", text])
    runpy.run_path(str(FOLDER / "ablations.py"), run_name="__main__")
    result = benchmarks.read("a.json")
    first, second = result.rows
    assert (first["study"], second["case"], second["calibration"]) == ("reference", "nf4, small groups", "none")
    assert first["share_recovered"] == 0 < second["share_recovered"] < 1
    assert second["error_q_proj"] < first["error_q_proj"] < 0.1
    assert result.settings["windows"] == 4 and "nf4 of a text: skipped" in result.notes[0]
    assert "small" in capsys.readouterr().out


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


def test_the_models_are_those_whose_shapes_are_known() -> None:
    assert all(len(gemm.SHAPES[model]) == len(quantize.PER_BLOCK) for model in quantize.BLOCKS)
    assert sum(quantize.BLOCKS["llama-3.1-8b"] * times for times in quantize.PER_BLOCK) == 224
