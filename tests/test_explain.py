"""Which backend a product takes: explained as it runs, refused by name with a reason, told where operands are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_weights import INTEGERS, K, N, leaf, low_rank, reference, rows

from any4_jax import choice, weights
from any4_jax.choice import Choice
from any4_jax.product import BACKENDS, explain, matmul, plan
from any4_jax.weights import ScaleInput, Sum
from cuda_ffi import registration

SIXES = weights.from_codes(
    jnp.zeros((N, K), jnp.uint8), jnp.arange(256.0)[None], jnp.ones((N, 4)), None, bits=8, group_size=6, uniform=True
)
INTEGERS_IN_SIXES = dataclasses.replace(INTEGERS, inner=SIXES)


def test_a_backend_that_cannot_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    picky = dataclasses.replace(
        BACKENDS.options[-1], name="picky", supports=lambda x, w, platform: f"no {w.bits}-bit codes"
    )
    monkeypatch.setattr(plan, "BACKENDS", Choice((picky, *BACKENDS.options)))
    with pytest.raises(ValueError, match="backend 'picky' can't do this: no 4-bit codes"):
        matmul(rows(1), leaf(4), backend="picky")
    lines = explain(rows(1), leaf(4), platform="cuda").splitlines()
    assert lines[0] == "picky: no 4-bit codes" and "xla: taken" in lines
    np.testing.assert_allclose(matmul(rows(2), leaf(4)), reference(rows(2), leaf(4)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", [None, "cpu", "cuda", "tpu"])
def test_explain(platform: str | None) -> None:
    w = Sum((leaf(4), leaf(1)))
    text = explain(jax.ShapeDtypeStruct((1, K), jnp.bfloat16), w, platform)
    assert sum(": taken" in line for line in text.splitlines()) == 2
    named = [line for line in text.splitlines() if line.startswith("product")]
    assert named == ["product 1 of 2, by codes of 4 bits:", "product 2 of 2, by codes of 1 bit:"]
    assert (platform != "tpu") or text.splitlines().count("xla: taken") == 2
    assert explain(rows(1), jnp.ones((N, K))) == "no quantized leaf: a dense product in XLA"


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_integer_products_are_explained_as_they_run(platform: str) -> None:
    lines = explain(rows(1), INTEGERS, platform).splitlines()
    by_kernel = platform == "cpu" and registration.why_not("cpu") is None
    verdict = "could, but 'cpu' comes first" if by_kernel else "taken"
    assert lines[-1] == f"xla: {verdict} (x is rounded to integers, which multiply the codes as int8)"
    assert [line for line in lines[:-1] if "taken" in line or "could" in line] == by_kernel * [
        "cpu: taken (x is rounded to bytes, which multiply the weight's bytes)"
    ]
    if platform == "cuda":
        reason = next(line for line in lines if line.startswith("cuda: "))
        assert reason.endswith("x has a scale for each row or for all of it, it takes one for each group of inputs")


@pytest.mark.parametrize(
    "w, backend, reason",
    [
        (INTEGERS, "cuda", "it runs on cuda, not on cpu"),
        (INTEGERS_IN_SIXES, "cpu", "groups have 6 weights, it takes multiples of 8"),
        (rows(N), "cuda", "it runs on cuda, not on cpu"),
        (rows(N), "cpu", "the weight is a plain array"),
        (low_rank(), "cpu", "the weight is a LowRank"),
        (Sum((rows(N), low_rank())), "cpu", "the weight is a Sum"),
        (Sum((leaf(4), low_rank())), "cuda", "it runs on cuda, not on cpu"),
        (low_rank(), "magic", "need one of 'cuda', 'pallas', 'cpu', 'xla'"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_backend_by_name_never_gives_way_in_silence(w, backend: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        matmul(rows(1), w, backend)
    assert matmul(rows(1), w, "xla").shape == (1, N)


@pytest.mark.parametrize("platform", ["gpu", "CPU", ""])
def test_explain_refuses_what_is_no_platform(platform: str) -> None:
    with pytest.raises(ValueError, match=f"got platform='{platform}', need one of 'cpu', 'cuda', 'rocm', 'tpu'; pass"):
        explain(rows(1), leaf(4), platform)


def test_operands_on_another_device_than_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU, operands that were put on the CPU: what is explained, and may be named, is what runs."""
    only_cpu = dataclasses.replace(
        BACKENDS.options[-1], name="here", supports=lambda x, w, platform: None if platform == "cpu" else "not here"
    )
    monkeypatch.setattr(plan, "BACKENDS", Choice((only_cpu, *BACKENDS.options)))
    monkeypatch.setattr(choice, "default_platform", lambda: "tpu")
    x, w = rows(2), leaf(4)
    on_cpu = jax.device_put(w, jax.devices("cpu")[0])
    assert explain(x, w).splitlines()[0] == "here: not here"
    with pytest.raises(ValueError, match="'here' can't do this: not here"):
        matmul(x, w, "here")
    for operand in (on_cpu, ScaleInput(on_cpu, jnp.ones(K))):
        assert explain(x, operand).splitlines()[0] == "here: taken"
        assert explain(x, operand, "tpu").splitlines()[0] == "here: not here"
        np.testing.assert_allclose(matmul(x, operand, "here"), reference(x, w), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="backend 'cpu' can't do this: .* the weight is a LowRank"):
        matmul(jax.device_put(x, jax.devices("cpu")[0]), low_rank(), "cpu")
    # A traced program may run on the default device.
    with pytest.raises(ValueError, match="'here' can't do this: not here"):
        jax.jit(lambda x: matmul(x, on_cpu, "here"))(x)


def test_a_numpy_weight_is_to_be_converted() -> None:
    for call in (lambda w: matmul(rows(1), w), weights.dequantize, lambda w: weights.take_rows(w, jnp.arange(2))):
        with pytest.raises(TypeError, match=r"got a numpy array, need an array of jax .*; pass jnp.asarray\(w\)"):
            call(np.ones((N, K), np.float32))


def test_a_backend_is_what_choice_calls_one() -> None:
    assert all(isinstance(backend, choice.Backend) for backend in BACKENDS.options)


def test_explain_sees_the_input_that_a_kernel_would_get() -> None:
    """Each product of the parts, with the dtype and rows of x there, and no kernel run on the way."""
    found = plan.problems(matmul, rows(2, 3, dtype=jnp.bfloat16), Sum((ScaleInput(leaf(4), jnp.ones(K)), leaf(1))))
    assert [(x.shape, x.dtype, w.bits) for x, w in found] == [((6, K), jnp.bfloat16, 4), ((6, K), jnp.bfloat16, 1)]
