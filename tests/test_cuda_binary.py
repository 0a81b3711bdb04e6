"""The CUDA product with sums of binary planes: on a GPU its numbers, elsewhere lowering, layout and words."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from binary_weights import check, planes, rows

from any4_jax.product import explain, matmul
from any4_jax.product.backends.cuda import CUDA
from any4_jax.weights import take
from cuda_ffi import registration
from cuda_ffi.binary_product_cuda import TARGET, binary_product
from cuda_ffi.lut_product import Matrix

why_not = registration.why_not("cuda")
gpu = pytest.mark.skipif(jax.default_backend() != "gpu" or why_not is not None, reason="needs an NVIDIA GPU")


@gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "w",
    [
        # Rows that no block fills, fewer tiles than warps and more; a table for each row; a group that is the row.
        planes(70, 384, g=128, offsets=True),
        planes(5, 256, g=256, table=None),
        planes(33, 2304, g=256, count=4),
        planes(16, 128, g=1000, count=1, table=((0.5, 2.0),)),
    ],
    ids=["offsets", "rows", "tiles", "one"],
)
def test_products_are_within_rounding(w, dtype: str) -> None:
    matrices = [Matrix((p.codes,), p.lut, p.scales, p.offsets) for p in w.terms]
    group_size = w.terms[0].group_size
    for m in (1, 3, 8, 11):
        x = rows(m, w.shape[1], dtype=dtype)
        check(jax.jit(lambda x: binary_product(x, matrices, group_size=group_size))(x), x, w)
    x = rows(2, w.shape[1], dtype=dtype)
    stack = jax.tree.map(lambda a: jnp.stack([jnp.zeros_like(a), a]), w)
    check(matmul(x, take(stack, 1), "cuda"), x, w)
    np.testing.assert_array_equal(jax.vmap(matmul, (None, 0))(x, stack)[1], matmul(x, w, "cuda"))


def calls(function, *arguments) -> int:
    """The kernel's calls in a program for CUDA."""
    checks = [jax.export.DisabledSafetyCheck.custom_call(TARGET)]
    exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*arguments)
    return exported.mlir_module().count(f"@{TARGET}(")


def test_it_is_lowered_for_few_rows_and_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_register", lambda kind: object())
    w = planes(24, 256, g=128)
    x = {m: rows(m, 256, dtype=jnp.bfloat16) for m in (2, 33)}
    assert explain(x[2], w, "cuda").startswith("cuda: taken (signs multiply x on tensor cores")
    assert calls(matmul, x[2], w) == 1 and calls(matmul, x[33], w) == 0
    # Over x vmap adds rows.
    assert calls(jax.vmap(matmul, (0, None)), jnp.stack([rows(6, 256, dtype=jnp.bfloat16)] * 2), w) == 1
    for given, weight, reason in (
        (x[33], w, "x has 33 rows, it takes at most 32 for binary planes"),
        (rows(2, 256), w, "x is float32, its tensor cores take bfloat16 and float16"),
        (
            x[2],
            planes(24, 256, g=32),
            "rows have 256 inputs and groups 32, binary planes need multiples of 128, and groups that are powers of "
            "two or rows",
        ),
        (x[2], planes(4, 256, g=128, count=5), "the sum has 5 binary planes, it takes at most 4"),
    ):
        assert CUDA.supports(given, weight, "cuda") == reason
