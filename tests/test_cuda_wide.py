"""Hopper's CUDA kernel for many rows of x: on such a GPU its results, elsewhere what is lowered and compiled for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_contract import HALVES, ULP, exact, leaf, rows
from test_cuda_kernel import check, gpu, lowered, matrix, native, product

import any4_jax as a4
from any4_jax.product import matmul, matmul_each
from cuda_ffi import build
from cuda_ffi.lut_product_cuda import DEQUANTIZE, PRODUCT, is_fast, is_wide, on_hopper

hopper = pytest.mark.skipif(not on_hopper(), reason="needs a GPU of compute capability 9.0")


@gpu
@hopper
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("g", [32, 64, 128, 256, 10**6])
@pytest.mark.parametrize("offsets", [True, False])
def test_every_instance(g: int, offsets: bool, dtype: str) -> None:
    """Shapes that each number of columns and of tiles is chosen for: one tile a block and several, rows and columns
    past the last, more steps than stages, fewer, and a last step of half the inputs; few tiles of many steps, which two
    blocks share."""
    for m, n, k in (
        (33, 264, 2336),
        (64, 8192, 64),
        (100, 264, 1024),
        (128, 17000, 96),
        (300, 17000, 192),
        (513, 200, 576),
        (40, 136, 4128),
        (128, 72, 4160),
        (500, 264, 2208),
    ):
        w, x = leaf(n, k, g=g, offsets=offsets, row_tables=m != 100), rows(m, k, dtype=dtype)
        assert is_wide(matrix(w), x.dtype, w.shape[1], 4, w.group_size)
        check(product(x, w), x, w)


@gpu
@hopper
def test_every_kind_of_scale() -> None:
    for fields in (
        dict(scale=jnp.uint8, g=32, offsets=False),
        dict(scale=jnp.uint8, g=32),
        dict(scale=jnp.uint8, g=128),
        dict(scale=jnp.float16, lut=jnp.float16),
        dict(scale=jnp.float16, g=32, offsets=False),
    ):
        half = fields["scale"] == jnp.float16
        w, x = leaf(520, 320, **fields), rows(90, 320, dtype="float16" if half else "bfloat16")
        assert is_wide(matrix(w), x.dtype, w.shape[1], 4, w.group_size)
        check(product(x, w), x, w)


@gpu
@hopper
@pytest.mark.parametrize("dtype", HALVES)
def test_identity_gives_the_weights_rounded_once(dtype: str) -> None:
    """The fused multiplication and addition rounds as XLA does, which decodes in float32."""
    w = leaf(136, 256, g=64, lut=dtype, scale=dtype)
    dense, _ = exact(w)
    ours = np.asarray(product(jnp.eye(256, dtype=dtype), w), np.float64).T
    assert (np.abs(ours - dense) <= ULP[dtype] / 2 * np.abs(dense) + 2.0**-25).all()


@gpu
@hopper
@pytest.mark.parametrize("m", [40, 100, 300])
def test_no_bit_depends_on_what_else_is_computed(m: int) -> None:
    """The same every time, in a stack and in company; indices beyond a stack stand for its ends."""
    x = rows(m, 2112)
    ws = [leaf(n, 2112, seed=seed) for seed, n in enumerate((512, 136, 512))]
    alone = [np.asarray(product(x, w)) for w in ws]
    for again, y in zip(jax.jit(matmul_each)(x, ws), alone, strict=True):
        np.testing.assert_array_equal(again, y)
    stack = jax.tree.map(lambda *a: jnp.stack(a), ws[0], ws[2])
    run = jax.jit(lambda x, w, i: matmul(x, a4.take(w, i), "cuda"))
    for i, expected in ((0, 0), (1, 2), (-3, 0), (9, 2)):
        np.testing.assert_array_equal(run(x, stack, i), alone[expected])


@gpu
@hopper
def test_what_is_not_finite_stays_in_its_row() -> None:
    w, x = leaf(200, 512), rows(70, 512)
    scales = w.scales.at[1, 2].set(jnp.inf).at[130, 0].set(jnp.nan)
    y = np.asarray(product(x, dataclasses.replace(w, scales=scales)), np.float32)
    assert np.isfinite(np.delete(y, [1, 130], axis=1)).all() and not np.isfinite(y[:, [1, 130]]).any()
    bad = np.asarray(product(x.at[3, 5].set(jnp.nan), w), np.float32)
    assert np.isnan(bad[3]).all() and np.isfinite(np.delete(bad, 3, axis=0)).all()


@gpu
@hopper
def test_the_whole_result_is_written_and_nothing_else() -> None:
    """The memory that results get was full of NaN a moment ago."""
    for m, n in ((65, 264), (257, 136)):
        w, x = leaf(n, 320), rows(m, 320)
        run = jax.jit(product)
        run(x, w).block_until_ready()
        jnp.full((64, m, n), jnp.nan, jnp.bfloat16).block_until_ready()
        check(run(x, w), x, w)


@native
@pytest.mark.parametrize(("on", "called"), [("NVIDIA H100 80GB HBM3", PRODUCT), ("NVIDIA A100-SXM4-80GB", DEQUANTIZE)])
def test_on_hopper_there_is_no_dense_weight(on: str, called: str) -> None:
    text = lowered(matmul, rows(300, 512), leaf(96, 512), on=on)
    assert text.count(f"@{called}(") == 1 and text.count("stablehlo.custom_call @any4") == 1
    assert ("96x512xbf16" in text) == (called == DEQUANTIZE)


@native
@pytest.mark.parametrize(
    ("fields", "dtype", "taken"),
    [
        (dict(), "bfloat16", True),
        (dict(), "float16", True),
        (dict(g=32, scale=jnp.uint8), "bfloat16", True),
        (dict(g=32, scale=jnp.uint8), "float16", False),
        (dict(scale=jnp.float16), "float16", True),
        (dict(scale=jnp.float16), "bfloat16", False),
        (dict(scale=jnp.float32), "bfloat16", False),
        (dict(g=16), "bfloat16", False),
        (dict(bits=3), "bfloat16", False),
        (dict(n=36), "bfloat16", False),
    ],
    ids=str,
)
def test_what_it_takes(fields: dict[str, Any], dtype: str, taken: bool) -> None:
    w = leaf(**{"n": 40, "k": 64, **fields})
    assert is_wide(matrix(w), jnp.dtype(dtype), w.shape[1], w.bits, w.group_size) == taken


@native
@pytest.mark.parametrize(
    ("fields", "dtype", "fast"),
    [
        (dict(), "bfloat16", True),
        (dict(), "float16", True),
        (dict(g=32), "bfloat16", True),
        (dict(g=32), "float16", False),
        (dict(g=16), "bfloat16", False),
        (dict(g=32, scale=jnp.uint8, offsets=False), "bfloat16", True),
        (dict(g=32, scale=jnp.uint8), "bfloat16", False),
        (dict(g=64, scale=jnp.uint8, offsets=False), "bfloat16", False),
        (dict(scale=jnp.float16), "float16", False),
        (dict(bits=3), "bfloat16", False),
        (dict(bits=8), "bfloat16", False),
        (dict(n=48), "bfloat16", False),
        (dict(k=384), "bfloat16", False),
    ],
    ids=str,
)
def test_what_the_kernel_for_fewer_rows_takes(fields: dict[str, Any], dtype: str, fast: bool) -> None:
    w = leaf(**{"n": 64, "k": 512, "g": 128, **fields})
    assert is_fast(matrix(w), jnp.dtype(dtype), w.shape[1], w.bits, w.group_size) == fast


def test_files_for_hopper_alone_are_compiled_for_it_alone() -> None:
    files = [file for file in build.source_files("cuda") if file.name.endswith(build.HOPPER_FILES)]
    assert len(files) == 2
    for file in files:
        targets = [flag for flag in build.flags("cuda", file) if flag.startswith("-gencode")]
        assert targets == ["-gencode=arch=compute_90a,code=sm_90a"] and build.machine_flags("nvcc", file) == []
    assert build.CUDA_PTX in build.flags("cuda", Path("lut_product.cu"))
    text = (Path(__file__).resolve().parent.parent / "CMakeLists.txt").read_text(encoding="utf-8")
    assert "CUDA_ARCHITECTURES 90a-real" in text and text.count(build.HOPPER_FILES.replace(".", "\\\\.") + "$") == 2
