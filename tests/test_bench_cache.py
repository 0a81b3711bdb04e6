"""`any4 bench cache`: what it writes and refuses. No timing is asserted."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax.benchmarks import cache, read, timing
from any4_jax.cli import main
from cuda_ffi import registration


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A streaming read of 1 MB, which measures nothing and costs nothing."""
    monkeypatch.setattr(timing, "STREAM_BYTES", {"cpu": 2**20})


def test_rows_by_cache_and_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, svg = str(tmp_path / "r.json"), tmp_path / "r.svg"
    argv = ["bench", "cache", "--shape", "tiny-llama", "--contexts", "62", "--caches", "dense,kivi-2,kvquant-2"]
    argv += ["--method", "bfloat16", "--tokens", "2", "--rounds", "1", "--out", out, "--svg", str(svg)]
    assert main(argv) == 0, capsys.readouterr().err
    rows = read(out).rows
    assert [(row["cache"], row["context"]) for row in rows] == [(name, 62) for name in ("dense", "kivi-2", "kvquant-2")]
    for row in rows:
        kernels = {"dense": "cpu_attention", "kivi-2": "cpu_kivi_attention", "kvquant-2": "cpu_kvquant_attention"}
        kernel = kernels[row["cache"]] if registration.why_not("cpu") is None else "xla"
        assert row["kernel"] == kernel and row["attention_ms"] > 0 and row["step_ms"] > 0
        assert (row["cache"] == "dense") == (row["bytes_ratio_to_first"] == 1)
    # One head of 64 channels, twice, in bfloat16; the length and the start take 8 bytes.
    assert rows[0]["bytes_per_token"] == pytest.approx(256 + 8 / 64, rel=1e-3)
    assert "kivi-2" in svg.read_text() and "ms of a step" in svg.read_text()
    assert "attention ms" in capsys.readouterr().out


def test_caches_are_full_and_stay_at_their_length() -> None:
    bench = cache.CacheBench("tiny-llama", None, (70,), batch=2, tokens=3, rounds=1)
    (held,) = cache.caches_of("kivi-4", bench, 70)
    assert int(held.length) == 70
    for leaf in jax.tree.leaves((held.keys, held.values)):
        assert len(np.unique(np.asarray(leaf.astype(jnp.float32)))) > 10

    class Nothing:
        def measure(self) -> None: ...

    (row,) = cache.run(["kivi-4"], bench, stream=Nothing())
    assert row["step_ms"] is None and row["attention_speed_ratio_to_first"] == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--caches", "dense,kivi-3"], "got 'kivi-3', need some of dense, kivi-4, kivi-2, "),
        (
            ["--shape", "tiny-llama", "--contexts", "1000"],
            "tiny-llama has a context of 1024 tokens, and 1000 with 32 new",
        ),
        (["--contexts", "0"], "got '0', need a whole number of at least 1"),
    ],
)
def test_what_does_not_exist_is_refused(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main(["bench", "cache", *argv]) != 0
    except SystemExit as end:
        assert end.code != 0
    assert words in capsys.readouterr().err
