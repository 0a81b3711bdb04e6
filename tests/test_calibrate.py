"""Calibration: statistics equal numpy's on captured inputs, masking, the sequential walk, compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from any4_jax import surgery
from any4_jax.methods import NF4, Any4
from any4_jax.models.config import LlamaConfig
from any4_jax.models.tiny import random_llama, tiny
from any4_jax.statistics import AbsMax, Gathered, Moments
from any4_jax.walk import calibrate, quantize_model

NF, MOMENTS = NF4(group_size=16), Moments()


@pytest.fixture(scope="module")
def model():
    return random_llama()


def random_tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 128, (batch, length), dtype=np.int32)


@nnx.jit
def tapped(model, tokens: jax.Array) -> dict[str, jax.Array]:
    """{path of a linear: what enters it}, by running the model's blocks one after the other."""
    found: dict[str, jax.Array] = {}
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    x = model.embed(tokens, positions)
    for index, (layer, cache) in enumerate(zip(model.blocks, model.init_cache(*tokens.shape), strict=True)):
        taps: dict[str, jax.Array] = {}
        x, _ = layer(x, cache, positions, taps.__setitem__)
        for site in model.sites(index):
            found |= {f"layers.{index}.{linear}": taps[site.name] for linear in site.linears}
    return found | {"lm_head": model.head_input(x)}


def captured(model, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """{path of a linear: what enters it, [tokens, K]}."""
    return {path: np.asarray(x).reshape(-1, x.shape[-1]) for path, x in tapped(model, tokens).items()}


def assert_statistics(gathered: Gathered, x: np.ndarray, rtol: float = 1e-4) -> None:
    x, stats = x.astype(np.float64), gathered[Moments()]
    assert int(stats.count) == len(x)
    for name, of in (("mean", x), ("mean_abs", np.abs(x)), ("second_moment", x**2)):
        expected = of.mean(axis=0)
        np.testing.assert_allclose(getattr(stats, name), expected, rtol=rtol, atol=rtol * np.abs(expected).max())
    np.testing.assert_allclose(gathered[AbsMax()], np.abs(x).max(axis=0), rtol=rtol)


def test_statistics_equal_those_of_captured_inputs(model) -> None:
    tokens = random_tokens(2, 12)
    stats, inputs = calibrate(model, tokens), captured(model, tokens)
    assert set(stats) == set(inputs) == set(surgery.linears(model))
    for path, x in inputs.items():
        assert_statistics(stats[path], x)


def test_padding_is_masked_and_batches_add_up(model) -> None:
    """A ragged batch equals its rows run alone, whatever the number of rows in a batch."""
    rows = [random_tokens(1, n, seed=n)[0] for n in (4, 9)]
    together = calibrate(model, rows)
    alone = [captured(model, row[None]) for row in rows]
    for path, stats in together.items():
        assert_statistics(stats, np.concatenate([inputs[path] for inputs in alone]))
    apart = calibrate(model, rows, batch_size=1)
    for path, stats in apart.items():
        np.testing.assert_allclose(stats[MOMENTS].second_moment, together[path][MOMENTS].second_moment, rtol=1e-4)


def test_long_sequences_are_cut(model) -> None:
    tokens = random_tokens(1, 24)
    pieces = calibrate(model, tokens, seqlen=12)
    whole = calibrate(model, tokens.reshape(2, 12))
    for path, stats in pieces.items():
        np.testing.assert_array_equal(stats[MOMENTS].second_moment, whole[path][MOMENTS].second_moment)


def by_hand(model, tokens: np.ndarray, paths: list[str]):
    """`model` with the layers at `paths` quantized, and what enters its linears then."""
    rules = [("|".join(path.replace(".", r"\.") for path in paths), NF)]
    return captured(quantize_model(model, None, rules=rules), tokens)


@pytest.mark.slow
def test_sequential_is_the_walk_by_hand(model) -> None:
    """A site sees the model with every earlier site quantized, and its own and later ones as they were."""
    tokens = random_tokens(1, 12)
    stats, offline = calibrate(model, tokens, NF, sequential=True), calibrate(model, tokens)
    qkv = [f"layers.0.self_attn.{name}_proj" for name in "qkv"]
    first = [path for path in surgery.linears(model) if path.startswith("layers.0.")]
    np.testing.assert_array_equal(stats[qkv[0]][MOMENTS].second_moment, offline[qkv[0]][MOMENTS].second_moment)
    for path, quantized in (("layers.0.self_attn.o_proj", qkv), ("layers.1.self_attn.q_proj", first)):
        assert_statistics(stats[path], by_hand(model, tokens, quantized)[path])
        assert not np.allclose(stats[path][MOMENTS].second_moment, offline[path][MOMENTS].second_moment, rtol=1e-4)


def test_sequential_respects_rules(model) -> None:
    tokens = random_tokens(1, 12)
    stats = calibrate(model, tokens, NF, sequential=True, rules=[(r"layers\.0\..*", None)])
    offline = calibrate(model, tokens)
    path = "layers.1.self_attn.q_proj"
    np.testing.assert_array_equal(stats[path][MOMENTS].second_moment, offline[path][MOMENTS].second_moment)


def test_sequential_takes_the_rules_of_quantize_model(model) -> None:
    tokens = random_tokens(1, 12)
    stats = calibrate(model, tokens, NF, sequential=True, rules=[("embed_tokens", NF)])
    path = "layers.1.self_attn.q_proj"
    without = calibrate(model, tokens, NF, sequential=True)
    np.testing.assert_array_equal(stats[path][MOMENTS].second_moment, without[path][MOMENTS].second_moment)


def test_sequential_is_the_methods_choice(model) -> None:
    assert Any4.paper().sequential and not Any4().sequential
    tokens = random_tokens(1, 12)
    offline = calibrate(model, tokens)
    path = "layers.1.mlp.down_proj"
    np.testing.assert_array_equal(calibrate(model, tokens, NF)[path][AbsMax()], offline[path][AbsMax()])


def test_text_goes_through_the_tokenizer() -> None:
    stories = tiny()
    text = "Once upon a time there was a small cat."
    stats = calibrate(stories, text)
    tokens = np.asarray(stories.tokenizer.encode(text))
    assert int(stats["layers.0.self_attn.q_proj"][MOMENTS].count) == len(tokens)
    assert "lm_head" not in stats or not stories.config.tie_word_embeddings


def test_progress_is_told_after_each_block(model) -> None:
    seen: list[tuple] = []
    calibrate(model, random_tokens(1, 12), progress=lambda *step: seen.append(step))
    assert seen == [(1, 2, "layers.0"), (2, 2, "layers.1")]


DEEP = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=40, num_hidden_layers=12, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=32,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [NF4(group_size=8), Any4(group_size=8, bits=2, max_iter=9, refit=False)], ids=["nf4", "any4"]
)
def test_a_deep_model_compiles_a_program_for_each_shape(method, count_compiles) -> None:
    model = random_llama(DEEP)
    shapes = {layer.kernel[...].shape for path, layer in surgery.linears(model).items() if path != "lm_head"}
    tokens = random_tokens(2, 7) % 64
    with count_compiles() as compiles:
        stats = calibrate(model, tokens, method)
        new = quantize_model(model, method, stats=stats)
        jax.block_until_ready(jax.tree.leaves(nnx.state(new)))
    assert len(surgery.quantized_leaves(new)) == DEEP.num_hidden_layers * 7
    assert compiles.count <= len(shapes) + 5, compiles.names
