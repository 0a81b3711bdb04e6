"""Checkpoints that the version of schema 1 wrote: they load, and the models compute what they did then."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from float_models import NNXNet

import any4_jax as a4
from any4_jax.checkpoint import store
from any4_jax.cli import main
from any4_jax.models.flax_llama import is_repaired
from any4_jax.surgery import linears, quantized_leaves
from any4_jax.weights import LowRank, Sum

GOLDEN = Path(__file__).parent / "golden"
OUTPUTS = np.load(GOLDEN / "schema1_outputs.npz")
NAMES = ("own", "hf_flax", "nnx_lora")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> the directory that was saved."""
    folder = tmp_path_factory.mktemp("golden")
    for name in NAMES:
        shutil.unpack_archive(GOLDEN / f"schema1_{name}.zip", folder / name)
    return {name: folder / name for name in NAMES}


def continuation(model, prompt: np.ndarray, wanted: np.ndarray) -> list[int]:
    return a4.generate(model, prompt, max_new_tokens=len(wanted), eos=())


def test_they_are_of_schema_1(unpacked: dict[str, Path]) -> None:
    for path in unpacked.values():
        assert store.verify(path) and '\n "schema": 1,\n' in (path / "any4.json").read_text()


def test_a_decoder_gives_equal_tokens(unpacked: dict[str, Path]) -> None:
    model = a4.load(unpacked["own"])
    assert model.tokenizer.files == a4.models.load("tiny").tokenizer.files
    leaves = quantized_leaves(model)
    assert leaves["embed_tokens"].bits == 8 and leaves["layers.4.mlp.up_proj"].bits == 3
    assert set(linears(model)) == {"layers.2.mlp.down_proj"}
    assert dict(model.recipe.rules)[r"layers\.2\.mlp\.down_proj"] is None
    assert {path for path, _, _ in model.recipe.linears} == set(leaves)
    assert continuation(model, OUTPUTS["prompt"], OUTPUTS["own"]) == OUTPUTS["own"].tolist()


def test_a_hugging_face_model_gives_equal_tokens(unpacked: dict[str, Path]) -> None:
    pytest.importorskip("transformers.models.llama.modeling_flax_llama", reason="needs transformers 4")
    model = a4.load(unpacked["hf_flax"])
    assert is_repaired(model) and model.tokenizer is not None and model.recipe is not None
    prompt, wanted = OUTPUTS["prompt"], OUTPUTS["hf_flax"]
    given = {"max_new_tokens": len(wanted), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(prompt[None], **given).sequences[0, len(prompt) :].tolist() == wanted.tolist()


def test_an_nnx_module_with_low_rank_updates_gives_equal_outputs(unpacked: dict[str, Path]) -> None:
    # The class that tests/golden/make_checkpoints.py saved, by another name.
    model = a4.load(unpacked["nnx_lora"], into=nnx.eval_shape(lambda: NNXNet(nnx.Rngs(1))))
    for operator in quantized_leaves(model).values():
        assert isinstance(operator, Sum) and isinstance(operator.terms[1], LowRank)
        assert np.any(np.asarray(operator.terms[1].b))
    np.testing.assert_allclose(model(OUTPUTS["nnx_lora_x"]), OUTPUTS["nnx_lora"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_they_can_be_inspected(name: str, unpacked: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(unpacked[name])]) == 0
    assert "layers quantized" in capsys.readouterr().out
