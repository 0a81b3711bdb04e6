"""The CUDA product without XLA: on device pointers."""

import ctypes

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cuda_ffi import lut_product_plain, registration
from cuda_ffi.lut_product import Matrix
from cuda_ffi.lut_product_cuda import lut_products

ON_GPU = registration.why_not("cuda") is None and jax.default_backend() == "gpu"


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU and the CUDA library")
@pytest.mark.parametrize("with_offsets", [True, False])
@pytest.mark.parametrize("tables", [96, 1])
@pytest.mark.parametrize("m", [1, 17])
def test_it_gives_the_bits_that_xla_gets(m: int, tables: int, with_offsets: bool) -> None:
    n, k, group_size = 96, 512, 128
    keys = jax.random.split(jax.random.key(0), 5)
    codes = jax.random.bits(keys[0], (n, k // 2), jnp.uint8)
    lut = jax.random.normal(keys[1], (tables, 16), jnp.bfloat16)
    scales, offsets = (jax.random.normal(key, (n, k // group_size), jnp.bfloat16) for key in keys[2:4])
    x = jax.random.normal(keys[4], (m, k), jnp.bfloat16)
    matrix = Matrix((codes,), lut, scales, offsets if with_offsets else None)
    (expected,) = lut_products(x, [matrix], bits=4, group_size=group_size)

    y = jnp.full((m, n), jnp.nan, jnp.bfloat16)
    jax.block_until_ready((x, codes, lut, scales, offsets, y))
    x, codes, lut, scales, offsets, y_at = (a.unsafe_buffer_pointer() for a in (x, codes, lut, scales, offsets, y))
    weight = (codes, lut, scales, offsets if with_offsets else 0)
    lut_product_plain.launcher()(x, m, *weight, y_at, n, k, group_size, int(tables == 1), 0)
    assert ctypes.CDLL("libcuda.so.1").cuCtxSynchronize() == 0
    np.testing.assert_array_equal(np.asarray(y), np.asarray(expected))


def test_what_was_not_built_is_said() -> None:
    reason = registration.why_not("cuda")
    if reason is None:
        pytest.skip("the CUDA library is here")
    with pytest.raises(RuntimeError, match="python -m cuda_ffi.build cuda"):
        lut_product_plain.launcher()
