"""Training end to end: towards the float model's predictions, as stored, on text that it isn't judged on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same

import any4_jax as a4
from any4_jax.checkpoint.operators import recipe_from_spec, recipe_spec
from any4_jax.checkpoint.partial import PartialStore
from any4_jax.data.passages import in_common, sketch
from any4_jax.evaluation import perplexity
from any4_jax.methods import FP4, MX4
from any4_jax.methods.tune_steps import drawn
from any4_jax.models import from_tensors
from any4_jax.models.tiny import random_llama, random_tensors
from any4_jax.surgery import map_operators, quantized_leaves
from any4_jax.tuning.loop import Keeping, outside_of_blocks
from any4_jax.tuning.student import at_rest, blocks_of, stacks_of
from any4_jax.weights import Sum, dequantize, nonzeros

RNG = np.random.default_rng(3)
SETTINGS = {"steps": 24, "batch_size": 4, "seqlen": 12, "learning_rate": 0.01, "held_out": 0.25}


def with_integer_tables(path: str, leaf):
    """The same matrix, with a table of int8 for each row."""
    integers = jnp.round(leaf.lut * 127).astype(jnp.int8)
    lut = jnp.broadcast_to(integers, (leaf.shape[0], 16))
    return dataclasses.replace(leaf, lut=lut, scales=(leaf.scales / 127).astype(leaf.scales.dtype))


@pytest.fixture(scope="module")
def teacher():
    return random_llama()


@pytest.fixture(scope="module")
def student(teacher):
    return map_operators(a4.quantize_model(teacher, FP4(group_size=16)), with_integer_tables, r".*(?<!up_proj)")


@pytest.fixture(scope="module")
def tokens():
    return RNG.integers(0, 128, (32, 12), dtype=np.int32)


@pytest.fixture(scope="module")
def tuned(teacher, student, tokens):
    return a4.tune(student, teacher, tokens, **SETTINGS)


def kl(teacher, model, rows) -> float:
    """KL(float || model) in numpy, a mean over tokens."""
    p, q = (np.asarray(jax.nn.log_softmax(one(rows)), np.float64) for one in (teacher, model))
    return (np.exp(p) * (p - q)).sum(axis=-1).mean()


def test_the_divergence_falls_on_new_tokens_and_is_that_of_what_is_stored(teacher, student, tuned, tokens) -> None:
    told = dict(tuned.recipe.training[0].settings)
    draw = drawn(32, 24, 4, 0.25, 0)
    assert not set(draw.held.ravel()) & set(draw.order.ravel())
    held = tokens[np.unique(draw.held)]
    np.testing.assert_allclose(told["kl_before"], kl(teacher, student, held), rtol=1e-3)
    np.testing.assert_allclose(told["kl_after"], kl(teacher, tuned, held), rtol=1e-3)
    new = np.random.default_rng(9).integers(0, 128, held.shape, dtype=np.int32)
    assert told["kl_after"] < 0.9 * told["kl_before"] and kl(teacher, tuned, new) < 0.9 * kl(teacher, student, new)


def test_codes_stay_and_not_a_bit_is_added(student, tuned) -> None:
    before, after = quantized_leaves(student), quantized_leaves(tuned)
    assert {leaf.lut.dtype.name for leaf in after.values()} == {"int8", before["layers.0.mlp.up_proj"].lut.dtype.name}
    for path, old in before.items():
        new = after[path]
        assert_same(new.codes, old.codes)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(lambda a: (a.shape, a.dtype), old)
        assert (np.asarray(new.scales) != np.asarray(old.scales)).any()
        table = np.asarray(new.lut, np.float32)
        assert (np.diff(table) >= 0).all() and (table != np.asarray(old.lut, np.float32)).any()
    assert_same(tuned.embed_tokens.embedding[...], student.embed_tokens.embedding[...])


def test_a_training_that_leads_astray_leaves_the_model_as_it_was(teacher, student, tokens) -> None:
    new = a4.tune(student, teacher, tokens, **SETTINGS | {"learning_rate": 1e4})
    told = dict(new.recipe.training[0].settings)
    assert told["best_step"] == 0 and told["kl_after"] == told["kl_before"] > 0
    assert_same(quantized_leaves(new), quantized_leaves(student))


def test_a_killed_training_goes_on_to_the_same_bytes(tmp_path, teacher, student, tuned, tokens, monkeypatch) -> None:
    """On a mesh too."""
    done, keep, mesh = [], Keeping.keep, jax.make_mesh((1,), ("data",))

    def killed(self, state) -> None:
        keep(self, state)
        if int(state.at) == 15:
            raise KeyboardInterrupt

    def again(**changes):
        with PartialStore(tmp_path / "kept") as finished:
            arguments = {"progress": lambda at, *_: done.append(at), "finished": finished, "mesh": mesh}
            return a4.tune(student, teacher, tokens, **SETTINGS | arguments | changes)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Keeping, "keep", killed)
        again()
    assert done == list(range(1, 16))
    done.clear()
    assert_same(quantized_leaves(again()), quantized_leaves(tuned))
    assert done == list(range(16, 25))
    # Another seed is another training.
    done.clear()
    again(seed=1)
    assert done == list(range(1, 25))


def test_blocks_with_other_numbers_of_outliers_are_one_stack(teacher) -> None:
    """And come out of it as they went in."""

    def with_outliers(path: str, leaf):
        count = 3 if path.startswith("layers.0") else 5
        return Sum((leaf, nonzeros(jnp.diagflat(jnp.arange(1.0, count + 1), 88 - count)[: leaf.shape[0]])))

    model = map_operators(
        a4.quantize_model(teacher, None, rules=[(r".*down_proj", FP4(group_size=16))]), with_outliers, r".*down_proj"
    )
    stacks = stacks_of(model, teacher, 1, 4, norms=False)
    assert len(stacks) == 1
    made = blocks_of(model, stacks, [at_rest(stack.run, stack.contents) for stack in stacks])
    for block, new in zip(model.blocks, made.values(), strict=True):
        (old,), (again,) = (quantized_leaves(one).values() for one in (block, new))
        assert_same(again.terms[1], old.terms[1])
        np.testing.assert_array_equal(dequantize(again), dequantize(old))


def test_no_device_gets_the_blocks_of_the_models(teacher, student) -> None:
    """Beside the stacks that are trained; embedding and head are as they were."""
    for model in (teacher, student):
        program, leaves = outside_of_blocks(model)
        bare = program.model(leaves)
        assert sum(leaf.size for leaf in leaves) == 2 * 128 * 48 + 48
        x = bare.embed(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int32))
        assert_same(bare.head(x), model.head(x))


def test_what_was_trained_on_is_recorded_and_not_measured_on(teacher, tuned, tokens) -> None:
    assert tuned.recipe.training[0].tokens == tokens.size
    assert recipe_from_spec(recipe_spec(tuned.recipe)) == tuned.recipe
    assert repr(tuned.recipe) == "Recipe(14 linears: fp4, trained: end to end)"
    text = RNG.integers(0, 128, 400)
    seen = dataclasses.replace(tuned.recipe.training[0], passages=sketch([text[:150], text[200:]]))
    model = map_operators(tuned, lambda path, leaf: leaf)
    model.recipe = dataclasses.replace(tuned.recipe, training=(seen,))
    for ids, wrong in ((text[:48], False), (text[100:249], False), (text[20:149], True)):
        assert in_common(seen.passages, ids) == wrong
    with pytest.raises(ValueError, match="got a text with passages of 64 tokens that the model was trained on"):
        perplexity(model, text, seqlen=12, windows=20)
    measured = perplexity(model, text, seqlen=12, windows=20, allow_training_text=True)
    assert measured.value == perplexity(tuned, text, seqlen=12, windows=20).value


def test_what_can_not_be_trained_is_refused(teacher, student, tokens) -> None:
    other = random_llama(dataclasses.replace(teacher.config, max_position_embeddings=64))
    wide = from_tensors(teacher.config, random_tensors(teacher.config), jnp.bfloat16)
    fixed = map_operators(
        a4.quantize_model(teacher, MX4(group_size=32)), lambda _, leaf: dataclasses.replace(leaf, uniform=True)
    )
    for (model, float_model), changes, words in (
        ((student, other), {}, "of different configs, and the teacher has to be the float form"),
        ((student, wide), {}, "got a model of float32 and a teacher of bfloat16, .* load the float model with dtype="),
        ((student, student), {}, "got a teacher that is quantized, and a float one is needed"),
        ((teacher, teacher), {}, "got a model without quantized layers, which tune trains; quantize it first"),
        ((student, teacher), {"steps": 0}, "got steps=0 for EndToEnd, need a number greater than or equal to 1"),
        ((student, teacher), {"learning_rate": float("nan")}, "got learning_rate=nan for EndToEnd, need a finite"),
        ((student, teacher), {"seed": -1}, "got seed=-1 for EndToEnd, need a number"),
        ((fixed, teacher), {}, "got a model of which nothing can be trained: its tables are fixed"),
    ):
        with pytest.raises(ValueError, match=words):
            a4.tune(model, float_model, tokens, **SETTINGS | changes)
    tensors = random_tensors(teacher.config)
    tensors["model.norm.weight"] *= np.inf
    with pytest.raises(ValueError, match="got a divergence of nan before any step, and training needs finite"):
        a4.tune(student, from_tensors(teacher.config, tensors), tokens, **SETTINGS)
    with pytest.raises(ValueError, match="got one row of tokens, and at least 2 are needed"):
        a4.tune(student, teacher, tokens[:1], **SETTINGS)
    with pytest.raises(TypeError, match="got a int as the mesh; pass a jax.sharding.Mesh"):
        a4.tune(student, teacher, tokens, mesh=4)
    with pytest.raises(TypeError, match="got a dict as the model, and tune needs decoders"):
        a4.tune({}, teacher, tokens)
