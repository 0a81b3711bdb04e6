"""`any4 inspect` of checkpoints that hold more than what a method made."""

import jax.numpy as jnp
import numpy as np
import pytest

import any4_jax as a4
from any4_jax import checkpoint
from any4_jax.cli import main
from any4_jax.methods import Int
from any4_jax.surgery import quantized_leaves

METHOD = Int(group_size=16)


def inspected(path, capsys) -> str:
    assert main(["inspect", str(path)]) == 0
    return capsys.readouterr().out


def test_low_rank_updates_are_named_with_their_ranks(tmp_path, capsys) -> None:
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(32, 16)), jnp.float32)
    plain = a4.quantize_model({"a": {"kernel": kernel}, "b": {"kernel": kernel}}, METHOD)
    for rank in (4, 2):
        model, words = a4.add_lora(plain, rank, pattern="a.*"), f"QuantizedTensor + LoRA rank {rank}"
        a4.save(tmp_path / "c", model)
        shown = inspected(tmp_path / "c", capsys)
        operators = quantized_leaves(model)
        line = next(line for line in shown.splitlines() if line.startswith("a.kernel"))
        assert words in line and f"{operators['a.kernel'].bits_per_weight:.3f}" in line
        assert "LoRA" not in next(line for line in shown.splitlines() if line.startswith("b.kernel"))
        extra = operators["a.kernel"].nbytes - operators["b.kernel"].nbytes
        assert f"({extra / 1e6:.3f} MB of them LoRA)" in shown


def test_a_decoder_with_updates_names_its_methods(tmp_path, capsys) -> None:
    model = a4.quantize_model(a4.models.load("tiny"), METHOD, rules=[(r"layers\.[1-4].*", None)])
    a4.save(tmp_path / "c", a4.add_lora(model, 3, pattern=".*q_proj"))
    shown = inspected(tmp_path / "c", capsys)
    assert "layers.0.self_attn.q_proj  int + LoRA rank 3" in shown and shown.count("LoRA rank 3") == 1
    assert "\nint: bits=4" in shown


def test_arrays_that_are_no_model_are_listed_by_size(tmp_path, capsys) -> None:
    checkpoint.write(tmp_path / "c", {"w": np.zeros((10, 100), np.float32)}, {"made by": "hand"})
    assert "no layer is quantized; parameters 0.004 MB" in inspected(tmp_path / "c", capsys)


@pytest.mark.parametrize("content", [{"tree": 3}, {"kind": "tree", "tree": {"leaf": {"array": "w"}}, "recipe": {}}])
def test_a_wrong_description_is_one_sentence(content, tmp_path, capsys) -> None:
    checkpoint.write(tmp_path / "c", {"w": np.zeros(3, np.float32)}, content)
    assert main(["inspect", str(tmp_path / "c")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("any4: error: ") and "description" in line
