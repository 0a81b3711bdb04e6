"""The CUDA step of a dense cache: on a GPU against float64, elsewhere lowering, words, vmap and derivatives."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_contract import Case, cache, draw, factors_of, loop, table, token, wanted

from cuda_ffi import attention, registration

why_not = registration.why_not("cuda")
gpu = pytest.mark.skipif(jax.default_backend() != "gpu" or why_not is not None, reason="needs an NVIDIA GPU")


@gpu
@pytest.mark.parametrize("case", table(), ids=str)
def test_a_step(case: Case) -> None:
    inputs, settings = draw(case), case.settings
    scale = case.size**-0.5 if settings.scale is None else settings.scale
    got = attention.attend(
        *map(jnp.asarray, inputs),
        factors_of(case, inputs),
        scale=scale,
        softcap=settings.softcap,
        window=settings.window,
    )
    mixed, *held = wanted(case, inputs)
    # Half a unit in the last place, and the rounding of float32 sums.
    np.testing.assert_allclose(
        np.asarray(got[0], np.float64), mixed, rtol=0.5001 * float(jnp.finfo(case.dtype).eps), atol=1e-5
    )
    for ours, theirs in zip(got[1:3], held, strict=True):
        np.testing.assert_array_equal(np.asarray(ours).view(np.uint16), theirs.view(np.uint16))
    assert int(got[3]) == case.length + 1


@gpu
def test_a_row_that_sees_nothing_is_finite() -> None:
    inputs = draw(Case())._replace(positions=np.asarray([-201], np.int32))
    mixed, *_ = attention.attend(*map(jnp.asarray, inputs), None, scale=1.0, softcap=None, window=None)
    assert not np.asarray(mixed).any()


@gpu
def test_a_loop_equals_xla_and_copies_no_cache() -> None:
    ours, theirs = (loop(backend)(*token(), cache()) for backend in (None, "xla"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0.02, atol=0.02)
    text = loop(None).lower(*token(), cache()).compile().as_text()
    assert attention.TARGET in text
    assert re.findall(r"= bf16\[4,(?:64,64)\]\S* copy\(", text) == []
