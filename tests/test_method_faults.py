"""Faults of methods from outside: each is named in a sentence, where it is found."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from toy_methods import EvenInputs, Nested

from any4_jax.checkpoint import load, save
from any4_jax.methods import NF4, Int, on_block
from any4_jax.models.tiny import random_llama
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
        ("results", ValueError, r"layers\.0\.mlp_in\(.*\): results gave results for .* need one for each of"),
        ("operators", TypeError, "operators.apply returned a QuantizedTensor, need a Result"),
        ("nothing", TypeError, "nothing.apply returned a NoneType, need a SiteResult"),
        ("factor", ValueError, "input_scale has factors that are not positive and finite"),
    ],
)
def test_a_site_method_at_fault_is_told_so(fault, error, words, model) -> None:
    method = type("Faulty", (Wrong,), {"name": fault})(Int(8, group_size=16))
    with pytest.raises(error, match=words):
        quantize_model(model, method, data=TOKENS)


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
