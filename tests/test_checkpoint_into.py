"""Checkpoints of Hugging Face Flax models, Linen pairs, NNX modules and trees, loaded into models, and plain Orbax."""

import dataclasses
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from float_models import (
    ABSTRACT,
    CONFIG,
    FLOAT,
    NF,
    LinenNet,
    NNXNet,
    abstract_linen,
    assert_same_contents,
    linen_pair,
    run,
)
from new_process import run_python

import any4_jax as a4
from any4_jax.checkpoint import store
from any4_jax.cli import main
from any4_jax.methods import Int
from any4_jax.models import flax_llama
from any4_jax.models.tiny import random_llama
from any4_jax.surgery import container_of, quantized_leaves, recipe_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict:
    """By kind: (the quantized model, the folder of its checkpoint)."""
    folder, models = tmp_path_factory.mktemp("saved"), {}
    for kind, make in FLOAT.items():
        model = a4.quantize_model(make(), Int(8), rules=[(r".*(first|q_proj|up_proj)", NF)])
        a4.save(folder / kind, model)
        models[kind] = (model, folder / kind)
    return models


NEW_PROCESS = """
import sys
import numpy as np
import any4_jax as a4
from float_models import abstract_linen, abstract_nnx, run
paths, out = dict(zip(("linen", "nnx", "hf"), sys.argv[1:4])), sys.argv[4]
into = {"linen": abstract_linen(), "nnx": abstract_nnx(), "hf": None}
np.savez(out, **{kind: run(a4.load(paths[kind], into=into[kind])) for kind in paths})
"""


def test_every_kind_computes_the_same_in_a_new_process(saved, tmp_path) -> None:
    run_python(NEW_PROCESS, *(saved[kind][1] for kind in ("linen", "nnx", "hf")), tmp_path / "out.npz")
    found = np.load(tmp_path / "out.npz")
    for kind, (model, _) in saved.items():
        np.testing.assert_allclose(found[kind], run(model), rtol=1e-6, err_msg=kind)


@pytest.mark.parametrize("kind", FLOAT)
@pytest.mark.parametrize("into", ["float", "quantized", "abstract"])
def test_whatever_the_model_is_it_gets_the_contents(kind: str, into: str, saved) -> None:
    model, path = saved[kind]
    target = {"float": FLOAT[kind], "quantized": lambda: model, "abstract": ABSTRACT[kind]}[into]()
    before = quantized_leaves(target)
    back = a4.load(path, into=target)
    assert_same_contents(back, model)
    assert recipe_of(back) == recipe_of(model) is not None
    assert set(quantized_leaves(target)) == set(before)
    assert type(back) is type(model)


def test_a_float_layer_takes_the_place_of_a_quantized_one(saved, tmp_path) -> None:
    a4.save(tmp_path / "float", linen_pair())
    back = a4.load(tmp_path / "float", into=saved["linen"][0])
    assert_same_contents(back, linen_pair())
    assert recipe_of(back) is None
    np.testing.assert_allclose(run(back), run(linen_pair()), rtol=1e-5, atol=1e-6)
    assert type(a4.load(tmp_path / "float", into=abstract_linen())[0]) is LinenNet
    a4.save(tmp_path / "nnx", NNXNet(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"first is quantized in the model, .* pass a float model$"):
        a4.load(tmp_path / "nnx", into=saved["nnx"][0])


def test_shared_layers_stay_shared_and_random_numbers_are_those_of_the_model(saved) -> None:
    target = NNXNet(nnx.Rngs(7))
    back = a4.load(saved["nnx"][1], into=target)
    assert back.first is back.rest[0]
    np.testing.assert_array_equal(
        jax.random.key_data(back.dropout.rngs.key.get_value()), jax.random.key_data(target.dropout.rngs.key.get_value())
    )


def test_without_a_module_there_are_arrays_and_operators(saved) -> None:
    model, path = saved["linen"]
    tree = a4.load(path)
    assert set(tree) == {"params", "batch_stats"} and isinstance(tree["params"]["first"]["kernel"], a4.QuantizedTensor)
    module, variables = a4.load(path, into=(LinenNet(), None))
    np.testing.assert_array_equal(run((module, variables)), run(model))


def test_a_hugging_face_model_is_made_anew_whole(saved) -> None:
    model, path = saved["hf"]
    back = a4.load(path)
    assert type(back).__name__ == "FlaxLlamaForCausalLM" and flax_llama.is_repaired(back)
    assert back.config.to_dict() == model.config.to_dict() and back.dtype == model.dtype
    assert back.generation_config.pad_token_id == 0
    assert_same_contents(back, model)


def test_repairs_are_not_lost_silently(saved) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf-flax is not installed")
    plain = transformers.FlaxLlamaForCausalLM(transformers.LlamaConfig(**CONFIG), _do_init=False)
    with pytest.raises(ValueError, match="lacks its repairs"):
        a4.load(saved["hf"][1], into=plain)


def test_boxes_are_put_back_around_all_arrays(saved) -> None:
    for into in (abstract_linen(), linen_pair(), saved["linen"][0]):
        kernel = a4.load(saved["linen"][1], into=into)[1]["params"]["first"]["kernel"]
        assert kernel.codes.names == kernel.scales.names[:1] + ("embed",) == ("mlp", "embed")
        assert isinstance(kernel.lut, linen.Partitioned)
    assert isinstance(a4.load(saved["linen"][1])["params"]["first"]["kernel"].codes, jax.Array)


def test_a_llama_goes_into_a_llama_of_its_config(tmp_path) -> None:
    model = a4.quantize_model(random_llama(), NF)
    a4.save(tmp_path / "c", model)
    abstract = nnx.eval_shape(lambda: type(model)(model.config, rngs=nnx.Rngs(0)))
    assert_same_contents(a4.load(tmp_path / "c", into=abstract), model)
    other = dataclasses.replace(model.config, rope_theta=5.0)
    with pytest.raises(ValueError, match=r"its Llama has rope_theta=10000\.0, and `into` has 5\.0"):
        a4.load(tmp_path / "c", into=nnx.eval_shape(lambda: type(model)(other, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match=r"a Llama of this library, and `into` is a tree of arrays \(dict\)"):
        a4.load(tmp_path / "c", into={})
    arrays, spec = a4.to_arrays(model)
    assert_same_contents(a4.from_arrays(arrays, spec, into=abstract), model)


TWO_DEVICES = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import any4_jax as a4
from float_models import LinenNet, abstract_linen, run
from flax.core import meta

assert len(jax.devices()) == 2
mesh = jax.make_mesh((2,), ("m",), axis_types=(AxisType.Auto,))
net, abstract = abstract_linen()
at = lambda leaf: NamedSharding(mesh, P(None, "m") if leaf.shape == (24, 24) else P())
into = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at(s)), meta.unbox(abstract))
model = a4.load(sys.argv[1], into=(net, into))
first, last = (model[1]["params"][name]["kernel"] for name in ("first", "last"))
assert first.codes.sharding.spec == P("m", None) and first.codes.addressable_shards[0].data.shape == (12, 12)
assert last.codes.sharding.is_fully_replicated and len(last.codes.devices()) == 2
np.testing.assert_allclose(run(model), np.load(sys.argv[2]), rtol=1e-5, atol=1e-6)
a4.save(sys.argv[3], model)
"""


def test_one_device_to_two_and_back(saved, tmp_path) -> None:
    model, path = saved["linen"]
    np.save(tmp_path / "y.npy", run(model))
    run_python(TWO_DEVICES, path, tmp_path / "y.npy", tmp_path / "two", devices=2)
    back = a4.load(tmp_path / "two", into=linen_pair())
    assert_same_contents(back, model)
    assert recipe_of(back) == recipe_of(model)
    assert {d for leaf in jax.tree.leaves(back[1]) for d in leaf.devices()} == {jax.devices()[0]}


@pytest.mark.parametrize("kind", FLOAT)
def test_orbax_alone_keeps_the_arrays_of_a_model(kind: str, saved, tmp_path) -> None:
    model, _ = saved[kind]
    arrays, spec = a4.to_arrays(model)
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"params": arrays, "step": 7})
        back = checkpointer.restore(tmp_path / "c")
    assert back["step"] == 7
    spec = json.loads((tmp_path / "spec.json").read_text())
    assert_same_contents(a4.from_arrays(back["params"], spec), container_of(model).tree(model))
    again = a4.from_arrays(back["params"], spec, into=ABSTRACT[kind]())
    assert_same_contents(again, model)
    assert recipe_of(again) == recipe_of(model)


def test_orbax_alone_reads_the_arrays_of_our_checkpoint(saved) -> None:
    model, path = saved["linen"]
    arrays = path / store.read_manifest(path).data / "arrays"
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.restore(arrays)
    kernel = container_of(model).tree(model)["params"]["first"]["kernel"]
    for field in ("codes", "lut", "scales"):
        np.testing.assert_array_equal(found[f"params.first.kernel/{field}"], getattr(kernel, field))


@pytest.mark.parametrize("kind, layer", [("linen", "params.first.kernel"), ("hf", "q_proj.kernel"), ("nnx", "first")])
def test_inspect_names_the_method_of_each_layer(kind: str, layer: str, saved, capsys) -> None:
    assert main(["inspect", str(saved[kind][1])]) == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if layer in line)
    assert " nf4 " in line and "QuantizedTensor" not in printed
