"""Bad input: a table of calls that must be refused in one sentence of what was got, needed and to be done."""

import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax import statistics
from any4_jax.checkpoint import load, save
from any4_jax.methods import AF4, MX4, NF4, Any4, Int, quantize
from any4_jax.models.tiny import random_llama, tiny
from any4_jax.nn.nnx import Any4Linear
from any4_jax.product import matmul
from any4_jax.walk import calibrate, quantize_model

W = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
X = jnp.ones((2, 8))
FEW = statistics.from_activations(np.ones((3, 5), np.float32))


def with_value(value: float) -> np.ndarray:
    w = W.copy()
    w[2, 3] = value
    return w


def broken_model():
    model = random_llama()
    kernel = model.layers[1].mlp.up_proj.kernel
    kernel[...] = kernel[...].at[3, 4].set(jnp.nan)
    return model


# (call, error, words that the message must hold)
WEIGHTS = [
    (
        lambda: quantize(with_value(np.nan), NF4(), path="layers.3.mlp.up_proj"),
        ValueError,
        "layers.3.mlp.up_proj NaN fix",
    ),
    (lambda: quantize(with_value(np.inf), Int(), path="a.b"), ValueError, "a.b infinite fix"),
    (lambda: quantize(with_value(-np.inf), Any4(solver="lloyd", bits=2), path="a.b"), ValueError, "a.b infinite fix"),
    (lambda: quantize_model(broken_model(), NF4()), ValueError, "layers.1.mlp.up_proj NaN"),
    (lambda: quantize_model({"d": {"kernel": with_value(np.nan)}}, NF4()), ValueError, "d.kernel NaN"),
    (lambda: quantize(W[:, :0], NF4()), ValueError, "(4, 0) [N, K] reshape"),
    (lambda: quantize(W[:0], Any4()), ValueError, "(0, 8) [N, K]"),
    (lambda: quantize(W[0], NF4()), ValueError, "(8,) [N, K] reshape"),
    (lambda: quantize(W[None], NF4()), ValueError, "(1, 4, 8) [N, K]"),
    (lambda: quantize(W.astype(np.int32), NF4(), path="p"), TypeError, "p int32 floating convert"),
    (lambda: quantize(W.tolist(), NF4(), path="p"), TypeError, "p None floating"),
    (lambda: quantize(quantize(W, NF4()), NF4()), TypeError, "QuantizedTensor already dequantize"),
    (lambda: quantize(W, Any4(), FEW, path="p"), ValueError, "p K=8 have 5 gather"),
]
FIELDS = [
    (lambda: quantize(W, NF4(group_size=0)), ValueError, "group_size=0 positive"),
    (lambda: quantize(W, Any4(group_size=-1)), ValueError, "group_size=-1 positive"),
    (lambda: quantize(W, AF4(group_size=1)), ValueError, "block_size=1 larger group_size"),
    (lambda: quantize(W, Int(bits=7)), ValueError, "bits=7 choose"),
    (lambda: quantize(W, Int(zero_point="half")), ValueError, "zero_point='half' choose"),
    (lambda: quantize(W, MX4(scale="up")), ValueError, "scale='up' choose"),
    (lambda: quantize(W, MX4(scale_dtype="float32")), ValueError, "scale_dtype='float32' leave"),
    (lambda: quantize(W, NF4(scale_dtype="int8")), ValueError, "scale_dtype='int8' choose"),
    (lambda: quantize(W, NF4(table_dtype="bf16")), ValueError, "table_dtype='bf16' choose"),
    (lambda: quantize(W, Any4(table_dtype="uint8")), ValueError, "table_dtype='uint8' choose"),
    (lambda: quantize(W, Any4(bits=5)), ValueError, "bits=5 choose"),
    (lambda: quantize(W, Any4(solver="best")), ValueError, "solver='best' choose"),
    (lambda: quantize(W, Any4(init="quantile")), ValueError, "init='quantile' solver='exact' pass"),
    (lambda: quantize(W, Any4(solver="lloyd", init="pow")), ValueError, "init='pow' choose"),
    (lambda: quantize(W, Any4(solver="lloyd", init="nf4", bits=3)), ValueError, "init='nf4' bits=3 pass"),
    (lambda: quantize(W, Any4(bias_pow=0.0)), ValueError, "bias_pow=0.0 positive pass"),
    (lambda: quantize(W, Any4(bias_pow=float("nan"))), ValueError, "bias_pow=nan positive pass"),
    (lambda: quantize(W, Any4(scale_search=-1)), ValueError, "scale_search=-1 pass 0"),
    (lambda: quantize(W, Any4(scale_weighting=3)), ValueError, "scale_weighting=3 choose"),
    (lambda: quantize(W, Any4(sample_weight="second_moment")), ValueError, "sample_weight='second_moment' pass stats"),
    (lambda: quantize(W, Any4(sample_weight="hessian")), ValueError, "sample_weight='hessian' choose"),
]
PRODUCTS = [
    (lambda: matmul(X[:, :7], quantize(W, NF4())), ValueError, "(2, 7) (4, 8) must end in K=8"),
    (lambda: matmul(X.astype(int), quantize(W, NF4())), TypeError, "int32 floating convert"),
    (lambda: matmul(X, jnp.ones((2, 4, 8))), ValueError, "(2, 4, 8) [N, K] jax.vmap"),
    (lambda: matmul(X, quantize(W, NF4()), backend="magic"), ValueError, "backend='magic' 'xla' pass"),
    (lambda: Any4Linear.of(jnp.ones(4)), ValueError, "(4,) [N, K] reshape"),
    (lambda: Any4Linear.of(jnp.ones((2, 4, 8)))(X), ValueError, "(2, 4, 8) [N, K] jax.vmap"),
]
CALIBRATION = [
    (lambda: calibrate(tiny(), ""), ValueError, "no calibration text pass some text"),
    (lambda: calibrate(tiny(), [" \n", ""]), ValueError, "no calibration text"),
    (lambda: calibrate(random_llama(), []), ValueError, "no calibration text or tokens"),
    (lambda: calibrate(random_llama(), np.zeros((0, 4), np.int32)), ValueError, "no calibration text or tokens"),
    (lambda: calibrate(random_llama(), "text"), ValueError, "without a tokenizer pass token ids"),
    (lambda: calibrate(random_llama(), [[1, 128]]), ValueError, "to 128 vocabulary has 128 use"),
    (lambda: calibrate(random_llama(), [[1, -2]]), ValueError, "-2 vocabulary use"),
    (lambda: calibrate(random_llama(), np.ones((2, 3))), ValueError, "float64 pass texts"),
    (lambda: calibrate(random_llama(), np.ones((1, 4), int), sequential=True), ValueError, "sequential=True pass"),
    (lambda: calibrate(random_llama(), np.ones((1, 4), int), seqlen=0), ValueError, "seqlen=0 at least 1"),
    (lambda: calibrate(random_llama(), np.ones((1, 4), int), batch_size=0), ValueError, "batch_size=0 at least 1"),
    (lambda: calibrate(random_llama(), [[], []]), ValueError, "no calibration text or tokens"),
    (lambda: calibrate(random_llama(), [[2**32 + 1]]), ValueError, "to 4294967297 vocabulary use"),
    (lambda: quantize_model(random_llama(), NF4(), data=[[1]], batch_size=-1), ValueError, "batch_size=-1 at least 1"),
    (lambda: quantize_model(random_llama(), NF4(), data=[[1]], seqlen=0), ValueError, "seqlen=0 at least 1"),
    (lambda: quantize_model({"kernel": X}, Any4.paper(), data=X), ValueError, "sequential=False to calibrate as stats"),
    (lambda: calibrate({"w": X}, "text"), TypeError, "dict from_activations"),
]
CHECKPOINTS = [
    (lambda path: save(path, [X]), TypeError, "list NNX dict"),
    (lambda path: save(path, {"a.b": X}), ValueError, "'a.b' string without rename"),
    (lambda path: save(path, {"a": {"b/c": X}}), ValueError, "'b/c' 'a' rename"),
    (lambda path: save(path, {1: X}), ValueError, "key 1 string rename"),
    (lambda path: save(path, {"a": None}), TypeError, "'a' NoneType pass"),
    (lambda path: load(path), FileNotFoundError, "checkpoint"),
]


def check(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message and len(message) < 400
    missing = [word for word in words.split() if word not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize("call,error,words", WEIGHTS + FIELDS + PRODUCTS + CALIBRATION)
def test_refused_in_one_sentence(call, error: type[Exception], words: str) -> None:
    check(call, error, words)


@pytest.mark.parametrize("call,error,words", CHECKPOINTS)
def test_checkpoint_calls_refused_in_one_sentence(call, error: type[Exception], words: str, tmp_path) -> None:
    check(lambda: call(tmp_path / "checkpoint"), error, words)
    assert not (tmp_path / "checkpoint").exists()
