"""Search results of FPQ in a file: a model is quantized again from them, and what no search has found is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same

import any4_jax as a4
from any4_jax import cli, statistics
from any4_jax.methods import FPQ
from any4_jax.models.tiny import random_llama
from any4_jax.walk import load_search_results, save_search_results
from any4_jax.weights import QuantizedTensor, QuantizeInput, ScaleInput, dequantize, take_rows

SMALL = FPQ(rounds=2, steps=8, low=0.8, high=1.1, tokens=24, scale_dtype="float32")
BY_ROWS = dataclasses.replace(SMALL, input_bits=None)
RULES = [(r"layers\.1\..*|.*(mlp|o_proj).*|lm_head", None), ("embed_tokens", BY_ROWS)]


def test_a_model_is_saved_and_quantized_again_from_results(tmp_path: Path) -> None:
    model, data = random_llama(), np.random.default_rng(0).integers(0, 128, (3, 12), dtype=np.int32)
    new = a4.quantize_model(model, SMALL, data=data, rules=RULES)
    scale = np.asarray(new.layers[0].input_layernorm.scale[...] / model.layers[0].input_layernorm.scale[...])
    assert (np.log2(scale) % 1 == 0).all() and scale.max() > 1
    leaves = a4.surgery.quantized_leaves(new)
    assert type(leaves["layers.0.self_attn.q_proj"]) is QuantizeInput
    assert type(leaves["embed_tokens"]) is QuantizedTensor and 4 < leaves["embed_tokens"].bits_per_weight < 5
    a4.save(tmp_path / "model", new)
    assert_same(jax.tree.leaves(a4.load(tmp_path / "model")), jax.tree.leaves(new))

    save_search_results(new, tmp_path / "results.json")
    stats = load_search_results(tmp_path / "results.json")
    given = dataclasses.replace(SMALL, given=True)
    rows = ("embed_tokens", dataclasses.replace(BY_ROWS, given=True))
    again = a4.quantize_model(model, given, stats=stats, rules=[RULES[0], rows])
    assert_same(jax.tree.leaves(again), jax.tree.leaves(new))
    for fault, words in (
        ({"stats": other_exponents(stats)}, "results of formats that these fields don't allow; pass the bits and"),
        (
            {"stats": {"embed_tokens": statistics.from_activations(jnp.ones((2, 48)))}},
            "without Searched.*; pass stats=",
        ),
        ({"data": data}, "got no search results, fpq with given=True takes what an earlier search found; pass stats="),
    ):
        with pytest.raises(ValueError, match=words):
            a4.quantize_model(model, None, rules=[rows], **fault)
    for fields, words in (
        ({"bits": 8, "input_bits": 8}, "results of formats that these fields don't allow"),
        ({"input_bits": None}, "results of the layers of a site together, need those of each layer by itself"),
        ({"shifts": "kept"}, "results of the layers of a site together, need those of each layer by itself"),
    ):
        with pytest.raises(ValueError, match=words):
            a4.quantize_model(model, dataclasses.replace(given, **fields), stats=stats, rules=RULES[:1])
    with pytest.raises(
        ValueError, match="got data, fpq with given=True takes what an earlier search found; pass stats="
    ):
        a4.quantize_model(model, given, data=data, rules=RULES[:1])
    with pytest.raises(ValueError, match="fpq has quantized no layer, need one"):
        save_search_results(model, tmp_path / "none.json")
    refused_contents((tmp_path / "results.json").read_text(), tmp_path / "bad.json")


QUERIES = '"self_attn.q_proj":"layers.0.self_attn.q_proj"'


def other_exponents(stats: Any) -> dict[str, Any]:
    """The results of the embedding with an exponent that no format of 4 bits has."""
    leaves, structure = jax.tree.flatten({"embed_tokens": stats["embed_tokens"]})
    return jax.tree.unflatten(structure, [jnp.int32(5) if leaf.ndim == 0 else leaf for leaf in leaves])


def refused_contents(content: str, file: Path) -> None:
    for wrong, words in (
        ("[]", "holds a list"),
        ('{"kind": "other", "layers": {}}', "kind is 'other'"),
        (content.replace('"embed_tokens":{', '"embed":{'), "lacks embed_tokens, which was searched together"),
        (content.replace('"shifts":[', '"shifts":[0.5,'), "shifts.0 is 0.5"),
        (content.replace('"shifts":[', '"shifts":[8,'), "shifts.0 is 8, and less than or equal to 7"),
        (content.replace('"shifts":[', '"shifts":[1,'), "shifts, and one for each of k="),
        (content.replace('"bias":', '"bias":-1e308,"was":'), "has a bias of -1e.308, whose scale is beyond float32"),
        (content.replace('"biases":[', '"biases":[500.0,'), "has a bias of 500.0, whose scale is beyond float32"),
        (content.replace('"bits":4', '"bits":5', 1), "bits is 5"),
        (content.replace(QUERIES, QUERIES.replace("q_proj", "v_proj"), 1), "differ in k, inputs or together"),
        (content.replace('q_proj":{"k":48', 'q_proj":{"k":47'), "differ in k, inputs or together"),
    ):
        assert wrong != content
        file.write_text(wrong)
        with pytest.raises(ValueError, match=words):
            load_search_results(file)


def test_the_command_line_keeps_results_and_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedding is the head, whose inputs are rounded; its rows are looked up as they are."""
    words = ["--method", "fpq", "--shifts", "kept", "--rules", "embed_tokens=fpq", "--rules", r"layers\..*=none"]
    words += ["--rounds", "1", "--steps", "1", "--tokens", "16", "--search-results", str(tmp_path / "found.json")]
    for out, more in (("searched", []), ("taken", ["--calibrate", "none"])):
        assert cli.main(["quantize", "tiny", str(tmp_path / out), *words, *more]) == 0
    searched, taken = (a4.load(tmp_path / out) for out in ("searched", "taken"))
    assert_same(jax.tree.leaves(taken), jax.tree.leaves(searched))
    assert [method.given for model in (searched, taken) for _, method, _ in model.recipe.linears] == [False, True]
    (head,) = a4.surgery.quantized_leaves(searched).values()
    assert type(head) is ScaleInput and type(head.inner) is QuantizeInput and head.inner.scale is not None
    np.testing.assert_allclose(dequantize(take_rows(head, jnp.arange(3))), dequantize(head)[:3], rtol=1e-6)
    assert cli.main(["quantize", "tiny", str(tmp_path / "other"), "--method", "int", *words[-2:]]) == 2
    assert "only the method fpq writes and reads such a file" in capsys.readouterr().err
