"""The weight contract: the product equals x @ dequantize(w).T for every operator, under every transformation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax import choice, weights
from any4_jax.choice import Choice
from any4_jax.partition import combine, partition
from any4_jax.product import BACKENDS, explain, matmul, plan
from any4_jax.product.quantized_input import quantize_input
from any4_jax.weights import LowRank, PermuteInput, QuantizeInput, ScaleInput, Sparse, Sum, take

dequantize = jax.jit(weights.dequantize, static_argnums=1)

N, K, G, M = 6, 20, 8, 4


def leaf(bits: int, seed: int = 0, *, offsets: bool = True, ramp: bool = False, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)
    table = np.arange(2.0**bits)[None] - 2 ** (bits - 1) if ramp else np.sort(rng.normal(size=(N, 2**bits)), axis=1)
    groups = -(-K // G)
    return weights.from_codes(
        jnp.asarray(rng.integers(0, 2**bits, (N, K), dtype=np.uint8)),
        jnp.asarray(table, dtype),
        jnp.asarray(rng.uniform(0.5, 2, (N, groups)) / (2 ** (bits - 1) if ramp else 1), dtype),
        jnp.asarray(rng.normal(size=(N, groups)), dtype) if offsets else None,
        bits=bits,
        group_size=G,
        uniform=ramp,
    )


def nested(seed: int = 0):
    """Scales that are quantized themselves."""
    plain = leaf(4, seed, dtype=jnp.float32)
    table = jnp.linspace(0, 2, 256)[None]
    scales = weights.encode(plain.scales, table, jnp.ones((N, 1)), None, bits=8, group_size=K)
    return dataclasses.replace(plain, scales=scales)


def low_rank(seed: int = 0, rank: int = 3) -> LowRank:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rank, K)), rng.normal(size=(N, rank))
    return LowRank(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), jnp.float32(0.3))


def sparse(seed: int = 0) -> Sparse:
    """Six entries, two of them in one place, and one of padding."""
    rng = np.random.default_rng(seed)
    rows, columns = (jnp.asarray([*rng.integers(0, size, 4), 1, 1, 0], jnp.int32) for size in (N, K))
    values = jnp.asarray(rng.normal(size=7) * [1, 1, 1, 1, 1, 1, 0], jnp.float32)
    return Sparse(rows, columns, values, N, K)


def operator(name: str, seed: int = 0):
    rng = np.random.default_rng(seed + 100)
    dense = jnp.asarray(rng.normal(size=(N, K)), jnp.float32)
    scale = jnp.asarray(rng.uniform(0.5, 2, K), jnp.float32)
    return {
        "dense": lambda: dense,
        "1 bit": lambda: leaf(1, seed),
        "3 bits": lambda: leaf(3, seed),
        "4 bits": lambda: leaf(4, seed),
        "8 bits": lambda: leaf(8, seed, offsets=False, ramp=True),
        "nested": lambda: nested(seed),
        "Sum": lambda: Sum((leaf(4, seed), leaf(1, seed + 1), dense)),
        "ScaleInput": lambda: ScaleInput(leaf(4, seed), scale),
        "PermuteInput": lambda: PermuteInput(leaf(4, seed), jnp.asarray(rng.permutation(K), jnp.int32)),
        "LowRank": lambda: low_rank(seed),
        "Sum with LowRank": lambda: Sum((leaf(4, seed), low_rank(seed))),
        "Sparse": lambda: sparse(seed),
        "Sum with Sparse": lambda: Sum((leaf(4, seed), sparse(seed))),
    }[name]()


NAMES = ("dense", "1 bit", "3 bits", "4 bits", "8 bits", "nested", "Sum", "ScaleInput", "PermuteInput")
NAMES += ("LowRank", "Sum with LowRank", "Sparse", "Sum with Sparse")


def rows(*shape: int, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(7).normal(size=(*shape, K)), dtype)


def reference(x, w) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(dequantize(w), np.float64).T


@pytest.mark.parametrize("name", NAMES)
def test_product_equals_the_dense_one(name: str) -> None:
    w, x = operator(name), rows(2, 3)
    assert w.shape == (N, K)
    for y in (matmul(x, w), jax.jit(matmul)(x, w)):
        assert y.shape == (2, 3, N) and y.dtype == x.dtype
        np.testing.assert_allclose(y, reference(x, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["4 bits", "nested", "8 bits"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_identity_gives_the_matrix_rounded_once(name: str, dtype: str) -> None:
    w = operator(name)
    y = matmul(jnp.eye(K, dtype=dtype), w)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y.T, dequantize(w, jnp.dtype(dtype)))


def test_accumulates_in_float32() -> None:
    """In bf16 sums 256 + 1 would stay 256."""
    w = jnp.ones((1, 600), jnp.bfloat16)
    assert float(matmul(jnp.ones((1, 600), jnp.bfloat16), w)[0, 0]) == 600.0


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_x_and_scan_over_a_stack(name: str) -> None:
    x = rows(3, M)
    w = operator(name)
    folded = jax.jit(jax.vmap(matmul, (0, None)))(x, w)
    np.testing.assert_allclose(folded, jax.jit(matmul)(x, w), rtol=1e-5, atol=1e-5)
    layers = [operator(name, seed) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *layers)
    each = np.stack([reference(a, layer) for a, layer in zip(x, layers, strict=True)])
    _, scanned = jax.lax.scan(lambda _, both: (None, matmul(both[0], both[1])), None, (x, stack))
    np.testing.assert_allclose(scanned, each, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(matmul))(x, stack), each, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_those_through_dequantize(name: str) -> None:
    w, x = operator(name), rows(M)
    tables, codes = partition(w)

    def through(product):
        return lambda x, t: (jnp.sin(product(x, combine(t, codes)))).sum()

    got = jax.jit(jax.grad(through(matmul), (0, 1)))(x, tables)
    expected = jax.jit(jax.grad(through(lambda x, w: x @ dequantize(w).T), (0, 1)))(x, tables)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        tolerance = 2e-2 if ours.dtype == jnp.bfloat16 else 1e-4
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


def test_low_rank_factors_keep_their_dtype_and_need_no_dense_matrix() -> None:
    w, x = low_rank(), rows(M, dtype=jnp.bfloat16)
    y = matmul(x, w)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y, reference(x, w), atol=0.02 * np.abs(reference(x, w)).max())
    slope = jax.grad(lambda w: matmul(x, w).astype(jnp.float32).sum())(w)
    assert slope.a.dtype == slope.b.dtype == jnp.float32
    # d(sum y) / db[n] = scale * sum over rows of a x, which bfloat16 products round to some 1/256.
    expected = 0.3 * (np.asarray(x, np.float64) @ np.asarray(w.a, np.float64).T).sum(axis=0)
    np.testing.assert_allclose(slope.b, np.tile(expected, (N, 1)), atol=0.02 * np.abs(expected).max())
    assert f"{N}x{K}x" not in jax.jit(matmul).lower(x, w).as_text()


def test_gradients_of_float32_tables_equal_finite_differences() -> None:
    tables, codes = partition(leaf(4, dtype=jnp.float32))
    x = rows(M)
    loss = jax.jit(lambda t: (matmul(x, combine(t, codes)) ** 2).sum())
    slope = jax.jit(jax.grad(loss))(tables)
    for field in ("lut", "scales", "offsets"):
        direction = np.random.default_rng(3).normal(size=getattr(tables, field).shape).astype(np.float32)

        def moved(step, field=field, direction=direction):
            return float(loss(dataclasses.replace(tables, **{field: getattr(tables, field) + step * direction})))

        difference = (moved(0.01) - moved(-0.01)) / 0.02
        np.testing.assert_allclose((getattr(slope, field) * direction).sum(), difference, rtol=2e-3)


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_empty_batch_and_single_row(shape: tuple[int, ...]) -> None:
    x = rows(*shape)
    assert matmul(x, operator("4 bits")).shape == (*shape, N)
    assert matmul(x, INTEGERS).shape == (*shape, N)


@pytest.mark.parametrize("per", ["token", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits,offsets", [(8, True), (4, False)])
def test_integer_products_equal_those_of_the_rounded_input(per, symmetric: bool, bits: int, offsets: bool) -> None:
    inner = leaf(8, offsets=offsets, ramp=True)
    w = QuantizeInput(inner, None, bits, symmetric, per)
    x = rows(5) * jnp.asarray([1, 10, 0, 0.1, 3.0])[:, None] + 0.5
    rounded = jax.jit(quantize_input)(x, w)
    assert len(np.unique(np.asarray(rounded[0]))) <= 2**bits
    text = jax.jit(matmul).lower(x, w).as_text()
    assert "xi8>" in text
    np.testing.assert_allclose(jax.jit(matmul)(x, w), reference(rounded, inner), rtol=1e-4, atol=1e-4)
    stack = jax.tree.map(lambda a: jnp.stack([a[::-1], a]), w)
    one = jax.jit(lambda x, stack: matmul(x, take(stack, 1)))
    assert "xi8>" in one.lower(x, stack).as_text()
    np.testing.assert_allclose(one(x, stack), matmul(x, w), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_input_rounding_stays_within_half_a_step(symmetric: bool) -> None:
    x = rows(6)
    w = QuantizeInput(leaf(4), None, 6, symmetric, "token")
    span = 2 * jnp.abs(x).max(axis=1) if symmetric else jnp.maximum(x.max(1), 0) - jnp.minimum(x.min(1), 0)
    step = span / (62 if symmetric else 63)
    # The zero point is rounded too, so that the end of an asymmetric range may be off by half a step more.
    slack = 0.5 if symmetric else 1.0
    assert (jnp.abs(quantize_input(x, w) - x) <= (slack + 1e-4) * step[:, None]).all()
    np.testing.assert_array_equal(quantize_input(jnp.zeros((2, K)), w), np.zeros((2, K)))


def test_input_levels() -> None:
    levels = jnp.array([-1.0, -0.25, 0.25, 1.0])
    w = QuantizeInput(leaf(4), levels, 2, True, "token")
    x = rows(3)
    rounded = quantize_input(x, w)
    on_grid = np.asarray(rounded) / np.abs(np.asarray(x)).max(axis=1, keepdims=True)
    assert set(np.round(np.unique(on_grid), 6)) <= {-1.0, -0.25, 0.25, 1.0}
    np.testing.assert_allclose(matmul(x, w), reference(rounded, w.inner), rtol=1e-5, atol=1e-5)


def test_the_last_backend_takes_everything() -> None:
    assert BACKENDS.options[-1].name == "xla"
    assert BACKENDS.options[-1].supports(rows(1), leaf(3), "tpu") is None


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
    assert sum(line.endswith(": taken") for line in text.splitlines()) == 2
    assert (platform != "tpu") or text.splitlines().count("xla: taken") == 2
    assert explain(rows(1), jnp.ones((N, K))) == "no quantized leaf: a dense product in XLA"


INTEGERS = QuantizeInput(leaf(8, ramp=True), None, 8, True, "token")


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_integer_products_are_explained_as_they_run(platform: str) -> None:
    lines = explain(rows(1), INTEGERS, platform).splitlines()
    assert lines[-1] == "xla: taken (x is rounded to integers, which multiply the codes as int8)"
    assert not any("taken" in line or "could" in line for line in lines[:-1])
    named = "cuda" if platform == "cuda" else "cpu"
    reason = next(line for line in lines if line.startswith(f"{named}: "))
    if platform in ("cpu", "cuda"):
        assert reason.endswith("by the codes of a QuantizedTensor, the weight is a QuantizeInput")


@pytest.mark.parametrize(
    "w, backend, reason",
    [
        (INTEGERS, "cuda", "it runs on cuda, not on cpu"),
        (INTEGERS, "cpu", "the weight is a QuantizeInput"),
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
