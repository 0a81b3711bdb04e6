"""degrid: the function stays, the weights move by the documented draws."""

import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import CONFIG

from any4_jax.models import hf
from any4_jax.models.degrid import degrid
from any4_jax.models.tiny import random_llama


def test_degrid_keeps_the_function_and_moves_the_weights() -> None:
    model = random_llama(CONFIG)
    moved = degrid(model, seed=3)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 9)))
    logits = np.asarray(model(tokens))
    assert np.abs(np.asarray(moved(tokens)) - logits).max() < 2e-5 * np.abs(logits).max()
    before, after = hf.tensors_of(model), hf.tensors_of(moved)
    for name in before:
        bias = name.endswith(".bias") and not name.endswith(("v_proj.bias", "up_proj.bias"))
        touched = "model.layers" in name and not bias
        assert np.array_equal(before[name], after[name]) != touched, name


def test_degrid_factors_are_the_documented_draws() -> None:
    model = random_llama(CONFIG)
    tensors, moved = hf.tensors_of(model), hf.tensors_of(degrid(model, scale_range=1.2, seed=0))
    rng = np.random.default_rng(0)
    draws = [np.exp(rng.uniform(-np.log(1.2), np.log(1.2), n)).astype(np.float32) for n in (24, 24, 8, 20)]
    layer = "model.layers.0"
    after_v = np.repeat(draws[2].reshape(2, 4), 2, axis=0).reshape(-1)
    expected = {
        f"{layer}.input_layernorm.weight": lambda w: w / draws[0],
        f"{layer}.self_attn.q_proj.weight": lambda w: w * draws[0],
        f"{layer}.post_attention_layernorm.weight": lambda w: w / draws[1],
        f"{layer}.mlp.gate_proj.weight": lambda w: w * draws[1],
        f"{layer}.self_attn.v_proj.weight": lambda w: w * draws[0] * draws[2][:, None],
        f"{layer}.self_attn.v_proj.bias": lambda b: b * draws[2],
        f"{layer}.self_attn.o_proj.weight": lambda w: w / after_v,
        f"{layer}.mlp.up_proj.weight": lambda w: w * draws[1] * draws[3][:, None],
        f"{layer}.mlp.up_proj.bias": lambda b: b * draws[3],
        f"{layer}.mlp.down_proj.weight": lambda w: w / draws[3],
    }
    for name, by_hand in expected.items():
        np.testing.assert_array_equal(moved[name], by_hand(tensors[name]), name)
    with pytest.raises(ValueError, match="scale_range=1.0"):
        degrid(model, scale_range=1.0)
