"""Quantized embeddings: rows decoded alone, the head that shares them, and that only a rule asks for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_weights import entries

import any4_jax as a4
from any4_jax.cli import main
from any4_jax.methods import MX4, NF4, Any4, Int, quantize
from any4_jax.nn.nnx import Any4Embed
from any4_jax.product import lookup
from any4_jax.statistics import Moments
from any4_jax.surgery import quantized_leaves
from any4_jax.weights import LowRank, PermuteInput, ScaleInput, Sum, dequantize, take

RULES = [("embed_tokens", Int(8, group_size=32))]


def operators(rng: np.random.Generator) -> dict:
    w = jnp.asarray(rng.normal(size=(12, 40)), jnp.float32)
    leaf = quantize(w, Any4(group_size=16, refit=False))
    low = LowRank(jnp.ones((2, 40)), jnp.asarray(rng.normal(size=(12, 2)), jnp.float32), jnp.float32(0.5))
    return {
        "a table for each row": leaf,
        "one table": quantize(w, NF4(group_size=16)),
        "planes": quantize(w, Int(5, group_size=16)),
        "e8m0": quantize(w, MX4()),
        "slice": take(jax.tree.map(lambda a: jnp.stack([a[::-1], a]), leaf), 1),
        "sparse": entries([0, 3, 3, 11], [39, 1, 1, 7], [2.0, 1.0, 3.0, 4.0], 12, 40, padding=1),
        "array": w,
        "sum": Sum((leaf, low)),
        "scaled and permuted": ScaleInput(PermuteInput(leaf, jnp.arange(40)[::-1]), jnp.arange(40.0)),
    }


def test_a_lookup_gives_the_rows_of_the_dequantized_matrix(rng: np.random.Generator) -> None:
    rows = jnp.asarray([[3, 11, 0], [3, 5, 7]])
    for name, operator in operators(rng).items():
        found = jax.jit(lookup)(operator, rows)
        dense = np.asarray(jax.jit(dequantize)(operator))
        np.testing.assert_allclose(found, dense[rows], rtol=1e-6, atol=1e-6, err_msg=name)
        narrow = jax.eval_shape(lambda operator: lookup(operator, rows, jnp.bfloat16), operator)
        assert narrow.dtype == jnp.bfloat16


def test_a_lookup_of_no_rows_gives_none(rng: np.random.Generator) -> None:
    for name, w in operators(rng).items():
        assert lookup(w, jnp.zeros((2, 0), jnp.int32)).shape == (2, 0, 40), name


def test_a_lookup_decodes_no_other_row(rng: np.random.Generator) -> None:
    leaf = quantize(jnp.asarray(rng.normal(size=(1000, 40)), jnp.float32), NF4(group_size=16))
    text = jax.jit(lookup).lower(leaf, jnp.arange(3)).as_text()
    assert "3x40xf32" in text and "1000x40" not in text


def test_an_embedding_is_left_alone_until_a_rule_names_it() -> None:
    model = a4.models.load("tiny")
    assert "embed_tokens" not in quantized_leaves(a4.quantize_model(model, NF4(group_size=32)))
    small = a4.quantize_model(model, None, rules=RULES)
    assert set(quantized_leaves(small)) == {"embed_tokens"} and isinstance(small.embed_tokens, Any4Embed)

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.words = nnx.Embed(20, 32, rngs=nnx.Rngs(0))
            self.out = nnx.Linear(32, 4, rngs=nnx.Rngs(1))

    assert set(quantized_leaves(a4.quantize_model(Net(), NF4(group_size=32)))) == {"out"}


def test_a_tied_model_computes_with_its_dequantized_embedding(tmp_path) -> None:
    model = a4.models.load("tiny")
    small = a4.quantize_model(model, None, rules=RULES)
    dense = nnx.clone(model)
    dense.embed_tokens.embedding[...] = dequantize(small.embed_tokens.weight)
    tokens = np.asarray([[1, 40, 300, 7]], np.int32)
    np.testing.assert_allclose(small(tokens), dense(tokens), rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(small(tokens) - model(tokens))).max() > 1e-4
    a4.save(tmp_path / "ckpt", small)
    for again in (a4.load(tmp_path / "ckpt"), a4.load(tmp_path / "ckpt", into=model)):
        np.testing.assert_array_equal(again(tokens), small(tokens))


def test_a_tied_head_has_the_statistics_of_its_input() -> None:
    model = a4.models.load("tiny")
    tokens = np.arange(1, 9, dtype=np.int32)[None]
    stats = a4.calibrate(model, tokens)["embed_tokens"][Moments()]
    positions = jnp.arange(8)[None]
    x, _ = model.decode(tokens, model.init_cache(1, 8), positions)
    np.testing.assert_allclose(stats.second_moment, (np.asarray(model.norm(x))[0] ** 2).mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize("rule,code", [("embed_tokens=int8", 0), ("embed_tokens=int9", 2)])
def test_the_command_line_names_its_bits(rule: str, code: int, tmp_path) -> None:
    out = str(tmp_path / "out")
    command = ["quantize", "tiny", out, "--method", "nf4", "--group-size", "32", "--calibrate", "none", "--rules", rule]
    assert main(command) == code
    if code == 0:
        assert quantized_leaves(a4.load(out))["embed_tokens"].bits == 8
