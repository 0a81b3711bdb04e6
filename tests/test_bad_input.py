"""Bad input: a table of calls that must be refused in one sentence of what was got, needed and to be done."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from refusals import check
from toy_methods import Nested

from any4_jax import statistics
from any4_jax.checkpoint import load, save
from any4_jax.methods import AF4, MX4, NF4, Any4, Int, quantize
from any4_jax.models.tiny import random_llama, tiny
from any4_jax.walk import calibrate, quantize_model

W = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
X = jnp.ones((2, 8))
TOKENS = np.ones((1, 4), np.int32)


def few() -> statistics.Gathered:
    return statistics.from_activations(np.ones((3, 5), np.float32))


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
    (lambda: quantize(W, Any4(), few(), path="p"), ValueError, "p K=8 have 5 gather"),
]
FIELDS = [
    (lambda: quantize(W, NF4(group_size=0)), ValueError, "group_size=0 NF4 choose"),
    (lambda: quantize(W, Any4(group_size=-1)), ValueError, "group_size=-1 Any4 choose"),
    (lambda: quantize(W, AF4(group_size=1)), ValueError, "block_size=1 larger group_size"),
    (lambda: quantize(W, Int(bits=7)), ValueError, "bits=7 choose"),
    (lambda: quantize(W, Int(zero_point="half")), ValueError, "zero_point='half' choose"),
    (lambda: quantize(W, MX4(scale="up")), ValueError, "scale='up' choose"),
    (lambda: quantize(W, MX4(scale_dtype="float32")), ValueError, "scale_dtype='float32' MX4 'uint8' choose"),
    (lambda: quantize(W, NF4(scale_dtype="int8")), ValueError, "scale_dtype='int8' choose"),
    (lambda: quantize(W, NF4(table_dtype="bf16")), ValueError, "table_dtype='bf16' choose"),
    (lambda: quantize(W, Any4(table_dtype="uint8")), ValueError, "table_dtype='uint8' choose"),
    (lambda: quantize(W, NF4(table_dtype="int8")), ValueError, "table_dtype='int8' NF4 choose"),
    (
        lambda: quantize(W, Any4(table_dtype="int8", group_size=None)),
        ValueError,
        "table_dtype='int8' group_size=None pass a group_size",
    ),
    (lambda: quantize(W, Any4(bits=5)), ValueError, "bits=5 choose"),
    (lambda: quantize(W, Any4(solver="best")), ValueError, "solver='best' choose"),
    (lambda: quantize(W, Any4(init="quantile")), ValueError, "init='quantile' solver='exact' pass"),
    (lambda: quantize(W, Any4(solver="lloyd", init="pow")), ValueError, "init='pow' choose"),
    (lambda: quantize(W, Any4(solver="lloyd", init="nf4", bits=3)), ValueError, "init='nf4' bits=3 pass"),
    (lambda: quantize(W, Any4(bias_pow=0.0)), ValueError, "bias_pow=0.0 greater than 0 choose"),
    (lambda: quantize(W, Any4(bias_pow=float("nan"))), ValueError, "bias_pow=nan finite choose"),
    (lambda: quantize(W, Any4(scale_search=-1)), ValueError, "scale_search=-1 choose"),
    (lambda: quantize(W, Any4(scale_weighting=3)), ValueError, "scale_weighting=3 choose"),
    (lambda: quantize(W, Any4(sample_weight="second_moment")), ValueError, "sample_weight='second_moment' pass stats"),
    (lambda: quantize(W, Any4(sample_weight="hessian")), ValueError, "sample_weight='hessian' choose"),
]
# (method, field, value): the type of a field is what its annotation says.
TYPES = [
    (Int, "symmetric", "no"), (Int, "symmetric", 1), (Int, "bits", True), (Int, "bits", 4.0), (Int, "group_size", 32.0),
    (NF4, "group_size", "32"), (NF4, "group_size", None), (NF4, "group_size", True), (NF4, "scale_dtype", jnp.float32),
    (AF4, "table_dtype", None), (MX4, "scale", "Round"), (MX4, "group_size", np.int64(32)), (Any4, "max_iter", 1.5),
    (Any4, "max_iter", -1), (Any4, "sample_tokens", 0), (Any4, "scale_weighting", True), (Any4, "tol", float("nan")),
    (Any4, "tol", -1.0), (Any4, "tol", "1e-4"), (Any4, "bias_pow", float("inf")), (Any4, "seed", -1),
    (Any4, "solver", None), (Any4, "init", 3), (Any4, "per_row", "yes"), (Any4, "sample_weight", ""),
]  # fmt: skip


@pytest.mark.parametrize("method,field,value", TYPES)
def test_fields_are_of_their_types_from_the_start(method, field: str, value) -> None:
    check(lambda: method(**{field: value}), ValueError, f"got {field}={value!r} {method.__name__} choose")


def test_a_methods_own_class_needs_no_base_to_be_checked() -> None:
    method = Nested(inner=NF4(), by_site="yes")  # type: ignore[arg-type]
    check(lambda: quantize_model(random_llama(), method, data=TOKENS), ValueError, "by_site='yes' Nested boolean")
    check(lambda: quantize(W, Nested(inner=4)), ValueError, "inner=4 Nested instance Method")


@functools.cache
def stats() -> statistics.Gathered:
    return statistics.from_activations(np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32))


def with_statistic(kind, change):
    return statistics.Gathered({**stats(), kind: jax.tree.map(lambda a: a, change(stats()[kind]))}, 8)


def moments(**changed):
    return with_statistic(statistics.Moments(), lambda m: dataclasses.replace(m, **changed))


STATISTICS = [
    (lambda: moments(count=jnp.int32(-6)), "negative counts calibrate"),
    (lambda: moments(sums=-stats()[statistics.Moments()].sums), "negative squares calibrate"),
    (lambda: with_statistic(statistics.AbsMax(), lambda a: -a), "negative magnitudes calibrate"),
    (lambda: moments(sums=stats()[statistics.Moments()].sums * jnp.nan), "NaN bfloat16 float32"),
    (lambda: moments(sums=stats()[statistics.Moments()].sums + jnp.inf), "infinite bfloat16 float32"),
]


@pytest.mark.parametrize("make,words", STATISTICS)
def test_statistics_that_no_activations_give_are_refused(make, words: str) -> None:
    check(lambda: quantize(W, NF4(), make(), path="a.b"), ValueError, f"a.b {words}")


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
FILE = __file__
CALIBRATION += [
    (lambda: calibrate(tiny(), FILE), ValueError, "test_bad_input.py name of a file pass its text"),
    (lambda: calibrate(tiny(), ["a text", FILE]), ValueError, "name of a file"),
    (lambda: quantize_model(tiny(), Any4(), data=FILE), ValueError, "name of a file"),
    (lambda: calibrate(tiny(), ["a text", [1, 2]]), ValueError, "1 texts and 1 lists one kind encode"),
    (lambda: calibrate(random_llama(), 5), TypeError, "int pass texts"),
    (lambda: calibrate(random_llama(), None), TypeError, "NoneType pass texts"),
    (lambda: calibrate(random_llama(), b"text"), TypeError, "bytes pass texts"),
    (lambda: calibrate(random_llama(), {"a": [1]}), TypeError, "dict pass texts"),
    (lambda: quantize_model(random_llama(), Any4(), data=5), TypeError, "int pass texts"),
    (lambda: calibrate(random_llama(), [1, 2, 3]), ValueError, "shape () pass texts"),
    (lambda: calibrate(random_llama(), [[[1], [2, 3]]]), ValueError, "object pass texts"),
    (lambda: calibrate(random_llama(), [[1.5, 2.0]]), ValueError, "float64 pass texts"),
    (lambda: calibrate(random_llama(), [[True]]), ValueError, "bool pass texts"),
    (lambda: calibrate(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), "text"), TypeError, "str Linear batches pass a list"),
    (lambda: calibrate(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), 5), TypeError, "int Linear batches pass a list"),
]
UP = "layers.1.mlp.up_proj"
GIVEN = [
    (lambda: quantize_model(random_llama(), Any4(), stats={"q.r": stats()}), ValueError, "of q.r no linear calibrate"),
    (lambda: quantize_model({"kernel": W}, Any4(), stats={f"{i}.kernel": stats() for i in range(9)}),
     ValueError, "0.kernel, 1.kernel, 2.kernel and 6 more no linear"),
    (lambda: quantize_model(random_llama(), NF4(), stats={"q.r": stats()}), ValueError, "of q.r no linear"),
    (lambda: quantize_model({"a": {"kernel": W.T}, "b": {"kernel": W.T}}, Any4(), stats={"a.kernel": stats()}),
     ValueError, "without those of b.kernel calibrate rule"),
    (lambda: quantize_model({"a": {"kernel": W.T}}, Any4(), stats={}), ValueError, "without those of a.kernel"),
    (lambda: quantize_model(quantize_model({"a": {"kernel": W.T}}, NF4()), NF4()),
     ValueError, "1 layers are quantized already (a.kernel)"),
]  # fmt: skip
CHECKPOINTS = [
    (lambda path: save(path, [X]), TypeError, "list NNX dict"),
    (lambda path: save(path, {"a.b": X}), ValueError, "'a.b' string without rename"),
    (lambda path: save(path, {"a": {"b/c": X}}), ValueError, "'b/c' 'a' rename"),
    (lambda path: save(path, {1: X}), ValueError, "key 1 string rename"),
    (lambda path: save(path, {"a": None}), TypeError, "'a' NoneType pass"),
    (lambda path: load(path), FileNotFoundError, "checkpoint"),
]


def with_nan(path: str, value: float = np.nan):
    """The small model with one value replaced in the parameter at a path."""
    model = random_llama()
    node = model
    for name in path.split("."):
        node = node[int(name)] if name.isdigit() else getattr(node, name)
    node.set_value(node.get_value().at[(0,) * node.get_value().ndim].set(value))
    return model


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("path", ["embed_tokens.embedding", "layers.1.input_layernorm.scale", "norm.scale"])
def test_nan_in_what_is_not_quantized_is_refused(path: str, value: float) -> None:
    model = with_nan(path, value)
    check(lambda: quantize_model(model, NF4()), ValueError, f"{path} NaN fix")
    check(lambda: calibrate(model, TOKENS), ValueError, f"{path} NaN fix")


def test_nan_in_a_layer_that_a_rule_leaves_alone_is_refused() -> None:
    rules = [(r"layers\.1\..*", None)]
    check(lambda: quantize_model(broken_model(), NF4(), rules=rules), ValueError, f"{UP}.kernel NaN fix")
    pair = {"a": {"kernel": W}, "norm": {"bias": np.array([1, np.nan], np.float32)}}
    check(lambda: quantize_model(pair, NF4()), ValueError, "norm.bias NaN fix")


def test_activations_that_overflow_name_the_dtype() -> None:
    model = random_llama()
    scale = model.layers[0].input_layernorm.scale
    scale.set_value(jnp.full_like(scale.get_value(), 3e38))
    check(lambda: calibrate(model, TOKENS), ValueError, "layers.0.self_attn statistics NaN float16 bfloat16 float32")


@pytest.mark.parametrize("call,error,words", WEIGHTS + FIELDS + CALIBRATION + GIVEN)
def test_refused_in_one_sentence(call, error: type[Exception], words: str) -> None:
    check(call, error, words)


@pytest.mark.parametrize("call,error,words", CHECKPOINTS)
def test_checkpoint_calls_refused_in_one_sentence(call, error: type[Exception], words: str, tmp_path) -> None:
    check(lambda: call(tmp_path / "checkpoint"), error, words)
    assert not (tmp_path / "checkpoint").exists()
