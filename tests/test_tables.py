"""`any4 tables`: differences and their errors by hand, and what may not be compared."""

import csv
import json
import math

import numpy as np
import pytest

from any4_jax.cli import main
from any4_jax.cli.figures import Collected, Figure, base_of, collect, figures
from any4_jax.evaluation.harness_tasks import GROUPS

DRAW = np.random.default_rng(0)
FLOAT = DRAW.normal(2.0, 0.5, 50)


def text(nats, tokens: str = "a") -> dict:
    return {
        "perplexity": math.exp(np.mean(nats)),
        "standard_error": 0.25,
        "windows": len(nats),
        "seqlen": 64,
        "window_nats_per_token": list(map(float, nats)),
        "source": {"tokens_sha256": tokens},
    }


def task(value: float, error: float | None = 0.03, samples: int = 100) -> dict:
    metrics = {"acc": {"value": value, "error": error}, "acc_norm": {"value": value / 2, "error": error}}
    return {"metrics": metrics, "samples": samples, "shots": 0, "version": 1.0}


def content(method: str, results: dict) -> dict:
    return {"schema": 1, "model": f"models/{method}", "method": method, "results": results}


KL = {"kl_nats_per_token": 0.125, "kl_standard_error": 0.5, "top1_agreement": 0.75, "flips": 0.0625}
RUNS = {
    "a": content("any4", {"w": text(FLOAT + 0.1 + DRAW.normal(0, 0.01, 50)) | {"against": KL}, "q": task(0.55)}),
    "b": content("float", {"w": text(FLOAT), "q": task(0.75, 0.04), "c": text(FLOAT)}),
    "n": content("nf4", {"w": text(FLOAT + DRAW.normal(0, 0.2, 50)), "q": task(0.8), "c": text(FLOAT, "other")}),
}


@pytest.fixture
def folder(tmp_path):
    for name, each in RUNS.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "results.json").write_text(json.dumps(each))
    return tmp_path / "runs"


def found(**contents) -> dict[tuple[str, str, str], Figure]:
    runs = [Collected(name, each) for name, each in contents.items()]
    return {(f.run, f.task, f.metric): f for f in figures(runs, base_of(runs, None))}


def test_differences_are_paired_by_window_and_have_an_error() -> None:
    each = found(**RUNS)
    values = [RUNS[name]["results"]["w"]["perplexity"] for name in "ab"]
    close = each["a", "w", "perplexity"]
    assert close.delta == pytest.approx(values[0] - values[1]) and close.error == 0.25
    # To first order: what both perplexities vary by together, and what the first varies by alone.
    together, alone = close.delta * FLOAT.std() / math.sqrt(50), values[0] * 0.01 / math.sqrt(50)
    assert close.delta_error == pytest.approx(math.hypot(together, alone), rel=0.15) and not close.within_error
    noisy = each["n", "w", "perplexity"]
    assert noisy.within_error and noisy.delta_error > 2 * close.delta_error
    assert each["b", "w", "perplexity"].delta is None  # the base


def test_what_was_measured_otherwise_is_not_compared() -> None:
    each = found(**RUNS)
    assert each["n", "c", "perplexity"].delta is None  # of other tokens
    assert ("a", "c", "perplexity") not in each
    other = found(a=content("any4", {"q": task(0.5, samples=99)}), b=RUNS["b"])
    assert other["a", "q", "acc"].delta is None
    one = found(a=content("any4", {"w": text([2.0])}), b=content("float", {"w": text([1.0])}))["a", "w", "perplexity"]
    assert one.delta == pytest.approx(math.e**2 - math.e) and one.delta_error is None and one.within_error


def test_tasks_and_their_average() -> None:
    each = found(**RUNS)
    lost, won = each["a", "q", "acc"], each["n", "q", "acc"]
    assert (lost.delta, lost.delta_error) == (pytest.approx(-0.2), pytest.approx(0.05)) and not lost.within_error
    assert won.within_error and each["n", "q", "acc_norm"].delta == pytest.approx(0.025)
    values = dict(zip(GROUPS["csqa"], np.linspace(0.3, 0.9, 7).tolist(), strict=True))
    whole = {name: task(value) for name, value in values.items()}
    lower = {name: task(value - 0.1) for name, value in values.items()}
    mean = found(a=content("any4", lower), b=content("float", whole))
    assert mean["b", "csqa", "mean acc"].value == pytest.approx(0.6)
    assert mean["b", "csqa", "mean acc"].error == pytest.approx(0.03 / math.sqrt(7))
    assert mean["a", "csqa", "mean acc"].delta == pytest.approx(-0.1)
    assert ("a", "csqa", "mean acc") not in each
    unknown = found(a=content("any4", {"q": task(0.5, None)}), b=RUNS["b"])["a", "q", "acc"]
    assert unknown.delta_error is None and unknown.within_error


def test_the_table_and_the_file_of_figures(folder, tmp_path, capsys) -> None:
    out = [str(tmp_path / name) for name in ("t.md", "t.csv")]
    assert main(["tables", str(folder), "--markdown", out[0], "--csv", out[1]]) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "t.md").read_text(encoding="utf-8") == shown
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if line[:1] == "|"]
    assert lines[0] == ["run", "method", "bits/weight", "w", "w, KL", "q", "c"]
    assert [line[0] for line in lines[2:]] == ["b", "a", "n"] and {len(line) for line in lines} == {7}
    assert lines[3][4] == "0.1250 ± 0.5000" and lines[3][5] == "0.5500 ± 0.0300 (-0.2000 ± 0.0500)"
    assert lines[4][5] == "0.8000 ± 0.0300 (≈+0.0500 ± 0.0500)" and lines[4][3].count("≈") == 1
    assert "the difference from b" in shown.splitlines()[-1] and "q acc" in shown.splitlines()[-1]
    assert "not to be compared with b, being of other tokens or questions: c of n." in shown
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [row["within_error"] for row in rows if row["task"] == "q" and row["metric"] == "acc"] == ["0", "", "1"]
    assert {row["model"] for row in rows} == {"models/any4", "models/float", "models/nf4"} and len(rows) == 14

    assert main(["tables", str(folder), "--base", str(folder / "n"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["base"] == "n" and [each["run"] for each in told["runs"]] == ["a", "b", "n"]


def test_runs_of_one_name_are_told_apart(folder) -> None:
    (folder / "more" / "a").mkdir(parents=True)
    (folder / "more" / "a" / "results.json").write_text(json.dumps(RUNS["a"]))
    (folder / "alone.json").write_text(json.dumps(RUNS["n"]))
    names = [run.name for run in collect([str(folder), str(folder / "alone.json"), str(folder / "b")])]
    assert names == [str(folder / "a"), "b", str(folder / "more" / "a"), "n", "alone"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{folder}/nowhere"], "nowhere is missing, and a folder of results is needed"),
        (["{folder}/empty"], "holds no results.json"),
        (["{folder}/damaged.json"], "is not JSON"),
        (["{folder}/other.json"], "holds no results of this version's"),
        (["{folder}", "--base", "z"], "no run is named z; give one of a, b, n"),
        (["{folder}", "--csv", "{folder}/no/t.csv"], "its folder is missing"),
        (["{folder}", "--csv", "{folder}/t", "--markdown", "{folder}/t"], "give each a file of its own"),
    ],
)
def test_refusals_are_one_sentence(argv, words: str, folder, capsys) -> None:
    (folder / "empty").mkdir()
    (folder / "damaged.json").write_text("{")
    (folder / "other.json").write_text('{"schema": 1}')
    assert main(["tables", *(part.format(folder=folder) for part in argv)]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("any4: error: ") and words in line


def test_folders_that_are_no_run_are_not_written_to(tmp_path, capsys) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.txt").write_text("years of work")
    argv = ["eval", "tiny", "--text", str(tmp_path / "thesis" / "text.txt"), "--out"]
    for out, words in (
        ("thesis", "is not empty and holds no args.json"),
        ("run", "was not written by any4 eval of this version"),
        ("thesis/text.txt/below", "text.txt"),
    ):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "args.json").write_text("[]")
        assert main([*argv, str(tmp_path / out)]) == 1
        assert words in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["text.txt"]
