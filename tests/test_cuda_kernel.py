"""The CUDA product: on a GPU the kernel contract over formats and shapes, elsewhere lowering, layouts and words."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import Terms

import any4_jax as a4
from any4_jax import methods, weights
from any4_jax.matmul import explain, matmul, prepare, unprepare
from any4_jax.partition import combine, partition
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

ULP = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
HALVES = list(ULP)


def leaf(
    n: int,
    k: int,
    *,
    bits: int = 4,
    g: int = 128,
    lut: Any = jnp.bfloat16,
    scale: Any = jnp.bfloat16,
    row_tables: bool = True,
    offsets: bool = True,
    seed: int = 0,
) -> QuantizedTensor:
    """Random codes, tables and scales; 8 bits get a ramp."""
    rng = np.random.default_rng(seed)
    shape = (n, -(-k // g))
    rows = n if row_tables else 1
    table = rng.normal(size=(rows, 2**bits))
    if bits == 8:
        table = np.broadcast_to(np.arange(256.0) - 128, (rows, 256)) * 2.0 ** -rng.integers(0, 3, (rows, 1))
    e8m0 = scale == jnp.uint8
    return weights.from_codes(
        jnp.asarray(rng.integers(0, 2**bits, (n, k), dtype=np.uint8)),
        jnp.asarray(table, lut),
        jnp.asarray(rng.integers(120, 130, shape) if e8m0 else rng.uniform(0.5, 2, shape), scale),
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16 if e8m0 else scale) if offsets else None,
        bits=bits,
        group_size=g,
        uniform=bits == 8,
    )


def exact(w: QuantizedTensor) -> tuple[np.ndarray, np.ndarray]:
    """W in float64, and the sum of its terms' magnitudes, by which roundings are judged."""
    terms = Terms.of(w)
    # A ramp's middle goes into the offset: its terms are the step's multiples.
    ramp = w.bits == 8
    size = np.abs(terms.table).max(1, keepdims=True) * terms.scales if ramp else np.abs(terms.scaled)
    return terms.scaled + terms.shift, size + np.abs(terms.shift)


def matrix(w: QuantizedTensor) -> Matrix:
    return Matrix(w.codes if isinstance(w.codes, tuple) else (w.codes,), w.lut, w.scales, w.offsets)


def product(x: jax.Array, w: QuantizedTensor) -> jax.Array:
    (y,) = lut_products(x, [matrix(w)], bits=w.bits, group_size=w.group_size)
    return y


def rows(*shape: int, dtype: Any = jnp.bfloat16, seed: int = 7) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def in_registers(x: jax.Array, w: QuantizedTensor) -> bool:
    """Whether a kernel computes the product, and not XLA with the decoded matrix."""
    if on_hopper() and is_wide(matrix(w), x.dtype, w.bits, w.group_size):
        return True
    if is_fast(matrix(w), x.dtype, w.shape[1], w.bits, w.group_size):
        return x.shape[0] <= MOST_ROWS
    return x.shape[0] * max(1, 128 // w.group_size) <= MOST_COLUMNS


def is_rounded(x: jax.Array, w: QuantizedTensor) -> bool:
    """Whether W is rounded to x's dtype: decoded to memory, or by Hopper's kernel for many rows."""
    fast = is_fast(matrix(w), x.dtype, w.shape[1], w.bits, w.group_size)
    wide = on_hopper() and is_wide(matrix(w), x.dtype, w.bits, w.group_size)
    return not in_registers(x, w) or (wide and x.shape[0] > (32 if fast else 8))


def check(y: jax.Array, x: jax.Array, w: QuantizedTensor) -> None:
    """Every element within the rounding of its dtype and of float32 sums, relative to the terms of the sum."""
    assert y.dtype == x.dtype and y.shape == (x.shape[0], w.shape[0])
    dense, magnitude = exact(w)
    slack = 0.0
    if is_rounded(x, w):
        slack = 4 * ULP[str(x.dtype)] / 2 * np.sqrt(np.asarray(x, np.float64) ** 2 @ dense.T**2)
    wide = np.asarray(x, np.float64)
    expected = wide @ dense.T
    # Tensor cores cut the bits that an addition shifts out instead of rounding them: twice the CPU's allowance.
    slack = slack + 32 * 2.0**-24 * (np.abs(wide) @ magnitude.T)
    np.testing.assert_array_less(
        np.abs(np.asarray(y, np.float64) - expected), slack + ULP[str(y.dtype)] * np.abs(expected) + 1e-30
    )


@gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 200])
def test_every_width_and_number_of_rows(m: int, bits: int, dtype: str) -> None:
    x = rows(m, 352, dtype=dtype)
    for w in (leaf(37, 352, bits=bits), leaf(37, 352, bits=bits, g=32, offsets=False)):
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
@pytest.mark.parametrize("g", [16, 32, 64, 128, 256, 512, 1000, 2000])
def test_every_group_size(g: int) -> None:
    """Several groups a tile and several tiles a group, and a short last one."""
    for k in (1000, 1184, 1536):
        if g < k and g & (g - 1):
            continue
        w = leaf(24, k, g=g)
        for m in (1, 3, 40):
            x = rows(m, k)
            check(product(x, w), x, w)


@gpu
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    "fields",
    [
        dict(row_tables=False),
        dict(offsets=False),
        dict(scale=jnp.uint8, offsets=False),
        dict(scale=jnp.uint8),
        dict(scale=jnp.float32),
        dict(scale=jnp.float16),
        dict(scale=jnp.float16, lut=jnp.float16),
    ],
    ids=lambda fields: " ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in fields.items()),
)
def test_every_kind_of_table_and_scale(bits: int, fields: dict[str, Any]) -> None:
    w = leaf(21, 224, bits=bits, g=32, **fields)
    for dtype in HALVES:
        if fields.get("lut") == jnp.float16 and dtype == "bfloat16":
            continue
        for m in (1, 100):
            x = rows(m, 224, dtype=dtype)
            check(product(x, w), x, w)


@gpu
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 31), (2, 17, 33), (65, 3, 70), (1, 9, 4100), (9, 4099, 96)])
def test_odd_shapes(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    for bits in (2, 3, 4, 8):
        w, x = leaf(n, k, g=64, bits=bits), rows(m, k)
        check(product(x, w), x, w)


@gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", HALVES)
def test_identity_gives_the_weights_within_one_ulp(bits: int, dtype: str) -> None:
    w = leaf(40, 256, bits=bits)
    dense, magnitude = exact(w)
    eye = jnp.eye(256, dtype=dtype)
    for first, last in ((0, 256), (0, 1), (3, 9), (100, 120), (192, 256)):
        error = np.abs(np.asarray(product(eye[first:last], w), np.float64).T - dense[:, first:last])
        unit = ULP[dtype] * np.abs(dense) + 2.0**-22 * magnitude
        assert (error <= unit[:, first:last]).all()


@gpu
def test_results_are_the_same_every_time() -> None:
    w = leaf(4096, 4096)
    for m in (1, 8, 30):
        x = rows(m, 4096)
        first = np.asarray(product(x, w))
        for _ in range(5):
            np.testing.assert_array_equal(product(x, w), first)


@gpu
def test_values_that_are_not_finite_stay_in_their_rows() -> None:
    for w in (leaf(32, 512), leaf(21, 96, g=32)):
        k = w.shape[1]
        scales = w.scales.at[1, 2].set(jnp.inf).at[2, 0].set(jnp.nan)
        for m in (1, 5):
            y = np.asarray(product(rows(m, k), dataclasses.replace(w, scales=scales)), np.float32)
            assert np.isfinite(np.delete(y, [1, 2], axis=1)).all() and not np.isfinite(y[:, [1, 2]]).any()
            bad = np.asarray(product(rows(m, k).at[0, 5].set(jnp.nan), w), np.float32)
            assert np.isnan(bad[0]).all() and np.isfinite(bad[1:]).all()


@gpu
def test_more_weights_than_31_bits_count() -> None:
    """2^31 + 2^17 weights, whose rows lie beyond 2^30 bytes: 16 rows of random codes, the others zero."""
    n, k = 32768 + 32, 65536
    small = leaf(32, k)
    far = jnp.zeros((n, k // 2), jnp.uint8).at[-32:].set(small.codes)
    fill = lambda a: jnp.zeros((n, *a.shape[1:]), a.dtype).at[-32:].set(a)  # noqa: E731
    w = dataclasses.replace(
        small, codes=far, lut=fill(small.lut), scales=fill(small.scales), offsets=fill(small.offsets)
    )
    for m in (1, 3):
        x = rows(m, k)
        y = product(x, w)
        check(y[:, -32:], x, small)
        assert not np.asarray(y[:, :-32]).any()


@gpu
def test_the_whole_result_is_written() -> None:
    """The memory that results get was full of NaN a moment ago."""
    for w in (leaf(4064, 512), leaf(4001, 480, g=32)):
        for m in (1, 7, 20, 64):
            x = rows(m, w.shape[1])
            run = jax.jit(lambda x, w: product(x, w))
            run(x, w).block_until_ready()
            jnp.full((64, m, w.shape[0]), jnp.nan, jnp.bfloat16).block_until_ready()
            check(run(x, w), x, w)


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


@gpu
def test_gradients_equal_those_of_xla() -> None:
    w, x = leaf(32, 256), rows(3, 256)
    tables, codes = partition(w)

    def loss(x, t, backend):
        return jnp.sin(matmul(x, combine(t, codes), backend).astype(jnp.float32) / 64).sum()

    ours, theirs = (jax.grad(loss, (0, 1))(x, tables, backend) for backend in ("cuda", "xla"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= 0.02 * np.linalg.norm(b)


def lowered(function: Any, *arguments: Any, on: str = "NVIDIA A100-SXM4-80GB") -> str:
    """StableHLO for an NVIDIA GPU, which this machine needn't have."""
    device = jax.sharding.AbstractDevice(device_kind=on, num_cores=None, platform="gpu")
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (PRODUCT, DEQUANTIZE)]
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
        (dict(uniform=False), "the table of 256 entries is no ramp"),
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
    assert explain(jax.ShapeDtypeStruct((1, 256), jnp.bfloat16), w, "cuda").splitlines()[0] == "cuda: taken"


@native
def test_prepare_changes_nothing() -> None:
    w = leaf(6, 50, bits=3, g=16)
    back = unprepare(prepare(w, "cuda"))
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(w), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_operands_are_refused_before_anything_is_built() -> None:
    w = leaf(6, 64, bits=5)
    with pytest.raises(ValueError, match="codes have 5 bits, it takes 2, 3, 4 and 8; use another backend"):
        product(rows(1, 64), w)


def test_without_the_library_products_take_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_register", lambda kind: f"no {kind} library is built")
    w, x = leaf(24, 256), rows(3, 256)
    assert "cuda: no cuda library is built" in explain(x, w, "cuda")
    assert PRODUCT not in lowered(matmul, x, w)


def test_every_handler_has_its_row() -> None:
    defined = {
        line.split("(")[1].split(",")[0]
        for path in (build.SOURCES / "cuda").glob("*.cu")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("XLA_FFI_DEFINE_HANDLER_SYMBOL(")
    }
    assert defined == set(registration.TARGETS["cuda"]) > {PRODUCT, DEQUANTIZE}
    assert lut_product_cuda.PLANES[3] == (2, 1)
