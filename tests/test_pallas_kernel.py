"""The Pallas products: on any machine Triton's kernels in jax's interpreter against the float64 truth, and every kernel
lowered for an H100 and an A100; on a GPU the kernel contract.

The interpreter can run neither byte permutation in assembly nor `wgmma` with an operand in registers: that the assembly
decodes right (triton_lookup.permuted, all of mosaic_registers) only the runs on a GPU show.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cuda_kernel import ULP, exact, leaf, rows

from any4_jax import cli, packing
from any4_jax.matmul import explain, matmul, prepare, unprepare
from any4_jax.partition import combine, partition
from any4_jax.weights import QuantizedTensor
from pallas_kernels import (
    choice,
    layout,
    mosaic_narrow,
    mosaic_wide,
    triton_dequantize,
    triton_gemm,
    triton_gemv,
    tuning,
)
from pallas_kernels.choice import CONFIGS, Choice, Problem, choose
from pallas_kernels.device import gpu_name
from pallas_kernels.lut_product import lut_product

gpu = pytest.mark.skipif(gpu_name() is None, reason="needs an NVIDIA GPU")
HOPPER = "H100" in str(gpu_name())
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")

TRITON, MOSAIC = "__gpu$xla.gpu.triton", "mosaic_gpu_v2"
NAMES = {"H100": "NVIDIA H100 80GB HBM3", "A100": "NVIDIA A100-SXM4-80GB"}
# One ulp is rounding of the result; x in float32 leaves room for sums alone.
UNIT = {**ULP, "float32": 2.0**-23}
SMALL = {
    "triton_gemv": triton_gemv.Config(columns=64),
    "triton_gemm": triton_gemm.Config(rows=16, split=2),
    "triton_dequantize": triton_dequantize.Config(columns=64),
    "mosaic_narrow": mosaic_narrow.Config(8, warpgroups=2, stages=2),
    "mosaic_wide": mosaic_wide.Config(columns=64, stages=2),
}


def product(x: jax.Array, w: QuantizedTensor, chosen: Choice | None = None, interpret: bool = False) -> jax.Array:
    codes = w.codes if isinstance(w.codes, tuple) else (w.codes,)
    fields = dict(bits=w.bits, group_size=w.group_size)
    return lut_product(x, codes, w.lut, w.scales, w.offsets, **fields, choice=chosen, interpret=interpret)


def forced(kernel: str, **fields: Any) -> Choice:
    return Choice(kernel, dataclasses.replace(SMALL[kernel], **fields), "asked for by this test")


def problem(x: Any, w: QuantizedTensor, name: str) -> Problem:
    offsets = None if w.offsets is None else w.offsets.dtype
    n, k = w.shape
    return Problem(n, k, x.shape[0], w.bits, w.group_size, x.dtype, w.lut.dtype, w.scales.dtype, offsets, name)


def check(y: jax.Array, x: jax.Array, w: QuantizedTensor, kernel: str) -> None:
    """Every element within the rounding of its dtype, of float32 sums and, where the kernel rounds them, of weights."""
    assert y.dtype == x.dtype and y.shape == (x.shape[0], w.shape[0])
    dense, magnitude = exact(w)
    wide, unit = np.asarray(x, np.float64), UNIT[str(x.dtype)]
    expected = wide @ dense.T
    slack = 32 * 2.0**-24 * (np.abs(wide) @ magnitude.T)
    if not kernel.startswith("triton_gem"):
        slack = slack + 2 * unit * np.sqrt(wide**2 @ dense.T**2)
    error = np.abs(np.asarray(y, np.float64) - expected)
    np.testing.assert_array_less(error, slack + unit * np.abs(expected) + 1e-30)


def chosen_and_checked(x: jax.Array, w: QuantizedTensor) -> None:
    check(product(x, w), x, w, choose(problem(x, w, gpu_name() or "")).kernel)


def test_layout_is_that_of_packing() -> None:
    assert layout.PLANES == packing.PLANES
    golden = np.load(Path(__file__).parent / "golden" / "packing.npz")
    for name in golden.files:
        if name.startswith("codes"):
            bits, length = map(int, name.split("_")[1:])
            planes = tuple(golden[f"plane_{bits}_{length}_{i}"] for i in range(len(layout.PLANES[bits])))
            np.testing.assert_array_equal(layout.unpack(planes, bits, length), golden[name])


# M, N, K, what `leaf` takes, dtype of x
INTERPRETED = [
    ("triton_gemv", 3, 9, 301, dict(g=128), "bfloat16"),
    ("triton_dequantize", 2, 5, 75, dict(bits=3, g=32, scale=jnp.uint8, row_tables=False, offsets=False), "float32"),
    ("triton_gemm", 17, 19, 333, dict(g=64), "bfloat16"),
]


@pytest.mark.parametrize(("kernel", "m", "n", "k", "fields", "dtype"), INTERPRETED, ids=lambda v: str(v)[:20])
def test_interpreted_kernels_are_right(kernel: str, m: int, n: int, k: int, fields: dict[str, Any], dtype: str) -> None:
    """Odd sizes, a short last group, rows of W and of x beyond the last of a tile, several turns."""
    w, x = leaf(n, k, **fields), rows(m, k, dtype=dtype)
    more = dict(rows_of_x=2) if kernel == "triton_gemv" and m > 1 else {}
    check(jax.jit(lambda x, w: product(x, w, forced(kernel, **more), True))(x, w), x, w, kernel)


def lowered(function: Any, *arguments: Any, on: str = "H100") -> str:
    """StableHLO for a GPU that this machine needn't have."""
    device = jax.sharding.AbstractDevice(device_kind=NAMES[on], num_cores=None, platform="gpu")
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (TRITON, MOSAIC)]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(
            *arguments
        ).mlir_module()


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
        ((8192, 8192), {1: "triton_gemv", 64: "mosaic_narrow", 256: "mosaic_wide", 2048: "triton_dequantize"}),
        # A few blocks would leave most of the GPU idle.
        ((1024, 8192), {1: "triton_gemv", 64: "mosaic_narrow", 256: "triton_dequantize"}),
    ],
)
def test_the_kernel_follows_the_rows_of_x(shape: tuple[int, int], kernels: dict[int, str]) -> None:
    dtypes = (jnp.bfloat16,) * 4
    for m, kernel in kernels.items():
        assert choose(Problem(*shape, m, 4, 64, *dtypes, NAMES["H100"])).kernel == kernel


def matmul_on_pallas(x: jax.Array, w: QuantizedTensor) -> jax.Array:
    """As `matmul` chooses it where CUDA's kernels aren't built; by name it asks for a GPU in this process."""
    return matmul(x, prepare(w, "pallas"))


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
        (dict(x=jnp.float64), "x is float64, it takes bfloat16, float16 and float32"),
        (dict(bits=5), "codes have 5 bits, it takes 2, 3, 4 and 8"),
        (dict(g=48), "groups have 48 inputs, it takes powers of two from 16 on, or the whole row"),
        (dict(on=None), "no NVIDIA GPU is attached, nor named by an abstract device"),
        (dict(platform="cpu"), "it runs on cuda, not on cpu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_it_declines_it_says(fields: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pallas_kernels.device.gpu_name", lambda: fields.get("on", NAMES["H100"]))
    w = leaf(8, 256, bits=fields.get("bits", 4), g=fields.get("g", 64))
    x = jax.ShapeDtypeStruct((1, 256), fields.get("x", jnp.bfloat16))
    assert f"pallas: {words}" in explain(x, w, fields.get("platform", "cuda")).splitlines()


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


def test_what_is_tuned_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kernel: the rule's configuration is the first candidate, and a row of another one is taken from then."""
    dtypes = (jnp.bfloat16,) * 4
    for m in (1, 16, 256, 2048):
        asked = Problem(8192, 4096, m, 4, 128, *dtypes, NAMES["H100"])
        first, *others = tuning.candidates(asked)
        assert first == choose(asked) and len({repr(c.config) for c in (first, *others)}) == 1 + len(others) > 1
        found = json.loads(json.dumps(tuning.row(asked, others[-1])))
        names = ("gpu", "kernel", "n", "k", "m", "bits", "group_size")
        with monkeypatch.context() as patch:
            patch.setattr(choice, "_tuned", lambda f=found, n=names: {tuple(f[name] for name in n): f["config"]})
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
    with pytest.raises(ValueError, match="codes have 5 bits, it takes 2, 3, 4 and 8; use another backend"):
        product(rows(1, 64), leaf(6, 64, bits=5))


@gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 3, 8, 33, 200])
def test_every_width_and_number_of_rows(m: int, bits: int, dtype: str) -> None:
    x = rows(m, 352, dtype=dtype)
    for w in (leaf(37, 352, bits=bits), leaf(37, 352, bits=bits, g=32, offsets=False)):
        chosen_and_checked(x, w)


@gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize("m", [1, 2, 8, 9, 16, 30, 64, 65, 200, 300, 520])
def test_the_kernels_of_large_matrices(m: int, offsets: bool, dtype: str) -> None:
    """Several turns a warpgroup, idle ones, several blocks; the last tile of x whole and not."""
    for n, k in ((64, 128), (384, 1280), (128, 4096)):
        for row_tables in (True, False):
            fields = dict(lut=dtype, scale=dtype, offsets=offsets, row_tables=row_tables)
            w, x = leaf(n, k, **fields), rows(m, k, dtype=dtype)
            chosen_and_checked(x, w)
            if HOPPER and n % 128 == 0:
                # Matrices for which it is chosen are too large for a test.
                check(product(x, w, forced("mosaic_wide", columns=256)), x, w, "mosaic_wide")


@gpu
@pytest.mark.parametrize("g", [16, 32, 64, 128, 256, 512, 1000, 2000])
def test_every_group_size(g: int) -> None:
    """Several groups a step and several steps a group, and a short last one."""
    for k in (1000, 1184, 1536):
        if g < k and g & (g - 1):
            continue
        w = leaf(128, k, g=g)
        for m in (1, 3, 40, 100):
            x = rows(m, k)
            chosen_and_checked(x, w)


@gpu
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    "fields",
    [
        dict(row_tables=False),
        dict(offsets=False),
        dict(scale=jnp.uint8, offsets=False),
        dict(scale=jnp.float32),
        dict(scale=jnp.float16, lut=jnp.float16),
        dict(lut=jnp.float32),
    ],
    ids=lambda fields: " ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in fields.items()),
)
def test_every_kind_of_table_and_scale(bits: int, fields: dict[str, Any]) -> None:
    w = leaf(64, 256, bits=bits, g=32, **fields)
    for dtype in ULP:
        for m in (1, 9, 100):
            chosen_and_checked(rows(m, 256, dtype=dtype), w)


@gpu
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 31), (2, 17, 33), (65, 3, 70), (12, 9, 4100), (9, 4099, 96)])
def test_odd_shapes(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    for bits in (2, 3, 4, 8):
        chosen_and_checked(rows(m, k), leaf(n, k, g=64, bits=bits))


@gpu
@pytest.mark.parametrize("m", [1, 7, 20])
def test_triton_multiplies_what_wgmma_would(m: int) -> None:
    """The kernels that other GPUs take, on this one."""
    w, x = leaf(200, 1152), rows(m, 1152)
    for kernel in ("triton_gemv", "triton_gemm"):
        check(product(x, w, forced(kernel)), x, w, kernel)


@on_hopper
@pytest.mark.parametrize("kernel", ["mosaic_narrow", "mosaic_wide"])
def test_wgmma_with_other_configurations(kernel: str) -> None:
    w, x = leaf(256, 1280), rows(7, 1280)
    check(product(x, w, forced(kernel)), x, w, kernel)


@gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", list(ULP))
def test_identity_gives_the_weights_within_one_ulp(bits: int, dtype: str) -> None:
    w = leaf(64, 256, bits=bits, lut=dtype, scale=dtype)
    dense, magnitude = exact(w)
    eye = jnp.eye(256, dtype=dtype)
    for first, last in ((0, 256), (0, 1), (3, 9), (100, 120)):
        error = np.abs(np.asarray(product(eye[first:last], w), np.float64).T - dense[:, first:last])
        unit = ULP[dtype] * np.abs(dense) + 2.0**-22 * magnitude
        assert (error <= unit[:, first:last]).all()


@gpu
def test_results_are_the_same_every_time() -> None:
    w = leaf(4096, 4096)
    for m in (1, 8, 30, 300):
        x = rows(m, 4096)
        first = np.asarray(product(x, w))
        for _ in range(5):
            np.testing.assert_array_equal(product(x, w), first)


@gpu
def test_values_that_are_not_finite_stay_in_their_rows() -> None:
    for w in (leaf(64, 512), leaf(21, 96, g=32)):
        k = w.shape[1]
        scales = w.scales.at[1, 2].set(jnp.inf).at[2, 0].set(jnp.nan)
        for m in (1, 5, 70):
            y = np.asarray(product(rows(m, k), dataclasses.replace(w, scales=scales)), np.float32)
            assert np.isfinite(np.delete(y, [1, 2], axis=1)).all() and not np.isfinite(y[:, [1, 2]]).any()
            bad = np.asarray(product(rows(m, k).at[0, 5].set(jnp.nan), w), np.float32)
            assert np.isnan(bad[0]).all() and np.isfinite(bad[1:]).all()


@gpu
def test_more_weights_than_31_bits_count() -> None:
    """2^31 + 2^17 weights, whose rows lie beyond 2^30 bytes: 64 rows of random codes, the others zero."""
    n, k = 32768 + 64, 65536
    small = leaf(64, k)
    far = jnp.zeros((n, k // 2), jnp.uint8).at[-64:].set(small.codes)
    fill = lambda a: jnp.zeros((n, *a.shape[1:]), a.dtype).at[-64:].set(a)  # noqa: E731
    w = dataclasses.replace(
        small, codes=far, lut=fill(small.lut), scales=fill(small.scales), offsets=fill(small.offsets)
    )
    for m in (1, 3):
        x = rows(m, k)
        y = product(x, w)
        check(y[:, -64:], x, small, choose(problem(x, w, gpu_name() or "")).kernel)
        assert not np.asarray(y[:, :-64]).any()


@gpu
def test_the_whole_result_is_written() -> None:
    """The memory that results get was full of NaN a moment ago."""
    for w in (leaf(4032, 512), leaf(4001, 480, g=32)):
        for m in (1, 7, 20, 90):
            x = rows(m, w.shape[1])
            run = jax.jit(lambda x, w: product(x, w))
            run(x, w).block_until_ready()
            jnp.full((64, m, w.shape[0]), jnp.nan, jnp.bfloat16).block_until_ready()
            check(run(x, w), x, w, choose(problem(x, w, gpu_name() or "")).kernel)


@gpu
def test_matmul_takes_it_and_agrees_with_xla() -> None:
    w = leaf(128, 512)
    for x in (rows(1, 512), rows(2, 3, 512)):
        assert "pallas: taken" in explain(x, w) or "pallas: could" in explain(x, w)
        y, truth = (np.asarray(jax.jit(matmul, static_argnums=2)(x, w, name), np.float32) for name in ("pallas", "xla"))
        np.testing.assert_allclose(y, truth, rtol=0.02, atol=0.5)
        text = jax.jit(matmul, static_argnums=2).lower(x, w, "pallas").compile().as_text()
        assert "[128,512]" not in text and "[512,128]" not in text
    assert matmul(x[:0], w, "pallas").shape == (0, 3, 128)


@gpu
def test_gradients_equal_those_of_xla() -> None:
    w, x = leaf(64, 256), rows(3, 256)
    tables, codes = partition(w)

    def loss(x, t, backend):
        return jnp.sin(matmul(x, combine(t, codes), backend).astype(jnp.float32) / 64).sum()

    ours, theirs = (jax.grad(loss, (0, 1))(x, tables, backend) for backend in ("pallas", "xla"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= 0.02 * np.linalg.norm(b)
