"""`any4 bench`: the form of results, and that the benchmarks run and write it. No timing is asserted."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax.benchmarks import Device, Result, gemm, gemm_cuda, machine, read, timing, write
from any4_jax.benchmarks.schema import check
from any4_jax.cli import main
from any4_jax.cli.bench_gemm import _shapes
from any4_jax.weights import dequantize

REPOSITORY = Path(__file__).resolve().parent.parent
RECORDED = sorted((REPOSITORY / "examples" / "benchmarks" / "results").glob("*.json"))

GOOD = Result(
    benchmark="nothing",
    command="any4 bench nothing",
    date="2026-01-31T23:59:59Z",
    device=Device("a processor", "cpu", 2, ("avx2",)),
    versions={"any4_jax": "0", "jax": "0", "jaxlib": "0", "python": "3"},
    settings={"rounds": 3},
    notes=("nothing was done",),
    rows=({"name": "a", "us": 1.5, "ratio": None}, {"name": "b", "us": 2.5, "ratio": 2.0}),
)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A streaming read of 1 MB, which measures nothing and costs nothing."""
    monkeypatch.setattr(timing, "STREAM_BYTES", {"cpu": 2**20})


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "r.json", GOOD)
    assert read(tmp_path / "r.json") == GOOD
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_recorded_results_exist() -> None:
    assert RECORDED


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_recorded_result_has_the_form(path: Path) -> None:
    read(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(benchmark=""), "benchmark is '', and a text is needed"),
        (dict(date="2026-01-31"), "UTC as 2026-01-31T23:59:59Z is needed"),
        (dict(date="2026-01-32T00:00:00Z"), "UTC as 2026-01-31T23:59:59Z is needed"),
        (dict(device=Device("a", "cpu", 0, ())), "cores=0"),
        (dict(device=Device("a", "", 1, ())), "the device's platform is ''"),
        (dict(versions={"jax": "0", "python": "3"}), "versions lack any4_jax, jaxlib"),
        (dict(settings={"shape": (1, 2)}), "settings holds shape of type tuple"),
        (dict(notes=("",)), "a note is ''"),
        (dict(rows=()), "there are no rows"),
        (dict(rows=({"us": 1.0}, {"ms": 1.0})), "row 2 and row 1 differ in the keys ms, us"),
        (dict(rows=({"us": float("nan")},)), "row 1 holds us=nan, and finite numbers are needed"),
        (dict(rows=({"us": float("inf")},)), "row 1 holds us=inf"),
        (dict(rows=({"us": np.float32(1)},)), "us of type float32"),
        (dict(rows=({"time": 1.0},)), "time=1.0, a name without a unit"),
    ],
)
def test_a_faulty_result_is_refused_and_nothing_is_written(change: dict, words: str, tmp_path: Path) -> None:
    old = tmp_path / "r.json"
    old.write_text("what was there")
    with pytest.raises(ValueError) as refused:
        write(old, dataclasses.replace(GOOD, **change))
    assert words in str(refused.value)
    assert str(refused.value).startswith(str(old))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["what was there"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content.pop("date"), "the file lacks date"),
        (lambda content: content.update(mood="good"), "the file has mood"),
        (lambda content: content.update(schema=2), "got schema 2, need 1"),
        (lambda content: content.update(rows={}), "rows has type dict, and a list is needed"),
        (lambda content: content.update(device="cpu"), "device has type str, and an object is needed"),
        (lambda content: content["device"].pop("cores"), "device lacks cores"),
        (lambda content: content["rows"].append([1]), "row 3 has type list"),
        (lambda content: content["rows"][0].update(us=float("nan")), "us=nan"),
    ],
)
def test_a_damaged_file_is_refused(damage, words: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write(path, GOOD)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as refused:
        read(path)
    assert words in str(refused.value)


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("", "is a folder or a device"), ("pipe", "is a folder or a device"), ("no/r", "is missing")):
        with pytest.raises(OSError, match=words):
            write(tmp_path / name, GOOD)
    assert [path.is_fifo() for path in tmp_path.iterdir()] == [True]


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(ValueError, match="it is not JSON"):
        read(tmp_path / "r.json")


def test_gemm_writes_every_product(stream, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "r.json")
    argv = ["bench", "gemm", "--shapes", "64x64,32x72", "--m", "3", "--rotate-mb", "1", "--rounds", "2"]
    argv += ["--inputs", "int8", "--binary"]
    assert main([*argv, "--group-size", "32", "--platform", "cpu", "--out", out]) == 0, capsys.readouterr().err
    result = read(out)
    assert result.command.endswith(
        "any4 bench gemm " + " ".join(argv[2:]) + f" --group-size 32 --platform cpu --out {out}"
    )
    assert (result.device.platform, result.settings["group_size"]) == ("cpu", 32)
    assert {(row["n"], row["k"], row["m"]) for row in result.rows} == {(64, 64, 3), (32, 72, 3)}
    products = {(row["product"], row["dtype"]) for row in result.rows}
    names = (*gemm.DENSE, "4 bits on xla", "4 bits on xla, int8 inputs", "4 bits on xla, binary planes")
    assert products >= {(name, dtype) for name in names for dtype in gemm.DTYPES}
    # The backend cpu is either among the products or said to be out, in words.
    assert ("4 bits on cpu", "float32") in products or any("the backend cpu: " in note for note in result.notes)
    dense = [row for row in result.rows if row["product"] in gemm.DENSE and row["dtype"] == "float32"]
    assert max(row["speed_ratio_to_dense_float32"] for row in dense) == 1
    shown = capsys.readouterr().out
    assert "N=64, K=64, M=3" in shown and "4 bits on xla" in shown


@pytest.mark.parametrize("bits", [3, 4])
def test_random_weights_resemble_real_ones(bits: int) -> None:
    q = gemm.random_weight(64, 200, bits, 64)
    assert (q.shape, q.bits) == ((64, 200), bits)
    assert 0.3 < float(jnp.std(dequantize(q))) * 200**0.5 < 3


def test_gemm_refuses_to_time_a_wrong_result(stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_dense", lambda x, w: 1.01 * (x @ w))
    with pytest.raises(
        RuntimeError, match=r"dense x @ W\[K, N\], float32: the relative error of the result is 1.0e-02"
    ):
        gemm.run(gemm.Gemm(((16, 16),), m=(1,), rounds=1, rotate_mb=1))


@pytest.fixture
def as_on_cuda(stream, monkeypatch: pytest.MonkeyPatch) -> gemm.Gemm:
    """gemm_cuda's loops on whatever is here, over two copies and without torch."""
    monkeypatch.setattr(timing, "STREAM_BYTES", {"cuda": 2**20})
    stand_in = dataclasses.replace(gemm_cuda.CUDA, name="xla", supports=lambda x, w, platform: None)
    monkeypatch.setattr(gemm_cuda, "CUDA", stand_in)
    monkeypatch.setattr(gemm_cuda, "LEAST_COPIES", 2)
    monkeypatch.setattr(gemm_cuda, "MOST_COPIES", 2)
    monkeypatch.setattr(gemm_cuda, "TURN_S", 1e-6)
    monkeypatch.setitem(sys.modules, "torch", None)
    return gemm.Gemm(((512, 64),), m=(3,), rounds=1, rotate_mb=1, group_size=32)


def test_gemm_on_cuda_gives_each_product_a_row(as_on_cuda: gemm.Gemm) -> None:
    measured = gemm_cuda.run(as_on_cuda)
    products = ("4 bits in CUDA, a table a row", "4 bits in CUDA, one table", "bfloat16 in XLA")
    assert [(row["m"], row["product"]) for row in measured.rows] == [(3, p) for p in products]
    for row in measured.rows:
        assert row["us"] > 0 and row["call_us"] > 0 and row["speed_ratio_to_cublas"] is None
        assert (row["speed_ratio_to_xla"] == 1) == (row["product"] == "bfloat16 in XLA")
    assert measured.notes == ["torch isn't installed, so cuBLAS and torch's int4 product are not measured"]
    check(dataclasses.replace(GOOD, rows=tuple(measured.rows), settings=measured.settings))


def test_gemm_on_cuda_refuses_to_time_a_wrong_result(as_on_cuda: gemm.Gemm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_cuda, "_dense", lambda x, w: 1.02 * (x @ w.T))
    with pytest.raises(RuntimeError, match=r"bfloat16 in XLA, 3 rows: the relative error of the result is 2.*e-02"):
        gemm_cuda.run(as_on_cuda)


def test_candidates_go_through_all_copies_in_turns() -> None:
    seen: dict[str, list[int]] = {"a": [], "b": []}

    def candidate(name: str) -> timing.Candidate:
        def call(copy: int):
            seen[name].append(copy)
            return jnp.zeros(())

        return timing.Candidate(call, range(3))

    assert timing.interleaved([candidate("a"), candidate("b")], rounds=4, overlap=False).shape == (2, 4)
    # Three calls to estimate, then up to all three copies a round.
    assert set(seen["a"]) == set(seen["b"]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["gemm", "--shapes", "64"], 2, "got '64', need NxK or one of smollm2-135m, llama-3.2-1b"),
        (["gemm", "--shapes", "\u00b2x64"], 2, "need NxK or one of"),
        (["gemm", "--shapes", f"64x{2**31}"], 2, "need NxK or one of"),
        (["gemm", "--tune", "--plot", "r.svg"], 2, "got --tune and --plot"),
        (["gemm", "--plot", "no/such/folder/r.svg"], 1, "its folder is missing"),
        (["gemm", "--out", "."], 1, ". is a folder or a device"),
        (["gemm", "--out", "/dev/null"], 1, "/dev/null is a folder or a device"),
        (["gemm", "--m", "0"], 2, "got '0', need a whole number of at least 1"),
        (["gemm", "--platform", "cuda"], 2, "got --platform cuda, and jax runs on cpu here"),
        (["gemm", "--out", "no/such/folder/r.json"], 1, "its folder is missing"),
        (["decode", "--tokens", "1"], 2, "--tokens: got '1'"),
        (["decode", "--contexts", "8,0"], 2, "got '0', need a whole number of at least 1"),
        (["decode", "tiny", "tiny"], 2, "some more than once"),
        (["decode", "tiny", "--shape", "llama-3.2-1b"], 2, "got --shape and the model tiny"),
        (["decode", "--shape", "llama-3.2-1b", "--methods", "any4,x"], 2, "got 'x', need some of bfloat16, any4"),
        (["decode", "tiny", "--methods", "any4"], 2, "got --methods without --shape"),
        (["decode", "tiny", "--head", "any4"], 2, "got --head without --shape"),
        (["decode", "tiny", "--profile"], 2, "jax runs on cpu here"),
        (["decode", "tiny", "--svg", "no/such/folder/r.svg"], 1, "its folder is missing"),
        (["decode", "tiny", "--svg", "."], 1, ". is a folder or a device"),
        (["decode", "tiny", "--svg", "x/../r", "--out", "r"], 1, "its folder is missing"),
        (["decode", "tiny", "--svg", "./r", "--out", "r"], 2, "give each a file of its own"),
        (["decode", "a", "./a"], 2, "some more than once"),
        (["decode", "--shape", "tiny-llama", "--methods", "bfloat16", "--head", "int8"], 2, "no method with few bits"),
        ([], 2, "BENCHMARK"),
    ],
)
def test_bench_refuses(argv: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *argv]) == code
    assert words in capsys.readouterr().err


def test_shapes_by_name_and_by_size() -> None:
    assert _shapes("llama-3.2-1b,64x32,8192x2048") == (*gemm.SHAPES["llama-3.2-1b"], (64, 32))


def test_the_command_names_the_environment_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--a --b")
    assert machine.command_line(["any4", "bench"]) == "JAX_PLATFORMS=cpu XLA_FLAGS='--a --b' any4 bench"
