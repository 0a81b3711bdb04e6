"""Inputs rounded to 8 bits at the wish of the user: which layers take part, and the flag --inputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import any4_jax as a4
from any4_jax.cli import main
from any4_jax.product.quantized_input import quantize_input
from any4_jax.surgery import quantized_leaves
from any4_jax.weights import PermuteInput, QuantizeInput, ScaleInput, Sum, dequantize


def leaf(bits: int = 4, table: Any = jnp.int8, g: int = 32) -> a4.QuantizedTensor:
    rng = np.random.default_rng(bits)
    return a4.weights.from_codes(
        jnp.asarray(rng.integers(0, 2**bits, (6, 70), dtype=np.uint8)),
        jnp.asarray(rng.integers(-127, 128, (6, 2**bits)), table),
        jnp.asarray(rng.uniform(0.01, 0.02, (6, -(-70 // g))), jnp.float32),
        None,
        bits=bits,
        group_size=g,
    )


def rows(m: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(m, 70)), jnp.float32)


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_32_inputs_have_scales_of_their_own(symmetric: bool) -> None:
    x = rows(3).at[:, 32:64].multiply(100).at[0, :32].set(0)
    rounded = np.asarray(jax.jit(quantize_input)(x, QuantizeInput(leaf(), None, 8, symmetric, "group")))
    for first in (0, 32, 64):
        group = np.asarray(x)[:, first : first + 32]
        step = (np.abs(group).max(1) / 127 if symmetric else (group.max(1).clip(0) - group.min(1).clip(max=0)) / 255)[
            :, None
        ]
        assert (np.abs(rounded[:, first : first + 32] - group) <= step * 1.001).all()
    assert not rounded[0, :32].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("table", ["int8", "bfloat16"])
def test_the_product_is_that_of_rounded_inputs_in_float32(dtype: str, table: str) -> None:
    w = QuantizeInput(leaf(table=table), None, 8, True, "group")
    x = rows(3).astype(dtype)
    expected = (
        np.asarray(quantize_input(x.astype(jnp.float32), w), np.float64) @ np.asarray(dequantize(w), np.float64).T
    )
    y = a4.matmul(x, w)
    assert y.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(y, np.float64), expected, rtol=2**-8 if dtype == "bfloat16" else 1e-5, atol=1e-5
    )


def test_layers_that_a_kernel_multiplies_round_their_inputs() -> None:
    scale, order = jnp.ones(70), jnp.arange(70)[::-1]
    model = {
        "bytes": {"weight": leaf()},
        "within": {"weight": ScaleInput(PermuteInput(leaf(), order), scale)},
        "ramp": {"weight": dataclasses.replace(leaf(8, jnp.bfloat16), uniform=True)},
        "floats": {"weight": leaf(table=jnp.bfloat16)},
        "sum": {"weight": Sum((leaf(), leaf()))},
        "done": {"weight": QuantizeInput(leaf(), None, 6, True, "token")},
        "bias": jnp.zeros(3),
    }
    new = a4.quantize_inputs(model)
    wrapped = {
        path.split(".")[0] for path, w in quantized_leaves(new).items() if w is not quantized_leaves(model)[path]
    }
    assert wrapped == {"bytes", "within", "ramp"}
    assert new["within"]["weight"].inner.inner == QuantizeInput(
        model["within"]["weight"].inner.inner, None, 8, True, "group"
    )
    assert new["floats"]["weight"] is model["floats"]["weight"]
    by_token = a4.quantize_inputs(model, per="token")
    assert {name for name in model if isinstance(by_token[name], dict) and by_token[name] != model[name]} == wrapped


@pytest.mark.parametrize(
    "weight, reason",
    [
        (None, "got a model without quantized layers"),
        (
            leaf(table=jnp.bfloat16),
            "by inputs of 8 bits: the table is bfloat16 of 16 entries, it takes at most 16 of int8",
        ),
        (QuantizeInput(leaf(), None, 8, True, "group"), "by inputs of 8 bits: they are rounded to 8 bits already"),
    ],
)
def test_where_no_layer_can_one_sentence_says_why(weight: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as raised:
        a4.quantize_inputs({"weight": jnp.ones((4, 4)) if weight is None else weight})
    assert str(raised.value).count("\n") == 0


def test_a_checkpoint_keeps_the_rounding(tmp_path: Path) -> None:
    words = ["--calibrate", "none", "--rules", r"layers\..*=none", "--rules", "embed_tokens=int8", "--inputs", "int8"]
    assert main(["quantize", "tiny", str(tmp_path / "out"), *words]) == 0
    (w,) = quantized_leaves(a4.load(tmp_path / "out")).values()
    assert isinstance(w, QuantizeInput) and (w.bits, w.per) == (8, "group")


@pytest.mark.parametrize(
    "words",
    [["generate", "tiny", "--prompt", "a"], ["chat", "tiny"], ["eval", "tiny", "--text"], ["bench", "decode", "tiny"]],
)
def test_every_command_that_runs_a_model_has_the_flag(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("Once upon a time. " * 20)
    files = [str(tmp_path / "text")] if words[-1] == "--text" else []
    assert main([*words, *files, "--inputs", "int8"]) == 1
    assert "any4: error: got a model without quantized layers" in capsys.readouterr().err
