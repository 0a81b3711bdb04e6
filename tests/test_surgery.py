"""Surgery: rules, what is left alone, what is recorded, and that the original stays as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from any4_jax import choice, statistics, weights
from any4_jax.methods import NF4, Any4, Int, quantize
from any4_jax.methods.apply import apply_method
from any4_jax.models.tiny import random_llama
from any4_jax.nn.nnx import Any4Linear, Codes, Tables
from any4_jax.pytree import register_dataclass
from any4_jax.surgery import Axes, coverage, explain, linears, quantized_leaves, resolve
from any4_jax.walk import quantize_model

PATHS = ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "lm_head"]
NF, INT = NF4(group_size=16), Int(group_size=16)


@pytest.fixture(scope="module")
def model():
    return random_llama()


def test_the_first_matching_rule_decides() -> None:
    rules = [(r".*\.1\..*", None), (r".*mlp.*", INT)]
    assert resolve(PATHS, NF, rules) == {PATHS[0]: NF, PATHS[1]: INT}
    assert resolve(PATHS, NF, rules[::-1]) == {PATHS[0]: NF, PATHS[1]: INT, PATHS[2]: INT}


def test_no_method_leaves_the_rest_alone() -> None:
    assert resolve(PATHS, None, [(r".*up_proj", INT)]) == {PATHS[1]: INT, PATHS[2]: INT}


def test_the_head_is_skipped_until_it_is_named() -> None:
    assert "lm_head" not in resolve(PATHS, NF, None)
    assert resolve(PATHS, NF, [("lm_head", INT)])["lm_head"] == INT
    assert resolve(["model/lm_head/kernel", "a.embed_tokens.x", "my_lm_head"], NF, None) == {"my_lm_head": NF}


@pytest.mark.parametrize("pattern,message", [("up_proj", "matches none of the 4"), ("(", "not a regular expression")])
def test_a_rule_that_cannot_work_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(PATHS, NF, [(pattern, INT)])


def test_quantized_copy_and_untouched_original(model) -> None:
    before = {p: np.asarray(layer.kernel[...]) for p, layer in linears(model).items()}
    embedding = model.embed_tokens.embedding[...]
    new = quantize_model(model, NF, rules=[(r".*layers\.1\..*", None)])
    assert set(linears(model)) == set(before) and not quantized_leaves(model) and model.recipe is None
    for path, layer in linears(model).items():
        np.testing.assert_array_equal(layer.kernel[...], before[path])
    assert set(quantized_leaves(new)) == {p for p in before if p.startswith("layers.0.")}
    assert new.embed_tokens.embedding[...] is embedding
    assert new.layers[1].mlp.up_proj.kernel[...] is model.layers[1].mlp.up_proj.kernel[...]
    new.norm.scale[...] = jnp.zeros_like(new.norm.scale[...])
    assert np.asarray(model.norm.scale[...]).any()


def test_the_head_is_quantized_where_named(model) -> None:
    new = quantize_model(model, None, rules=[("lm_head", INT)])
    assert list(quantized_leaves(new)) == ["lm_head"]
    tokens = np.arange(6, dtype=np.int32)[None]
    assert np.abs(np.asarray(new(tokens) - model(tokens))).max() > 1e-4


def test_a_model_computes_with_its_dequantized_weights(model) -> None:
    new = quantize_model(model, NF)
    dense = nnx.merge(*nnx.split(model))
    for path, weight in quantized_leaves(new).items():
        linears(dense)[path].kernel[...] = weights.dequantize(weight).T
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    np.testing.assert_allclose(new(tokens), dense(tokens), rtol=1e-4, atol=1e-4)


def test_each_layer_is_what_quantize_makes_of_it(model) -> None:
    path = "layers.1.mlp.down_proj"
    new = quantized_leaves(quantize_model(model, None, rules=[(path.replace(".", r"\."), NF)]))[path]
    alone = quantize(linears(model)[path].kernel[...].T, NF)
    for ours, theirs in zip(jax.tree.leaves(new), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_recipe_and_progress(model) -> None:
    seen = []
    rules = [(r".*up_proj", INT), (r".*layers\.1\..*", None)]
    new = quantize_model(model, NF, rules=rules, progress=lambda *step: seen.append(step))
    assert new.recipe.rules[:2] == tuple(rules) and new.recipe.rules[-1] == (".*", NF)
    assert any("lm_head" in pattern and method is None for pattern, method in new.recipe.rules)
    assert {path: method for path, method, _ in new.recipe.linears} == {
        path: INT if "up_proj" in path else NF for path in quantized_leaves(new)
    }
    assert [(done, total) for done, total, _ in seen] == [(i + 1, len(seen)) for i in range(len(seen))]
    assert [path for *_, path in seen] == list(quantized_leaves(new)) or len(seen) == len(quantized_leaves(new))
    assert hash(new.recipe) == hash(dataclasses.replace(new.recipe))


@pytest.mark.parametrize("given,resolved", [(True, "second_moment"), (False, "None")], ids=["statistics", "none"])
def test_auto_is_recorded_as_what_it_came_to(given: bool, resolved: str) -> None:
    seen = statistics.from_activations(np.ones((2, 8), np.float32)) if given else None
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)

    def notes(**fields):
        return apply_method(w, Any4(solver="lloyd", max_iter=1, refit=False, **fields), seen).notes

    assert notes() == {"sample_weight": resolved}
    assert notes(sample_weight=None) == {"sample_weight": "None"}
    if given:
        assert notes(sample_weight="mean_abs") == {"sample_weight": "mean_abs"}


def test_a_named_sample_weight_without_statistics_names_the_path(model) -> None:
    method = Any4(sample_weight="abs_mean")
    k = linears(model)["layers.0.self_attn.q_proj"].in_features
    stats = {"layers.0.self_attn.q_proj": statistics.from_activations(np.ones((2, k), np.float32))}
    with pytest.raises(ValueError, match=r"^layers\.0\.self_attn\.k_proj: got sample_weight='abs_mean' without"):
        quantize_model(model, method, stats=stats, rules=[(r".*(gate|up|down)_proj", None)])


def test_plain_trees(rng: np.random.Generator) -> None:
    """A kernel is [K, N], a weight is [N, K]; vectors, stacks and other names stay."""
    kernel = rng.normal(size=(32, 6)).astype(np.float32)
    tree = {
        "a": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(6)},
        "b": [{"weight": jnp.asarray(kernel.T)}],
        "norm": {"weight": jnp.ones(32)},
        "embedding": jnp.ones((8, 32)),
        "lm_head": {"kernel": jnp.ones((32, 8))},
    }
    new = quantize_model(tree, NF)
    assert set(quantized_leaves(new)) == {"a.kernel", "b.0.weight"}
    assert new["a"]["kernel"].shape == new["b"][0]["weight"].shape == (6, 32)
    np.testing.assert_array_equal(new["a"]["kernel"].codes, new["b"][0]["weight"].codes)
    assert new["a"]["bias"] is tree["a"]["bias"] and new["lm_head"] is not None
    assert new["lm_head"]["kernel"] is tree["lm_head"]["kernel"]
    assert isinstance(tree["a"]["kernel"], jax.Array)


def test_nothing_to_quantize_is_refused(model) -> None:
    with pytest.raises(ValueError, match="found 15 linear layers and the rules leave all of them alone"):
        quantize_model(model, None)
    with pytest.raises(ValueError, match="found 0 linear layers"):
        quantize_model({"x": jnp.ones(3)}, NF)


def test_any4_linear_is_its_weight_and_bias(rng: np.random.Generator) -> None:
    layer = nnx.Linear(24, 5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(5.0)
    weight = quantize(layer.kernel[...].T, NF)
    new = Any4Linear.of(weight, bias=layer.bias[...], dtype=layer.dtype)
    x = jnp.asarray(rng.normal(size=(3, 24)), jnp.float32)
    assert (new.in_features, new.out_features, new(x).dtype) == (24, 5, jnp.bfloat16)
    expected = np.asarray(x) @ np.asarray(weights.dequantize(weight)).T + np.arange(5)
    np.testing.assert_allclose(np.asarray(new(x), np.float32), expected, atol=0.05)


def test_gradients_reach_tables_and_never_codes(rng: np.random.Generator) -> None:
    new = Any4Linear.of(quantize(jnp.asarray(rng.normal(size=(5, 24)), jnp.float32), NF))
    x = jnp.asarray(rng.normal(size=(3, 24)), jnp.float32)
    slopes = nnx.grad(lambda m: (m(x) ** 2).sum(), argnums=nnx.DiffState(0, Tables))(new)
    assert all(np.asarray(g, np.float32).any() for g in jax.tree.leaves(slopes))
    assert not jax.tree.leaves(nnx.state(new, nnx.Param))
    assert all(leaf.dtype == jnp.uint8 for leaf in jax.tree.leaves(nnx.state(new, Codes)))


def test_explain_is_for_where_the_weights_are(model, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = quantize_model(model, NF4(group_size=16))
    assert explain(quantized).startswith("platform cpu, ")
    monkeypatch.setattr(choice, "default_platform", lambda: "cuda")
    loose = explain(quantized)
    assert loose.startswith("platform cuda, ") and "cpu: it runs on cpu, not on cuda" in loose
    graphdef, state = nnx.split(quantized)
    on_cpu = nnx.merge(graphdef, jax.device_put(state, jax.devices("cpu")[0]))
    assert explain(on_cpu).startswith("platform cpu, ") and "not on cuda" not in explain(on_cpu)


@pytest.mark.parametrize(
    "rules,message",
    [
        ({"lm_head": NF}, "got rules of type dict, need pairs of a regex and a method or None"),
        ("lm_head", "got rules of type str, need pairs"),
        (["lm_head"], "got the rule 'lm_head', need pairs"),
        ([("lm_head", NF, None)], "got the rule .*, need pairs"),
        ([("lm_head", "nf4")], "whose second part is no method, need pairs"),
        ([(3, NF)], "got 3 as a regular expression of paths, need a str"),
    ],
)
def test_rules_that_are_no_pairs_are_refused(rules, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        resolve(PATHS, NF, rules)


@pytest.mark.parametrize("rows", [0, -1, 1.5, True])
def test_explain_needs_rows_and_layers(model, rows) -> None:
    with pytest.raises(ValueError, match=f"got rows={rows}, need an integer of at least 1"):
        explain(model, rows=rows)
    with pytest.raises(ValueError, match="got a NoneType without dense layers, need a model"):
        explain(None)


def test_explain_refuses_what_is_no_platform(model) -> None:
    with pytest.raises(ValueError, match="got platform='gpu', need one of 'cpu', 'cuda', 'rocm', 'tpu'"):
        explain(model, platform="gpu")


class Heads(nnx.Module):
    """A kernel of which only an equation tells what is contracted, and it isn't said."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.heads = nnx.Linear(64, 64, rngs=rngs), nnx.Param(jnp.ones((64, 4, 32)))
        self.embedding, self.small = nnx.Embed(80, 64, rngs=rngs), nnx.Param(jnp.ones((8, 8)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("bd,dnh->bnh", self.first(x), self.heads[...])


def test_what_is_left_is_said(recwarn) -> None:
    net, whole = Heads(nnx.Rngs(0)), r"1 of 3 matrices, 23.5 % of their weights"
    left = r"heads \(Heads \[64, 4, 32\]\)"
    with pytest.warns(
        UserWarning, match=rf"quantized {whole}; left, and named by no rule: {left}; pass example inputs"
    ):
        new = quantize_model(net, NF)
    with pytest.raises(ValueError, match=rf"{whole}; .*{left}; pass"):
        quantize_model(net, NF, strict=True)
    told = str(coverage(new))
    assert told.startswith("1 of 3 matrices, 23.5 % of their weights, are quantized; left: ")
    assert "embedding (Embed [80, 64])" in told and "small" not in told and told in explain(new)
    recwarn.clear()
    x = jnp.ones((1, 64))
    quantize_model(net, NF, rules=[("heads", None)], strict=True)
    whole_net = quantize_model(net, NF, inputs=(x,), strict=True)
    assert not recwarn.list and set(quantized_leaves(whole_net)) == {"first", "heads"}
    with pytest.raises(ValueError, match=rf"'he.*' matches {left}, of which nothing tells what is contracted; pass"):
        quantize_model(net, NF, rules=[("he.*", NF)])
    with pytest.raises(ValueError, match=r"found 0 linear layers .*; it has w \(array \[4, 8\]\): name each by a"):
        quantize_model({"w": jnp.ones((4, 8)), "scale": 1.0}, NF)
    with pytest.raises(ValueError, match=rf"{left}; no product reads it in a call with the given inputs; name each"):
        quantize_model(net, NF, inputs={"inputs": x, "method": "first"}, strict=True)


@pytest.mark.parametrize("name,shape,read,meant", [("weight", (8, 4), "N, K", "KN"), ("kernel", (4, 8), "K, N", "NK")])
def test_a_matrix_that_its_bias_contradicts_is_refused(name, shape, read, meant) -> None:
    tree = {"a": {name: jnp.ones(shape), "bias": jnp.ones(4)}}
    with pytest.raises(
        ValueError, match=rf"is read as \[{read}\], and its bias has 4 entries; declare Axes\('{meant}'"
    ):
        quantize_model(tree, NF)
    (new,) = quantized_leaves(quantize_model(tree, None, rules=[(rf"a\.{name}", NF, Axes(meant))])).values()
    assert new.shape == (4, 8)


@register_dataclass
@dataclasses.dataclass
class Foreign:
    """A model of a library whose modules are trees."""

    weight: jax.Array


def test_a_model_of_another_library_is_refused_but_for_declared_kernels() -> None:
    model = Foreign(jnp.ones((4, 8)))
    for tree in (model, {"layers": [model]}):
        with pytest.raises(TypeError, match="got a Foreign, .* whose code knows no operators; pass a nested dict"):
            quantize_model(tree, NF)
    assert quantize_model(model, None, rules=[("weight", NF, Axes("NK"))]).weight.shape == (4, 8)
