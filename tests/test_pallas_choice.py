"""Which Pallas kernel is taken for a product, with what configuration and why; and every kernel lowered for an H100 and
an A100."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_contract import leaf, rows
from test_pallas_kernel import forced, problem, product

from any4_jax import cli, packing
from any4_jax.matmul import explain, matmul, prepare, unprepare
from any4_jax.weights import QuantizedTensor
from pallas_kernels import choice, layout, triton_gemv, tuning
from pallas_kernels.choice import CONFIGS, Problem, choose
from pallas_kernels.device import gpu_name

TRITON, MOSAIC = "__gpu$xla.gpu.triton", "mosaic_gpu_v2"
NAMES = {"H100": "NVIDIA H100 80GB HBM3", "A100": "NVIDIA A100-SXM4-80GB"}


def test_layout_is_that_of_packing() -> None:
    assert layout.PLANES == packing.PLANES
    golden = np.load(Path(__file__).parent / "golden" / "packing.npz")
    for name in golden.files:
        if name.startswith("codes"):
            bits, length = map(int, name.split("_")[1:])
            planes = tuple(golden[f"plane_{bits}_{length}_{i}"] for i in range(len(layout.PLANES[bits])))
            np.testing.assert_array_equal(layout.unpack(planes, bits, length), golden[name])


def lowered(function: Any, *arguments: Any, on: str = "H100") -> str:
    """StableHLO for a GPU that this machine needn't have."""
    device = jax.sharding.AbstractDevice(device_kind=NAMES[on], num_cores=None, platform="gpu")
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (TRITON, MOSAIC)]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(
            *arguments
        ).mlir_module()


def matmul_on_pallas(x: jax.Array, w: QuantizedTensor) -> jax.Array:
    """As `matmul` chooses it where CUDA's kernels aren't built; by name it asks for a GPU in this process."""
    return matmul(x, prepare(w, "pallas"))


@pytest.mark.filterwarnings("ignore:.*Pallas Triton:DeprecationWarning")
@pytest.mark.parametrize("on", NAMES)
@pytest.mark.parametrize(
    ("m", "fields", "kernels"),
    [
        (1, dict(), dict(H100="triton_gemv", A100="triton_gemv")),
        (5, dict(g=32, offsets=False), dict(H100="mosaic_narrow", A100="triton_gemv")),
        (60, dict(row_tables=False), dict(H100="mosaic_narrow", A100="triton_gemm")),
        (2048, dict(bits=3), dict(H100="triton_dequantize", A100="triton_dequantize")),
    ],
)
def test_it_lowers_every_kernel(m: int, fields: dict[str, Any], kernels: dict[str, str], on: str) -> None:
    """One kernel each, and no dense W but where it is decoded to memory for XLA's product."""
    w, x = leaf(384, 512, **fields), rows(m, 512)
    kernel = choose(problem(x, w, NAMES[on])).kernel
    assert kernel == kernels[on] and set(kernels.values()) <= set(CONFIGS)
    text = lowered(matmul_on_pallas, x, w, on=on)
    assert text.count(f"@{MOSAIC if kernel.startswith('mosaic') else TRITON}(") == 1
    assert ("tensor<384x512xbf16>" in text) == (kernel == "triton_dequantize")


def test_wgmma_for_many_rows_lowers() -> None:
    w, x = leaf(384, 512, g=256), rows(300, 512)
    text = lowered(lambda x, w: product(x, w, forced("mosaic_wide")), x, w)
    assert text.count(f"@{MOSAIC}(") == 1 and "384x512xbf16" not in text


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [
        ((8192, 8192), {1: "mosaic_narrow", 64: "mosaic_narrow", 65: "mosaic_wide", 4096: "mosaic_wide"}),
        # A few blocks would leave most of the GPU idle.
        ((1024, 8192), {1: "triton_gemv", 64: "mosaic_narrow", 256: "triton_dequantize"}),
    ],
)
def test_the_kernel_follows_the_rows_of_x(shape: tuple[int, int], kernels: dict[int, str]) -> None:
    dtypes = (jnp.bfloat16,) * 4
    for m, kernel in kernels.items():
        assert choose(Problem(*shape, m, 4, 64, *dtypes, NAMES["H100"])).kernel == kernel


@pytest.mark.filterwarnings("ignore:.*Pallas Triton:DeprecationWarning")
def test_vmap_over_x_is_one_kernel_and_over_weights_a_loop() -> None:
    w, x = leaf(64, 256), rows(4, 3, 256)
    text = lowered(jax.vmap(matmul_on_pallas, (0, None)), x, w)
    assert text.count(f"@{MOSAIC}(") == 1 and "stablehlo.while" not in text
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), w)
    text = lowered(jax.vmap(matmul_on_pallas), x, stack)
    assert text.count(f"@{MOSAIC}(") == 1 and "stablehlo.while" in text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(x=jnp.float64), "x is float64, but the kernels take bfloat16, float16 and float32"),
        (dict(bits=5), "codes have 5 bits, but the kernels take 2, 3, 4 and 8"),
        (dict(g=48), "groups have 48 inputs, but the kernels take powers of two from 16 on, or the whole row"),
        (dict(on=None), "no NVIDIA GPU is attached, and no abstract device names one"),
        (dict(platform="cpu"), "it runs on cuda, not on cpu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_it_declines_it_says(fields: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pallas_kernels.device.gpu_name", lambda: fields.get("on", NAMES["H100"]))
    w = leaf(8, 256, bits=fields.get("bits", 4), g=fields.get("g", 64))
    x = jax.ShapeDtypeStruct((1, 256), fields.get("x", jnp.bfloat16))
    assert f"pallas: {words}" in explain(x, w, fields.get("platform", "cuda")).splitlines()


def test_explain_tells_the_kernel_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pallas_kernels.device.gpu_name", lambda: NAMES["H100"])
    w = leaf(128, 256)
    (line,) = (text for text in explain(rows(16, 256), w, "cuda").splitlines() if text.startswith("pallas"))
    assert line.endswith("(mosaic_narrow, 16 rows of x on a Hopper GPU: wgmma, with the inputs split among warpgroups)")
    # Ahead of XLA, and behind CUDA's kernels where they are built.
    assert line.startswith(("pallas: taken", "pallas: could, but 'cuda' comes first"))


def test_a_measured_configuration_goes_before_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = rows(1, 256), leaf(64, 256)
    asked = problem(x, w, NAMES["H100"])
    config = dict(rows=16, columns=32, warps=2, rows_of_x=1)
    monkeypatch.setattr(choice, "_tuned", lambda: {(NAMES["H100"], "triton_gemv", 64, 256, 1, 4, 128): config})
    assert choose(asked).config == triton_gemv.Config(**config) and "by measurement" in choose(asked).reason
    assert choose(dataclasses.replace(asked, gpu=NAMES["A100"])).config != triton_gemv.Config(**config)


def test_every_tuned_configuration_fits_its_kernel() -> None:
    choice._tuned.cache_clear()
    for (_, kernel, *_), config in choice._tuned().items():
        assert CONFIGS[kernel](**config)


@pytest.mark.parametrize(
    ("kernel", "n", "m", "on"),
    [
        ("triton_gemv", 4096, 1, "H100"),
        ("triton_gemm", 4096, 16, "A100"),
        ("triton_dequantize", 4096, 100, "A100"),
        ("mosaic_narrow", 8192, 16, "H100"),
        ("mosaic_wide", 8192, 256, "H100"),
    ],
)
def test_what_is_tuned_is_found_again(kernel: str, n: int, m: int, on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule's configuration is the first candidate, and a row of another one is taken from then."""
    asked = Problem(n, 4096, m, 4, 128, *(jnp.bfloat16,) * 4, NAMES[on])
    first, *others = tuning.candidates(asked)
    assert first == choose(asked) and first.kernel == kernel
    assert len({repr(c.config) for c in (first, *others)}) == 1 + len(others) > 1
    found = json.loads(json.dumps(tuning.row(asked, others[-1])))
    names = ("gpu", "kernel", "n", "k", "m", "bits", "group_size")
    monkeypatch.setattr(choice, "_tuned", lambda: {tuple(found[name] for name in names): found["config"]})
    assert choose(asked).config == others[-1].config != first.config


def test_tuning_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if gpu_name() is None:
        assert cli.main(["bench", "gemm", "--tune", "--shapes", "64x128", "--m", "1"]) == 1
        assert "nothing to tune for 64 x 128: it runs on cuda, not on" in capsys.readouterr().err


def test_prepare_changes_nothing() -> None:
    w = leaf(6, 50, bits=3, g=16)
    back = unprepare(prepare(w, "pallas"))
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(w), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_operands_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="codes have 5 bits, but the kernels take 2, 3, 4 and 8; use another backend"):
        product(rows(1, 64), leaf(6, 64, bits=5))
