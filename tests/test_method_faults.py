"""Faults of methods from outside: each is named in a sentence, where it is found."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from toy_methods import EvenInputs, FitNorms, Nested

from any4_jax.checkpoint import load, save
from any4_jax.methods import NF4, Int, on_block
from any4_jax.models.tiny import random_llama
from any4_jax.surgery import quantized_leaves
from any4_jax.walk import quantize_model

NF = NF4(group_size=16)
TOKENS = np.random.default_rng(0).integers(0, 128, (3, 12), dtype=np.int32)


@pytest.fixture(scope="module")
def model():
    return random_llama()


class Wrong(EvenInputs):
    """A site method with a fault."""

    def apply(self, site, gathered):
        made = super().apply(site, gathered)
        first, *_ = made.results
        return {
            "results": dataclasses.replace(made, results={first: made.results[first]}),
            "operators": dataclasses.replace(made, results={p: one.operator for p, one in made.results.items()}),
            "nothing": None,
            "factor": dataclasses.replace(made, input_scale=made.input_scale * jnp.nan),
        }[self.name]


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("results", ValueError, r"results.apply gave results for .* need one for each of"),
        ("operators", TypeError, "operators.apply returned a QuantizedTensor, need a Result"),
        ("nothing", TypeError, "nothing.apply returned a NoneType, need a SiteResult"),
        ("factor", ValueError, "input_scale has factors that are not positive and finite"),
    ],
)
def test_a_site_method_at_fault_is_told_so(fault, error, words, model) -> None:
    method = type("Faulty", (Wrong,), {"name": fault})(Int(8, group_size=16))
    with pytest.raises(error, match=words):
        quantize_model(model, method, data=TOKENS)


@pytest.mark.parametrize("method", [EvenInputs(), FitNorms()])
def test_the_matrix_that_holds_nan_is_named_by_methods_of_several(method) -> None:
    broken = random_llama()
    kernel = broken.layers[0].self_attn.k_proj.kernel
    kernel.set_value(kernel[...].at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match=r"^layers\.0\.self_attn\.k_proj: the weights hold NaN or infinite values"):
        quantize_model(broken, method, data=TOKENS)


class WrongBlock(FitNorms):
    """A block method with a fault."""

    def apply(self, block):
        made = super().apply(block)
        norm = "input_layernorm.scale"
        changed = {
            "nothing": None,
            "names": {},
            "shape": {**made.contents, norm: made.contents[norm][:5]},
            "values": {**made.contents, norm: made.contents[norm] * jnp.nan},
        }[self.name]
        return None if changed is None else dataclasses.replace(made, contents=changed)


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("nothing", TypeError, "nothing.apply returned a NoneType, need a BlockResult"),
        ("names", ValueError, r"layers\.0: names lost or added the contents .*input_layernorm.scale"),
        ("shape", ValueError, r"layers\.0\.input_layernorm\.scale: shape gave the shape \(5,\), need \(48,\)"),
        ("values", ValueError, r"layers\.0\.input_layernorm\.scale: values gave NaN or infinite values"),
    ],
)
def test_a_block_method_at_fault_is_told_so(fault, error, words, model) -> None:
    method = type("Faulty", (WrongBlock,), {"name": fault})(Int(8, group_size=16), 1)
    with pytest.raises(error, match=words):
        quantize_model(model, method, data=TOKENS)


def test_an_operator_of_another_shape_is_refused(model) -> None:
    turned = type("Turned", (NF4,), {"apply": lambda self, w, gathered: NF4.apply(self, w.T, gathered)})
    with pytest.raises(
        ValueError, match=r"nf4.apply gave an operator of shape \(48, 88\) for a matrix \[N, K\] = \(88, 48\)"
    ):
        quantize_model(model, None, rules=[(r".*up_proj", turned(group_size=16))])


def test_what_a_block_method_leaves_float_is_not_in_the_recipe(model) -> None:
    class Lazy(FitNorms):
        def apply(self, block):
            made = super().apply(block)
            kept = {"mlp.up_proj.kernel": block.contents["mlp.up_proj.kernel"]}
            return dataclasses.replace(made, contents={**made.contents, **kept})

    new = quantize_model(model, Lazy(Int(8, group_size=16), 1), data=TOKENS)
    assert len(quantized_leaves(new)) == 12
    assert {path for path, *_ in new.recipe.linears} == set(quantized_leaves(new))


def test_faults_of_methods_are_named(model) -> None:
    with pytest.raises(ValueError, match="of scope 'sites', need one of"):
        quantize_model(model, type("Typo", (EvenInputs,), {"scope": "sites"})(), data=TOKENS)


def test_a_method_outside_of_the_catalogue_is_refused_when_saved(model, tmp_path) -> None:
    new = quantize_model(model, Nested(NF, by_site=False), data=TOKENS)
    with pytest.raises(
        ValueError, match="the method Nested, .* methods.CATALOGUE has it under 'toy-nested'; add it there"
    ):
        save(tmp_path / "out", new)
    assert not list(tmp_path.iterdir())


def test_a_lifted_method_is_saved_as_the_one_that_it_lifts(model, tmp_path) -> None:
    save(tmp_path / "out", quantize_model(model, on_block(NF), data=TOKENS))
    assert {method for _, method, _ in load(tmp_path / "out").recipe.linears} == {NF}
