"""The CUDA product: on a GPU the kernel contract over formats and shapes, elsewhere lowering, layouts and words."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract
import numpy as np
import pytest
from kernel_contract import CASES, HALVES, ULP, leaf, rows, within

import any4_jax as a4
from any4_jax import methods
from any4_jax.product import explain, matmul
from any4_jax.product.backends.cuda import CUDA
from any4_jax.weights import QuantizedTensor
from cuda_ffi import build, lut_product_cuda, registration
from cuda_ffi.lut_product import Matrix
from cuda_ffi.lut_product_cuda import (
    DEQUANTIZE,
    MOST_COLUMNS,
    MOST_ROWS,
    PRODUCT,
    is_fast,
    is_wide,
    lut_products,
    on_hopper,
)

why_not = registration.why_not("cuda")
native = pytest.mark.skipif(why_not is not None, reason=str(why_not))
gpu = pytest.mark.skipif(jax.default_backend() != "gpu" or why_not is not None, reason="needs an NVIDIA GPU")


def matrix(w: QuantizedTensor) -> Matrix:
    return Matrix(w.codes if isinstance(w.codes, tuple) else (w.codes,), w.lut, w.scales, w.offsets)


def product(x: jax.Array, w: QuantizedTensor) -> jax.Array:
    (y,) = lut_products(x, [matrix(w)], bits=w.bits, group_size=w.group_size)
    return y


def in_registers(x: jax.Array, w: QuantizedTensor) -> bool:
    """Whether a kernel computes the product, and not XLA with the decoded matrix."""
    if on_hopper() and is_wide(matrix(w), x.dtype, w.shape[1], w.bits, w.group_size):
        return True
    if is_fast(matrix(w), x.dtype, w.shape[1], w.bits, w.group_size):
        return x.shape[0] <= MOST_ROWS
    return x.shape[0] * max(1, 128 // w.group_size) <= MOST_COLUMNS


def is_rounded(x: jax.Array, w: QuantizedTensor) -> bool:
    """Whether W is rounded to x's dtype: decoded to memory, or by Hopper's kernel for many rows."""
    fast = is_fast(matrix(w), x.dtype, w.shape[1], w.bits, w.group_size)
    wide = on_hopper() and is_wide(matrix(w), x.dtype, w.shape[1], w.bits, w.group_size)
    return not in_registers(x, w) or (wide and x.shape[0] > (32 if fast else 8))


def check(y: jax.Array, x: jax.Array, w: QuantizedTensor) -> None:
    unit = ULP[str(x.dtype)]
    within(y, x, w, unit, of_weights=2 * unit if is_rounded(x, w) else 0.0)


@gpu
@pytest.mark.parametrize("name", CASES)
def test_the_contract(name: str) -> None:
    for case in CASES[name]:
        x, w = case.operands()
        if CUDA.supports(x, w, "cuda") is None:
            check(product(x, w), x, w)


@gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize("m", [1, 2, 5, 8, 12, 16, 24, 32, 40, 64, 300])
def test_the_fast_kernel(m: int, offsets: bool, dtype: str) -> None:
    """Shapes that it takes: one and several row tiles a block, one and several turns a warp, idle warps."""
    # Of the last one, several tiles a multiprocessor: with more columns than one, two tiles a warp.
    for n, k in ((32, 256), (96, 1280), (64, 4096), (8192, 256)):
        for row_tables in (True, False):
            w, x = leaf(n, k, offsets=offsets, row_tables=row_tables), rows(m, k, dtype=dtype)
            check(product(x, w), x, w)


@gpu
@pytest.mark.parametrize("g", [32, 64, 256, 512, 4096])
@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize("m", [1, 3, 8, 11, 32, 50])
def test_the_fast_kernel_of_other_groups(m: int, g: int, offsets: bool) -> None:
    """Several groups a tile, and several tiles a group; (8192, 256) has two tiles a warp."""
    for n, k in ((32, 256), (64, 2304), (8192, 256)):
        w, x = leaf(n, k, g=g, offsets=offsets), rows(m, k)
        check(product(x, w), x, w)
        if g == 32 and not offsets:
            w = leaf(n, k, g=g, offsets=False, scale=jnp.uint8, row_tables=False)
            w = dataclasses.replace(w, scales=w.scales.at[0, 0].set(0))
            check(product(x, w), x, w)


@gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", HALVES)
def test_identity_gives_the_weights_within_one_ulp(bits: int, dtype: str) -> None:
    kernel_contract.identity_gives_the_weights_within_one_ulp(product, leaf(40, 256, bits=bits), dtype)


@gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", HALVES)
def test_tables_of_int8_are_those_of_their_integers(bits: int, dtype: str) -> None:
    """Each kernel, of few rows and of many, gives the same bits as with the table in x's dtype."""
    for m, n, k in ((1, 64, 512), (3, 37, 352), (9, 64, 512), (40, 264, 512), (300, 64, 512)):
        for row_tables in (True, False):
            w, x = leaf(n, k, bits=bits, row_tables=row_tables), rows(m, k, dtype=dtype)
            w = dataclasses.replace(w, lut=jnp.round(w.lut if bits == 8 else 40 * w.lut).astype(jnp.int8))
            ys = product(x, w), product(x, dataclasses.replace(w, lut=w.lut.astype(dtype)))
            np.testing.assert_array_equal(*ys)


@gpu
def test_results_are_the_same_every_time() -> None:
    kernel_contract.results_are_the_same_every_time(product, (1, 8, 30))


@gpu
def test_values_that_are_not_finite_stay_in_their_rows() -> None:
    kernel_contract.values_that_are_not_finite_stay_in_their_rows(product)


@gpu
def test_more_weights_than_31_bits_count() -> None:
    kernel_contract.more_weights_than_31_bits_count(product, check)


@gpu
def test_the_whole_result_is_written() -> None:
    kernel_contract.the_whole_result_is_written(product, check)


@gpu
def test_gradients_equal_those_of_xla() -> None:
    kernel_contract.gradients_equal_those_of_xla("cuda")


@gpu
def test_matmul_takes_it_and_agrees_with_xla() -> None:
    w, x = leaf(64, 512), rows(2, 3, 512)
    assert explain(x, w).splitlines()[0] == "cuda: taken"
    y = jax.jit(matmul)(x, w)
    np.testing.assert_allclose(
        np.asarray(y, np.float32), np.asarray(matmul(x, w, "xla"), np.float32), rtol=0.02, atol=0.5
    )
    text = jax.jit(matmul).lower(x, w).compile().as_text()
    assert PRODUCT in text and "[64,512]" not in text and "[512,64]" not in text
    assert matmul(x[:0], w, "cuda").shape == (0, 3, 64)


def lowered(function: Any, *arguments: Any, on: str = "NVIDIA A100-SXM4-80GB") -> str:
    """StableHLO for an NVIDIA GPU, which this machine needn't have."""
    device = jax.sharding.AbstractDevice(device_kind=on, num_cores=None, platform="gpu")
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in registration.TARGETS["cuda"].values()]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*arguments)
    return exported.mlir_module()


@native
@pytest.mark.parametrize(
    ("m", "calls"),
    [(1, {PRODUCT: 1, DEQUANTIZE: 0}), (MOST_ROWS, {PRODUCT: 1, DEQUANTIZE: 0}), (65, {PRODUCT: 0, DEQUANTIZE: 1})],
)
def test_it_is_lowered_to_one_call(m: int, calls: dict[str, int]) -> None:
    text = lowered(matmul, rows(m, 512), leaf(96, 512))
    for name, number in calls.items():
        assert text.count(f"@{name}(") == number
    assert ("96x512xbf16" in text) == (m > MOST_ROWS)


@native
def test_vmap_over_x_is_one_call_and_over_weights_a_loop() -> None:
    w, x = leaf(32, 256), rows(4, 3, 256)
    assert lowered(jax.vmap(matmul, (0, None)), x, w).count(f"@{PRODUCT}(") == 1
    assert "tensor<12x256xbf16>" in lowered(jax.vmap(matmul, (0, None)), x, w)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), w)
    text = lowered(jax.vmap(matmul), x, stack)
    assert text.count(f"@{PRODUCT}(") == 1 and "stablehlo.while" in text


@native
def test_rows_of_codes_are_filled_up_to_a_lane() -> None:
    """300 inputs are no multiple of 32: 320 of 3 bits are 80 bytes of the first plane and 40 of the second."""
    text = lowered(matmul, rows(2, 300), leaf(16, 300, bits=3))
    assert "tensor<2x320xbf16>, tensor<1x16x80xui8>, tensor<1x16x40xui8>" in text
    assert "stablehlo.pad" not in lowered(matmul, rows(2, 320), leaf(16, 320, bits=3))


@native
def test_shards_of_a_weight_stay_where_they_are() -> None:
    """Rows of W over two devices: in shard_map nothing but x goes from one to the other."""
    devices = jax.sharding.AbstractMesh((2,), ("rows",))
    spec = jax.sharding.PartitionSpec
    w, x = leaf(64, 512), rows(3, 512)
    sharded = jax.shard_map(
        matmul, mesh=devices, in_specs=(spec(), spec("rows")), out_specs=spec(None, "rows"), check_vma=False
    )
    shapes = [
        jax.tree.map(
            lambda a, s=s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(devices, s)), tree
        )
        for tree, s in ((x, spec()), (w, spec("rows")))
    ]
    text = lowered(sharded, *shapes)
    assert "all_gather" not in text and text.count(f"@{PRODUCT}(") == 1
    assert "tensor<32x256xui8>" in text


@native
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(x=jnp.float32), "x is float32, its tensor cores take bfloat16 and float16"),
        (dict(bits=5), "codes have 5 bits, it takes 2, 3, 4 and 8"),
        (dict(lut=jnp.float32), "the table is float32, it needs one that bfloat16 holds"),
        (dict(lut=jnp.float16), "the table is float16, it needs one that bfloat16 holds"),
        (dict(g=48), "groups have 48 inputs, it takes powers of two from 16 on, or the whole row"),
        (dict(uniform=False), "the table of 256 entries is not a ramp"),
        (dict(platform="cpu"), "it runs on cuda, not on cpu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_it_declines_it_says(fields: dict[str, Any], words: str) -> None:
    bits = 8 if "uniform" in fields else fields.get("bits", 4)
    w = leaf(8, 256, bits=bits, g=fields.get("g", 64), lut=fields.get("lut", jnp.bfloat16))
    w = dataclasses.replace(w, uniform=fields.get("uniform", w.uniform))
    x = jax.ShapeDtypeStruct((1, 256), fields.get("x", jnp.bfloat16))
    assert explain(x, w, fields.get("platform", "cuda")).splitlines()[0] == f"cuda: {words}"


@native
@pytest.mark.parametrize("method", [methods.Any4(), methods.NF4(), methods.Int(4), methods.Int(8), methods.MX4()])
def test_methods_run_on_it(method: Any) -> None:
    w = jax.eval_shape(lambda w: a4.quantize(w, method), jax.ShapeDtypeStruct((32, 256), jnp.float32))
    assert explain(jax.ShapeDtypeStruct((1, 256), jnp.bfloat16), w, "cuda").splitlines()[0].startswith("cuda: taken")


def test_operands_are_refused_before_anything_is_built() -> None:
    w = leaf(6, 64, bits=5)
    with pytest.raises(ValueError, match="codes have 5 bits, it takes 2, 3, 4 and 8; use another backend"):
        product(rows(1, 64), w)


def test_without_the_library_products_take_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_register", lambda kind: f"no {kind} library is built")
    # Nor Pallas's kernels, which would be next.
    monkeypatch.setattr("pallas_kernels.device.gpu_name", lambda: None)
    w, x = leaf(24, 256), rows(3, 256)
    assert "cuda: no cuda library is built" in explain(x, w, "cuda")
    assert PRODUCT not in lowered(matmul, x, w)


def test_every_handler_has_its_row() -> None:
    defined = {
        line.split("(")[1].split(",")[0]
        for path in build.source_files("cuda")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("XLA_FFI_DEFINE_HANDLER_SYMBOL(")
    }
    assert defined == set(registration.TARGETS["cuda"]) > {PRODUCT, DEQUANTIZE}
    assert lut_product_cuda.PLANES[3] == (2, 1)
