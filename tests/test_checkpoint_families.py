"""One form of manifest for every model: families from outside, what contradicts itself, notes, and schema 1 renewed."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import toy_family
from equality import assert_same
from flax import nnx
from float_models import FLOAT, NF

import any4_jax as a4
from any4_jax.checkpoint import store
from any4_jax.checkpoint.contents import current
from any4_jax.cli import main
from any4_jax.methods import Int
from any4_jax.methods.spec import method_from_json, method_to_json
from any4_jax.models import families
from any4_jax.models.base import Decoder
from any4_jax.models.llama import Llama
from any4_jax.models.tiny import random_llama
from any4_jax.surgery import quantized_leaves

GOLDEN = Path(__file__).parent / "golden"
KEYS = {"family", "config", "dtype", "tree", "recipe", "cache", "model"}
TOKENS = np.arange(6, dtype=np.int32)[None]


class Loud(Llama):
    """A subclass that computes something else, of no family."""

    def embed(self, tokens, positions):
        return super().embed(tokens, positions) * 2


def toy() -> toy_family.Toy:
    return toy_family.Toy(toy_family.read_config(toy_family.CONFIG_JSON, None), rngs=nnx.Rngs(0))


def copied(path: Path, out: Path, edit) -> Path:
    """The checkpoint at `out` with another content."""
    arrays, content, files = store.read(path)
    edit(content)
    store.write(out, arrays, content, files)
    return out


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "c"
    a4.save(path, a4.quantize_model(random_llama(), NF))
    return path


@pytest.mark.parametrize("family", ["llama", "linen", "nnx", "hf_flax", "tree"])
def test_every_content_has_the_same_keys(family: str) -> None:
    make = {"llama": random_llama, "hf_flax": FLOAT["hf"], "tree": lambda: {"a": [jnp.ones(2)]}} | FLOAT
    _, content = a4.to_arrays(make[family]())
    assert set(content) == KEYS and content["family"] == family
    assert (content["config"] is None) == (content["dtype"] is None) == (family in ("linen", "nnx", "tree"))
    assert json.loads(json.dumps(content))["tree"] == content["tree"]


def test_a_family_from_outside_is_saved_and_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.FAMILIES, "toy", toy_family.TOY)
    model = a4.quantize_model(toy(), NF, rules=[("wte", Int(8)), (r"h\.0\.out", None)])
    a4.save(tmp_path / "c", model)
    back = a4.load(tmp_path / "c")
    assert type(back) is toy_family.Toy and back.config == model.config and back.recipe == model.recipe
    assert nnx.split(back)[0] == nnx.split(model)[0]
    assert_same(nnx.state(back), nnx.state(model))
    np.testing.assert_array_equal(back(TOKENS), model(TOKENS))
    assert_same(nnx.state(a4.load(tmp_path / "c", into=toy())), nnx.state(model))
    with pytest.raises(ValueError, match="it holds a Toy of this library, and `into` is an NNX module .Llama.; omit"):
        a4.load(tmp_path / "c", into=random_llama())
    monkeypatch.delitem(families.FAMILIES, "toy")
    with pytest.raises(
        ValueError,
        match=r"c: got family 'toy', and the registered families are llama, .*; register it, or upgrade any4_jax$",
    ):
        a4.load(tmp_path / "c")


def test_no_family_has_the_name_of_another_kind_of_content() -> None:
    for name in families.WITHOUT_FAMILY:
        with pytest.raises(ValueError, match=f"got family name '{name}', which checkpoints use"):
            families.register(dataclasses.replace(toy_family.TOY, name=name))
    assert set(families.FAMILIES) & set(families.WITHOUT_FAMILY) == set()


def test_a_decoder_that_no_family_has_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = Loud(random_llama().config, rngs=nnx.Rngs(0))
    for function in (lambda model: a4.save(tmp_path / "c", model), a4.to_arrays):
        with pytest.raises(TypeError, match="got a Loud, which belongs to no family") as error:
            function(model)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "c").exists()


def test_weights_of_another_dtype_than_the_activations_stay_as_they_are(tmp_path: Path) -> None:
    model = Llama(random_llama().config, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    a4.save(tmp_path / "c", model)
    back = a4.load(tmp_path / "c")
    assert back.dtype == jnp.bfloat16 and back.norm.scale.get_value().dtype == jnp.float32
    assert_same(nnx.state(back), nnx.state(model))


def drop(content: dict) -> None:
    del content["tree"]["dict"]["norm"]


def swap(content: dict) -> None:
    blocks = content["tree"]["dict"]["layers"]["dict"]
    for block in blocks.values():
        attention = block["dict"]["self_attn"]["dict"]
        attention["k_proj"], attention["q_proj"] = attention["q_proj"], attention["k_proj"]


def widen(content: dict) -> None:
    content["config"]["vocab_size"] += 1


@pytest.mark.parametrize(
    "edit, said",
    [
        (drop, "they lack norm.scale"),
        (swap, r"k_proj.kernel is \[48, 48\], need \[16, 48\]"),
        (widen, r"embed_tokens.embedding is \[128, 48\], need \[129, 48\]"),
    ],
)
def test_a_decoder_that_contradicts_itself_is_refused(edit, said: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"don't fit a Llama of its own config \(.*{said}.*contradicts itself"
    ) as error:
        a4.load(copied(saved, tmp_path / "c", edit))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("key", sorted(KEYS - {"model", "cache"}))
def test_a_content_that_lacks_a_key_is_refused(key: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"the model's description lacks {key}; save it again"):
        a4.load(copied(saved, tmp_path / "c", lambda content: content.pop(key)))


def test_notes_come_back_as_they_were_and_inspect_tells_their_range(tmp_path: Path, capsys) -> None:
    model = a4.quantize_model(random_llama(), NF)
    (first, *rest), noted = model.recipe.linears, (("alpha", 0.25), ("clipped", True), ("each", (1, 2)), ("n", 3))
    linears = ((*first[:2], noted), *((*linear[:2], (("alpha", 0.75), ("clipped", True))) for linear in rest))
    model.recipe = dataclasses.replace(model.recipe, linears=linears)
    a4.save(tmp_path / "c", model)
    back = a4.load(tmp_path / "c")
    assert back.recipe == model.recipe and hash(back.recipe) == hash(model.recipe)
    assert main(["inspect", str(tmp_path / "c")]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("nf4: ")]
    assert len(told) == 1
    assert told[0].endswith("(resolved: clipped=True); alpha 0.25 to 0.75; each 1 to 2; n 3")


def filled(content):
    """A manifest's content, in which fields that methods got later have their defaults."""
    if isinstance(content, list):
        return [filled(each) for each in content]
    if not isinstance(content, dict):
        return content
    if set(content) >= {"method", "fields"}:
        content = {**content, **method_to_json(method_from_json(content))}
    return {key: filled(value) for key, value in content.items()}


@pytest.mark.parametrize("name", ["own", "hf_flax"])
def test_a_checkpoint_of_schema_1_is_saved_as_schema_2(name: str, tmp_path: Path) -> None:
    if name == "hf_flax":
        pytest.importorskip("transformers.models.llama.modeling_flax_llama", reason="needs transformers 4")
    shutil.unpack_archive(GOLDEN / f"schema1_{name}.zip", tmp_path / "old")
    model = a4.load(tmp_path / "old")
    a4.save(tmp_path / "new", model)
    old, new = (store.read_manifest(tmp_path / which).content for which in ("old", "new"))
    assert "kind" in old and set(new) == KEYS
    told = {"cache": None, **filled(current(old))}
    assert {key: told[key] for key in KEYS - {"tree"}} == {key: new[key] for key in KEYS - {"tree"}}
    assert_same(quantized_leaves(a4.load(tmp_path / "new")), quantized_leaves(model))


def test_a_spec_of_schema_1_still_rebuilds_arrays(tmp_path: Path) -> None:
    shutil.unpack_archive(GOLDEN / "schema1_own.zip", tmp_path / "old")
    model = a4.load(tmp_path / "old")
    arrays, _ = a4.to_arrays(model)
    old = {
        "kind": "tree",
        "tree": a4.to_arrays(model)[1]["tree"],
        "model": {"kind": "nnx", "class": "Llama"},
        "recipe": store.read_manifest(tmp_path / "old").content["recipe"],
    }
    back = a4.from_arrays(arrays, old, into=model)
    assert isinstance(back, Decoder) and back.recipe == model.recipe
    assert_same(nnx.state(back), nnx.state(model))
