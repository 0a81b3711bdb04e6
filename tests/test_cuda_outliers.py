"""The CUDA products of a coded matrix whose scales are coded too, and of few entries: on a GPU their numbers, elsewhere
lowering and words."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax import weights
from any4_jax.methods.coded_scales import Coding
from any4_jax.product import explain, matmul
from any4_jax.product.backends.cuda import CUDA
from any4_jax.weights import QuantizedTensor, Sparse, Sum, dequantize, take
from cuda_ffi import coded_product_cuda, lut_product_cuda, registration, sparse_product_cuda
from cuda_ffi.lut_product_cuda import DEQUANTIZE, PRODUCT

why_not = registration.why_not("cuda")
gpu = pytest.mark.skipif(jax.default_backend() != "gpu" or why_not is not None, reason="needs an NVIDIA GPU")
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 0.0}


def coded(
    n: int, k: int, *, table: str = "ramp", offsets: bool = True, run: int = 16, bits: int = 3
) -> QuantizedTensor:
    """A weight of 3 bits in groups of 16 with random scales, coded in runs of rows."""
    rng = np.random.default_rng(n + k)
    coding = Coding(bits, run, "bfloat16")
    scales, shifts = (
        coding.operator(coding.code(jnp.asarray(rng.uniform(lowest, 1, (n, k // 16)))), jnp.ones((1, 1)))
        for lowest in (0.5, -1.0)
    )
    tables: dict[str, Any] = {
        "ramp": jnp.arange(-4.0, 4.0, dtype=jnp.bfloat16)[None],
        "bytes": jnp.asarray(np.sort(rng.integers(-127, 128, (1, 8))), jnp.int8),
        "rows": jnp.asarray(np.sort(rng.normal(size=(n, 8))), jnp.bfloat16),
    }
    codes = jnp.asarray(rng.integers(0, 8, (n, k)), jnp.uint8)
    form: dict[str, Any] = dict(bits=3, group_size=16, uniform=table == "ramp")
    return weights.from_codes(codes, tables[table], scales, shifts if offsets else None, **form)


def few(n: int, k: int, dtype: str = "bfloat16") -> Sparse:
    """Every twentieth entry, with an empty row and a full one."""
    rng = np.random.default_rng(k)
    dense = np.where(rng.uniform(size=(n, k)) < 0.05, rng.normal(size=(n, k)), 0)
    dense[n // 2], dense[n - 1] = 0, 1
    return weights.nonzeros(jnp.asarray(dense, jnp.float32), jnp.dtype(dtype))


def rows(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(7).normal(size=shape), dtype)


def check(y: jax.Array, x: jax.Array, w: Any) -> None:
    """Within the rounding of the dtype and of float32 sums, relative to the terms of the sum in float64."""
    terms = [np.asarray(dequantize(term), np.float64) for term in (w.terms if isinstance(w, Sum) else (w,))]
    x64 = np.asarray(x, np.float64)
    right = x64 @ sum(terms).T
    # An entry is far smaller than what its scale and its offset add up from.
    slack = 64 * 2.0**-24 * (np.abs(x64) @ sum(map(np.abs, terms)).T) + 2.0**-20
    assert y.dtype == x.dtype
    np.testing.assert_array_less(np.abs(np.asarray(y, np.float64) - right), slack + UNIT[str(y.dtype)] * np.abs(right))


@gpu
@pytest.mark.parametrize(
    "w",
    [
        # Blocks of fewer rows and of more; fewer turns than warps and more; each kind of table; no offsets; no entries.
        Sum((coded(96, 256), few(96, 256))),
        Sum((coded(8448, 384), few(8448, 384))),
        Sum((coded(8512, 256, table="rows"), few(8512, 256, "float32"))),
        Sum((coded(64, 2304, table="bytes", offsets=False), few(64, 2304))),
        coded(32, 128),
        coded(128, 4096, table="rows", offsets=False),
    ],
    ids=["small", "large", "rows", "bytes", "one", "alone"],
)
def test_products_with_coded_scales_are_within_rounding(w) -> None:
    x = rows(2, w.shape[1])
    for m in (1, 2):
        assert "scales are decoded with the codes" in explain(x[:m], w, "cuda")
        check(matmul(x[:m], w, "cuda"), x[:m], w)
    stack = jax.tree.map(lambda a: jnp.stack([jnp.zeros_like(a), a]), w)
    alone = matmul(x[:1], w, "cuda")
    np.testing.assert_array_equal(jax.jit(matmul, static_argnums=2)(x[:1], take(stack, 1), "cuda"), alone)
    np.testing.assert_array_equal(jax.vmap(matmul, (None, 0))(x[:1], stack)[1], alone)
    assert not np.any(matmul(jnp.zeros_like(x), w))


@gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("values", ["bfloat16", "float32"])
def test_products_with_few_entries_are_within_rounding(values: str, dtype: str) -> None:
    for n, k in ((33, 64), (256, 1000), (8, 70000)):
        w = few(n, k, values)
        for m in (1, 3, 8, 11):
            x = rows(m, k, dtype=dtype)
            check(jax.jit(lambda x, w: matmul(x, w, "cuda"))(x, w), x, w)
    w = weights.Sparse(jnp.asarray([1, 70000]), jnp.asarray([[60000, 3]], jnp.uint16), jnp.ones((1, 2)), 8)
    np.testing.assert_array_equal(matmul(jnp.ones((1, 8)), w, "cuda"), [[0, 1]])


def calls(function, *arguments) -> dict[str, int]:
    """How often each kernel is called in a program for CUDA."""
    targets = (coded_product_cuda.TARGET, sparse_product_cuda.TARGET, PRODUCT, DEQUANTIZE)
    checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in targets]
    exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*arguments)
    counts = {target: exported.mlir_module().count(f"@{target}(") for target in targets}
    return {target: count for target, count in counts.items() if count}


def test_they_are_lowered_for_few_rows_and_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_register", lambda kind: object())
    for name in ("is_fast", "is_wide"):
        monkeypatch.setattr(lut_product_cuda, name, lambda *form: False)
    one, entries = coded(32, 128), few(32, 128)
    both, x = Sum((one, entries)), {m: rows(m, 128) for m in (1, 5, 65)}
    assert calls(matmul, x[1], both) == calls(matmul, x[1], one) == {coded_product_cuda.TARGET: 1}
    assert calls(matmul, x[5], both) == {DEQUANTIZE: 1, sparse_product_cuda.TARGET: 1}
    assert calls(matmul, x[65], both) == {DEQUANTIZE: 1}
    assert explain(x[1], both, "cuda").startswith("cuda: taken (scales are decoded with the codes, beside the entries)")
    text = explain(x[65], both, "cuda")
    assert text.count("cuda: taken") == 1 and "cuda: x has 65 rows, it takes at most 64 for few entries" in text
    for given, w, reason in (
        (x[5], both, "x has 5 rows, with coded scales it takes at most 4"),
        (rows(1, 128, dtype=jnp.float16), both, "x is float16, with coded scales it takes bfloat16"),
        (rows(1, 64), Sum((coded(32, 64), few(32, 64))), "the weight is 32 x 64, with coded scales it takes multiples"),
        (x[1], Sum((coded(32, 128, bits=2), entries)), "scales are not coded in 3 bits, in runs of 16 rows"),
        (x[1], Sum((coded(32, 128, run=8), entries)), "scales are not coded in 3 bits, in runs of 16 rows"),
    ):
        assert str(CUDA.supports(given, w, "cuda")).startswith(reason)
