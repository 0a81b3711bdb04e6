"""The divergence of two models: exact cases, float64 by hand, and the protocol's refusals."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax.evaluation import divergence, perplexity

VOCABULARY = 11


def random_model(seed: int, size: int = VOCABULARY):
    table = jnp.asarray(np.random.default_rng(seed).normal(0, 2, (VOCABULARY, size)), jnp.float32)
    return lambda tokens: table[tokens]


def random_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count)


def test_a_model_does_not_diverge_from_itself() -> None:
    found = divergence(random_model(1), random_model(1), random_ids(100), seqlen=10)
    assert (found.kl, found.top1, found.bootstrap(), found.flips, found.kl_quantile(1)) == (0.0, 1.0, 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="0.99 is the 99th percentile"):
        found.kl_quantile(99)
    np.testing.assert_array_equal(found.reference.window_nll, found.model.window_nll)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("seqlen", [2, 16, 1500])  # several windows in a batch, a last batch that repeats, one in each
def test_equals_float64_by_hand(seqlen: int, dtype) -> None:
    models, ids = (random_model(1), random_model(2)), random_ids(4000)
    first, second = (lambda tokens, model=model: model(tokens).astype(dtype) for model in models)
    found = divergence(first, second, ids, seqlen=seqlen)

    rows = ids[: len(ids) // seqlen * seqlen].reshape(-1, seqlen)
    logs = []
    for model in models:
        table = np.asarray(model(jnp.arange(VOCABULARY)).astype(dtype), np.float64)
        logs.append((table - np.log(np.exp(table).sum(axis=1, keepdims=True)))[rows[:, :-1]])
    p, q = logs
    np.testing.assert_allclose(found.window_kl, (np.exp(p) * (p - q)).sum(axis=-1).mean(axis=1), rtol=3e-6)
    np.testing.assert_allclose(found.window_top1, (p.argmax(-1) == q.argmax(-1)).mean(axis=1), rtol=1e-6)
    assert found.kl == found.window_kl.mean() and found.top1 == found.window_top1.mean()

    by_token = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0)
    np.testing.assert_allclose(found.position_kl, by_token.mean(axis=0), rtol=3e-6)
    np.testing.assert_allclose(found.position_top1, (p.argmax(-1) == q.argmax(-1)).mean(axis=0), rtol=1e-6)
    for share in (0.5, 0.99, 1):
        assert found.kl_quantile(share) == pytest.approx(np.quantile(by_token, share), rel=3e-6)
    right = [each.argmax(-1) == rows[:, 1:] for each in (p, q)]
    assert found.lost == (right[0] & ~right[1]).mean() and found.won == (right[1] & ~right[0]).mean()
    assert found.flips == found.lost + found.won > 0
    # The other direction is another figure.
    assert abs(found.kl - (np.exp(q) * (q - p)).sum(axis=-1).mean()) > 0.1


def test_one_pass_gives_both_perplexities() -> None:
    """The windows and positions are those of `perplexity`, and no model sees more than a batch at a time."""
    shapes = set()

    def watched(tokens: jax.Array) -> jax.Array:
        shapes.add(tokens.shape)
        return random_model(1)(tokens)

    ids, seen = random_ids(700 * 5 + 3), []
    found = divergence(watched, random_model(2), ids, seqlen=700, windows=5, progress=lambda *at: seen.append(at))
    for model, measured in ((random_model(1), found.reference), (random_model(2), found.model)):
        alone = perplexity(model, ids, seqlen=700)
        np.testing.assert_allclose(measured.window_nll, alone.window_nll, rtol=1e-6)
        assert measured.seqlen == alone.seqlen
    assert shapes == {(2, 700)} and seen == [(2, 5), (4, 5), (5, 5)]
    assert 0 < found.bootstrap() < found.kl


def test_what_the_reference_rules_out_adds_nothing_and_nan_stays() -> None:
    def ruled_out(fill: float):
        return lambda tokens: random_model(1)(tokens).at[..., 3].set(fill)

    same = divergence(ruled_out(-jnp.inf), ruled_out(-jnp.inf), np.zeros(20, int), seqlen=10)
    assert same.kl == 0
    assert divergence(random_model(1), ruled_out(-jnp.inf), np.zeros(20, int), seqlen=10).kl == np.inf
    assert np.isnan(divergence(ruled_out(jnp.nan), random_model(1), np.zeros(20, int), seqlen=10).kl)


class Named:
    """A model with a tokenizer and a config, as decoders have them."""

    def __init__(self, shift: int = 0, context: int = 64, size: int = VOCABULARY) -> None:
        self.tokenizer = SimpleNamespace(encode=lambda text: [(ord(c) + shift) % VOCABULARY for c in text])
        self.config = SimpleNamespace(max_position_embeddings=context, vocab_size=size)
        self.run = random_model(0, size)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.run(tokens)


def test_the_shorter_context_counts() -> None:
    assert divergence(Named(), Named(context=16), "a text " * 20).model.seqlen == 16


@pytest.mark.parametrize(
    ("model", "data", "seqlen", "message"),
    [
        (
            Named(size=VOCABULARY + 1),
            "a text " * 20,
            8,
            "logits of 11 tokens from the reference and of 12 from the mod",
        ),
        (Named(size=5), random_ids(20), 8, "the vocabulary has 5"),
        (Named(shift=1), "a text " * 20, 8, "give different tokens"),
        (Named(context=16), "a text " * 20, 32, "context of 16"),
        (Named(), "short", 8, "longer text"),
    ],
)
def test_refuses_models_that_cannot_be_compared(model, data, seqlen: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        divergence(Named(), model, data, seqlen=seqlen)
