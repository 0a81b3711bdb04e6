"""Perplexity: exact cases from models whose probabilities are known, and the protocol's refusals."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax.data import texts
from any4_jax.evaluation import Perplexity, paired_difference, perplexity

VOCABULARY = 11


def uniform(tokens):
    return jnp.zeros((*tokens.shape, VOCABULARY))


def successor(tokens):
    """Gives (nearly) all probability to token + 1."""
    return 50.0 * jax.nn.one_hot((tokens + 1) % VOCABULARY, VOCABULARY)


def random_model(seed):
    table = jnp.asarray(np.random.default_rng(seed).normal(0, 2, (VOCABULARY, VOCABULARY)), jnp.float32)
    return lambda tokens: table[tokens]


def random_ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, count)


@pytest.mark.parametrize("seqlen", [2, 7, 64])
def test_uniform_model_has_the_vocabulary_as_perplexity(seqlen):
    result = perplexity(uniform, random_ids(200), seqlen=seqlen)
    assert result.value == pytest.approx(VOCABULARY, rel=1e-6)
    assert result.bootstrap() == pytest.approx(0, abs=1e-5)
    assert result.tokens == (200 // seqlen) * (seqlen - 1)


def test_logits_are_scored_against_the_next_token():
    counting = np.arange(44) % VOCABULARY
    assert perplexity(successor, counting, seqlen=11).value == pytest.approx(1, abs=1e-6)
    assert perplexity(successor, counting[::-1], seqlen=11).nll == pytest.approx(50, rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("seqlen", [5, 16, 1500])
def test_equals_float64_by_hand(seqlen, dtype):
    model = random_model(1)
    ids = random_ids(4000)
    result = perplexity(lambda tokens: model(tokens).astype(dtype), ids, seqlen=seqlen)

    table = np.asarray(model(jnp.arange(VOCABULARY)).astype(dtype), np.float64)
    log_p = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    rows = ids[: len(ids) // seqlen * seqlen].reshape(-1, seqlen)
    expected = -log_p[rows[:, :-1], rows[:, 1:]].mean(axis=1)
    np.testing.assert_allclose(result.window_nll, expected, rtol=2e-6)
    assert result.value == pytest.approx(math.exp(expected.mean()), rel=2e-6)


def test_first_windows_only_and_all_of_one_shape():
    shapes, seen = set(), []

    def model(tokens):
        shapes.add(tokens.shape)
        return uniform(tokens)

    ids = random_ids(19 * 300 + 5)
    result = perplexity(model, ids, seqlen=300, progress=lambda done, total: seen.append((done, total)))
    assert len(result.window_nll) == 19
    assert len(shapes) == 1
    assert seen[-1] == (19, 19)

    partial = perplexity(random_model(2), ids, seqlen=300, windows=4)
    whole = perplexity(random_model(2), ids, seqlen=300)
    np.testing.assert_allclose(partial.window_nll, whole.window_nll[:4], rtol=1e-6)


def test_text_is_tokenized_once():
    calls = []

    class Model:
        tokenizer = SimpleNamespace(encode=lambda text: calls.append(text) or [ord(c) % VOCABULARY for c in text])

        def __call__(self, tokens):
            return successor(tokens)

    text = "abcdefghijk" * 4
    by_text = perplexity(Model(), text, seqlen=8)
    by_ids = perplexity(Model(), [ord(c) % VOCABULARY for c in text], seqlen=8)
    assert calls == [text]
    np.testing.assert_array_equal(by_text.window_nll, by_ids.window_nll)


def test_bootstrap_error_is_that_of_the_mean():
    window_nll = np.random.default_rng(3).normal(3.0, 0.2, 400)
    result = Perplexity(window_nll, 256)
    expected = result.value * window_nll.std() / math.sqrt(len(window_nll))  # first order in the error
    assert result.bootstrap() == pytest.approx(expected, rel=0.08)
    assert result.bootstrap(seed=5) == result.bootstrap(seed=5)
    assert result.bootstrap(seed=5) != result.bootstrap(seed=6)


def test_paired_difference_is_sharper_than_unpaired():
    rng = np.random.default_rng(4)
    base = rng.normal(3.0, 0.5, 100)
    worse = base + 0.05 + rng.normal(0, 0.01, 100)
    a, b = Perplexity(worse, 256), Perplexity(base, 256)
    difference = paired_difference(a, b)
    assert difference.mean == pytest.approx(0.05, abs=0.005)
    assert 0 < difference.error < 0.05 * b.bootstrap() / b.value
    assert paired_difference(b, a).mean == -difference.mean
    assert paired_difference(a, a) == (0, 0)


@pytest.mark.parametrize(
    ("ids", "arguments", "error", "words"),
    [
        (random_ids(99), {"seqlen": 100}, ValueError, "99 tokens"),
        (random_ids(99), {"seqlen": 20, "windows": 5}, ValueError, "4 windows of 20, and 5"),
        (random_ids(99), {"seqlen": 20, "windows": 0}, ValueError, "windows=0, and at least 1"),
        (random_ids(99), {"seqlen": 20, "windows": -1}, ValueError, "windows=-1, and at least 1"),
        (random_ids(99), {"seqlen": 20, "windows": 1.5}, TypeError, "windows=1.5 is a float"),
        (random_ids(99), {"seqlen": 1}, ValueError, "at least 2"),
        (random_ids(99), {"seqlen": 0}, ValueError, "at least 2"),
        (random_ids(99), {"seqlen": -1}, ValueError, "at least 2"),
        (random_ids(99), {"seqlen": 1.5}, TypeError, "seqlen=1.5 is a float"),
        (random_ids(99), {"seqlen": True}, TypeError, "seqlen=True is a bool"),
        ([3, -1, 2], {"seqlen": 2}, ValueError, "ids from -1"),
        ([3, 2**40], {"seqlen": 2}, ValueError, "ids from 0 to 1099511627776, the vocabulary has 11"),
        ([], {"seqlen": 2}, ValueError, "0 tokens"),
        (random_ids(99), {"seqlen": 65}, ValueError, "context of 64"),
        ("a text", {"seqlen": 2}, TypeError, "without a tokenizer"),
        (random_ids(99).reshape(3, 33), {"seqlen": 5}, TypeError, "one row"),
        ([0.5, 1.5, 2.5], {"seqlen": 2}, TypeError, "integers"),
    ],
)
def test_refusals(ids, arguments, error, words):
    class Short:
        config = SimpleNamespace(max_position_embeddings=64, vocab_size=VOCABULARY)

        def __call__(self, tokens):
            raise AssertionError("the model ran although the input is wrong")

    model = uniform if "seqlen" in arguments and arguments["seqlen"] == 100 else Short()
    with pytest.raises(error, match=words):
        perplexity(model, ids, **arguments)


def test_windows_are_as_long_as_the_context_by_default():
    class Short:
        config = SimpleNamespace(max_position_embeddings=64, vocab_size=VOCABULARY)

        def __call__(self, tokens):
            return uniform(tokens)

    assert perplexity(Short(), random_ids(200)).seqlen == 64
    assert perplexity(uniform, random_ids(5000)).seqlen == 2048


def test_windows_of_different_texts_are_not_paired():
    with pytest.raises(ValueError, match="same windows"):
        paired_difference(Perplexity(np.ones(3), 16), Perplexity(np.ones(4), 16))


@pytest.mark.parametrize(
    ("read", "least", "most"),
    [(texts.prompt, 250, 350), (texts.essays, 4000, 5500), (texts.stories, 1400, 1800)],
)
def test_bundled_texts(read, least, most):
    text = read()
    assert least <= len(text.split()) <= most
    assert text.isascii()
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
    assert len(set(paragraphs)) == len(paragraphs)
