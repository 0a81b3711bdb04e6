"""What a quantized model prints: a line for each layer, and no values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_weights import NAMES, operator

import any4_jax as a4
from any4_jax.methods import NF4, Any4, Int
from any4_jax.models.tiny import random_llama
from any4_jax.nn.nnx import Any4Embed, Any4Linear
from any4_jax.weights import is_operator


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dense"])
def test_an_operator_prints_shapes_and_dtypes_in_one_line(name: str) -> None:
    w = operator(name)
    assert is_operator(w)
    for shown in (repr(w), str(w), f"{jax.eval_shape(lambda: w)!r}"):
        assert shown.startswith(type(w).__name__) and "\n" not in shown and "Array" not in shown and len(shown) < 600
    first = jax.tree.leaves(w)[0]
    assert f"{first.dtype}{list(first.shape)}" in repr(w)


def test_a_tree_of_anything_in_the_place_of_arrays_prints_too() -> None:
    w = operator("4 bits")
    assert "codes=None" in repr(jax.tree.map(lambda leaf: None, w)) and "lut=True" in repr(a4.trainable(w))


def test_a_layer_says_its_sizes_codes_and_bits() -> None:
    w = a4.quantize(jnp.asarray(np.random.default_rng(0).normal(size=(6, 32)), jnp.float32), Any4(group_size=16))
    said = f"6 x 32, 4-bit codes, a table a row, group_size=16, {w.bits_per_weight:.4g} bits a weight)"
    assert repr(Any4Linear.of(w)) == f"Any4Linear({said}" and repr(Any4Embed.of(w)) == f"Any4Embed({said}"
    assert repr(Any4Linear.of(jnp.zeros((6, 32)))) == "Any4Linear(6 x 32, float32)"
    assert repr(Any4Linear.of(a4.weights.Sum((w, w)))).startswith("Any4Linear(6 x 32, Sum, 4-bit codes")


def test_a_decoder_prints_a_line_for_each_quantized_layer_and_no_values() -> None:
    model = a4.quantize_model(random_llama(), Int(group_size=16), rules=[("embed_tokens", NF4(group_size=16))])
    for shown in (repr(model), str(model)):
        assert shown.count("Any4Linear(") == 14 and shown.count("Any4Embed(") == 1 and "[[" not in shown
        lines = [line for line in shown.splitlines() if "Any4" in line]
        assert len(lines) == 15 and all("bits a weight)" in line for line in lines)
        assert len(shown) < len(repr(random_llama()))
    assert repr(model.recipe) == "Recipe(1 linears: nf4, 14 linears: int)"
