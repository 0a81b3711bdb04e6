"""ZeroQuant against its formulas in numpy: weights in groups, inputs by token, blocks trained on the float outputs."""

import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same
from one_linear import Linears

from any4_jax import matmul
from any4_jax.methods import ZeroQuant
from any4_jax.methods.apply import apply_block
from any4_jax.models.tiny import random_llama
from any4_jax.surgery import quantized_leaves
from any4_jax.walk import quantize_model
from any4_jax.weights import dequantize

RNG = np.random.default_rng(7)
W = RNG.standard_t(3, (6, 40)).astype(np.float32)
W[0, 3], W[1, 5], W[2, :16] = 9.0, -9.0, 0.0
# Inputs that occur together, so that errors can make up for each other.
X = (RNG.normal(size=(5, 9, 6)) @ RNG.normal(size=(6, 40))).astype(np.float32)
SAME = {"attention_bits": 4, "scale_dtype": "float32"}


def made(method: ZeroQuant, w: np.ndarray = W, **fields):
    """The operator of one matrix, and the notes."""
    result = apply_block(Linears.of(method, {"fc": w}, X, **fields), method, "block")
    return result.contents["fc.kernel"], result.notes["fc"]


def published(w: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """DeepSpeed's symmetric quantizer on groups within rows: what is multiplied by, and each weight's scale."""
    out, scale = np.zeros_like(w), np.zeros_like(w)
    for start in range(0, w.shape[1], group):
        part = w[:, start : start + group]
        s = 2 * np.abs(part).max(axis=1, keepdims=True) / np.float32(2**bits)
        codes = np.clip(np.round(part / np.where(s == 0, 1, s)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        out[:, start : start + group], scale[:, start : start + group] = codes * s, s
    return out, scale


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 40), (8, 10), (3, 2**30)])
def test_weights_are_those_of_the_published_formula_in_groups_within_rows(bits: int, group: int) -> None:
    """To the bit. The largest weight of a group is exact where it is negative; a positive one loses a step."""
    method = ZeroQuant(bits, bits, group_size=group, input_bits=None, scale_dtype="float32")
    operator, _ = made(method)
    back = np.asarray(dequantize(operator))
    wanted, scale = published(W, bits, min(group, 40))
    np.testing.assert_array_equal(back, wanted)
    assert back[1, 5] == -9 and back[0, 3] == 9 - scale[0, 3]
    off = np.abs(back - W)
    assert (off <= scale * 1.00001).all() and (off <= scale * 0.50001)[W < 0].all() and not back[2, :16].any()
    # No group has weights of two rows.
    alone = [np.asarray(dequantize(made(method, row[None])[0])) for row in W[:2]]
    np.testing.assert_array_equal(np.concatenate(alone), back[:2])


def test_inputs_are_rounded_token_by_token() -> None:
    """As integers up to 127, by the scale that each token needs: tokens are independent of each other."""
    operator, _ = made(ZeroQuant(**SAME))
    x = jnp.asarray(X[0])
    y = np.asarray(matmul(x, operator))
    scale = np.abs(X[0]).max(axis=1, keepdims=True) / np.float32(127)
    rounded = np.round(X[0] / scale) * scale
    np.testing.assert_allclose(y, rounded @ np.asarray(dequantize(operator)).T, rtol=1e-5, atol=1e-5)
    order = RNG.permutation(9)
    np.testing.assert_array_equal(matmul(x[order], operator), y[order])
    np.testing.assert_array_equal(matmul(x * 4, operator), y * 4)
    unrounded, _ = made(ZeroQuant(**SAME, input_bits=None))
    assert_same(operator.inner, unrounded)


def test_attention_and_mlp_have_widths_of_their_own() -> None:
    model = random_llama()
    new = quantized_leaves(quantize_model(model, ZeroQuant(group_size=16)))
    assert {path: w.inner.bits for path, w in new.items()} == {path: 8 if "attn" in path else 4 for path in new}
    assert len(new) == 14
    assert {w.inner.group_size for w in new.values()} == {16}
    for wrong, words in (
        ("attn", r"got attention='attn', which matches none of self_attn\.q_proj, "),
        ("(", "is no reg"),
    ):
        with pytest.raises(ValueError, match=words):
            quantize_model(model, ZeroQuant(attention=wrong))


def test_distillation_lowers_the_error_of_the_blocks_that_it_is_for() -> None:
    """Behind rounded inputs, which gradients pass."""
    lkd = {name: ZeroQuant(**SAME, lkd=name, steps=30, learning_rate=0.01) for name in ("none", "last", "all")}
    plain, notes = made(lkd["none"])
    assert not notes
    for name, last, trained in (("last", True, True), ("last", False, False), ("all", False, True)):
        operator, notes = made(lkd[name], last=last)
        assert ("error_after" in notes) == trained
        if trained:
            assert 0 < notes["error_after"] < 0.8 * notes["error_before"]
            assert operator.bits_per_weight == plain.bits_per_weight
        else:
            assert_same(operator, plain)
    with pytest.raises(ValueError, match="got lkd='all' without data, which blocks are trained on; pass data, or lkd="):
        quantize_model(random_llama(), lkd["all"])


def test_a_student_without_loss_stays() -> None:
    exact = np.round(4 * np.tanh(W)).clip(-4, 3).astype(np.float32)
    exact[:, 0] = -4
    operator, notes = made(ZeroQuant(3, 3, input_bits=None, lkd="all", steps=8), exact)
    assert notes["best_step"] == 0 and notes["error_after"] < 1e-12
    np.testing.assert_array_equal(dequantize(operator), exact)
