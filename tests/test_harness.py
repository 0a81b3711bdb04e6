"""Models for lm-evaluation-harness: what its own backend finds with torch, float64 by hand, and its interface."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from short_models import shorten

import any4_jax as a4
from any4_jax.data import stories
from any4_jax.evaluation import divergence, perplexity
from any4_jax.evaluation.coders import Coder
from any4_jax.evaluation.harness import Judged
from any4_jax.evaluation.scoring import bucket, log_likelihoods, rolling
from any4_jax.models.flax_llama import load_hf_flax

GOLDEN = json.loads((Path(__file__).parent / "golden" / "harness.json").read_text(encoding="utf-8"))
VOCABULARY = 11
TABLE = np.random.default_rng(0).normal(0, 2, (VOCABULARY, VOCABULARY)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return a4.models.load("tiny")


def successors(tokens):
    """The logits of a token depend on the one before alone."""
    return jnp.asarray(TABLE)[tokens]


def by_hand(before, after) -> tuple[float, bool]:
    log_p = TABLE.astype(np.float64) - np.log(np.exp(TABLE.astype(np.float64)).sum(axis=1, keepdims=True))
    steps = list(zip([before[-1], *after[:-1]], after, strict=True))
    return sum(log_p[a, b] for a, b in steps), all(TABLE[a].argmax() == b for a, b in steps)


def test_the_figures_are_those_of_the_harness_with_torch(model) -> None:
    found = Judged(model).score([pair[:2] for pair in GOLDEN["pairs"]])
    for (value, greedy), (*_, expected, likeliest) in zip(found, GOLDEN["pairs"], strict=True):
        assert value == pytest.approx(expected, rel=1e-5, abs=2e-5) and greedy == likeliest
    assert {greedy for _, greedy in found} == {True, False}
    texts = Judged(model, context=64).score_texts([text for text, _ in GOLDEN["texts"]])
    np.testing.assert_allclose(texts, [value for _, value in GOLDEN["texts"]], rtol=1e-6)


def test_perplexity_is_that_of_torch(model) -> None:
    found = perplexity(model, stories(), seqlen=128, windows=6)
    np.testing.assert_allclose(found.window_nll, GOLDEN["window_nats_per_token"], rtol=1e-5)


def test_answers_are_those_of_the_harness_with_torch(model) -> None:
    prompts, settings, expected = zip(*GOLDEN["answers"], strict=True)
    assert Judged(model).answer(prompts, settings) == list(expected)


def test_a_second_evaluation_of_the_same_lengths_compiles_nothing(model, count_compiles) -> None:
    pairs = [pair[:2] for pair in GOLDEN["pairs"]]
    others = [(before, after.replace("o", "a")) for before, after in pairs]
    prompts, settings, _ = zip(*GOLDEN["answers"], strict=True)
    ids = model.tokenizer.encode(" ".join(prompts[:4]) * 4)
    perplexity(model, ids, seqlen=32, windows=2), divergence(model, model, ids, seqlen=32, windows=2)
    Judged(model).score(others), Judged(model).answer(prompts, settings)
    with count_compiles() as compiles:
        Judged(model).score(pairs)
        Judged(model).answer([prompt.replace("a", "o") for prompt in prompts], settings)
        perplexity(model, ids[::-1], seqlen=32, windows=2), divergence(model, model, ids[::-1], seqlen=32, windows=2)
    assert compiles.count == 0, compiles.names


def test_scores_by_hand() -> None:
    draw = np.random.default_rng(1)
    lengths = [(1, 1), (5, 3), (40, 1), (40, 9), (31, 1), (64, 20), (1, 64), (90, 2)]
    requests = [tuple(draw.integers(0, VOCABULARY, n).tolist() for n in pair) for pair in lengths]
    likeliest = [3]
    while len(likeliest) < 6:
        likeliest.append(int(TABLE[likeliest[-1]].argmax()))
    requests += [(likeliest[:2], likeliest[2:])]
    # Answers to one question, which share its row, and one of two tokens that has another's input.
    requests += [([4, 5, 6], [n]) for n in range(5)] + [([4, 5], [6, 2])]
    shapes, seen = [], []

    def watched(tokens):
        shapes.append(tokens.shape)
        return successors(tokens)

    found = log_likelihoods(watched, requests, context=64, batch_tokens=128, progress=lambda *at: seen.append(at))
    for request, (value, greedy) in zip(requests, found, strict=True):
        expected = by_hand(*request)
        assert (value, greedy) == (pytest.approx(expected[0], rel=2e-6), expected[1])
    assert found[len(lengths)].greedy and sum(size for size, _ in shapes) < len(requests)
    assert seen[-1] == (10, 10) and {length for _, length in shapes} == {32, 48, 64}


def test_buckets_are_few_and_close() -> None:
    found = [bucket(length, 2048) for length in range(1, 2049)]
    assert len(set(found)) == 13 and max(found) == 2048 and found[0] == 32
    assert all(length <= padded <= max(32, 1.5 * length) for length, padded in enumerate(found, 1))
    assert bucket(60, 61) == 61


@pytest.mark.parametrize("context", [3, 4, 10, 100])
def test_a_whole_text_is_predicted_once(context: int) -> None:
    tokens = list(range(10))
    windows = rolling(tokens, 99, context)
    assert [token for _, after in windows for token in after] == tokens
    for before, after in windows:
        whole = [*before, *after]
        assert whole == [99, *tokens][[99, *tokens].index(whole[0]) :][: len(whole)]
        assert len(whole) - 1 == min(context, 10)
    assert rolling([], 99, 4) == []


def test_refusals(model) -> None:
    for request in (([], [1]), ([1], []), ([1], [2] * 65)):
        with pytest.raises(ValueError, match="request 0 has a context of"):
            log_likelihoods(successors, [request], context=64)
    with pytest.raises(TypeError, match="pass tokenizer="):
        Judged(successors, context=64)
    with pytest.raises(ValueError, match="context of a function is unknown"):
        Judged(successors, model.tokenizer)
    judged = Judged(model)
    with pytest.raises(ValueError, match="600 new tokens, and the model's context has 512"):
        judged.answer(["a"], [{"max_gen_toks": 600}])
    with pytest.raises(ValueError, match="a task sets beams of generation, and do_sample"):
        judged.answer(["a"], [{"beams": 3}])
    with pytest.raises(ValueError, match="a function can't generate"):
        Judged(successors, model.tokenizer, context=64).answer(["a"], [{"max_gen_toks": 3}])
    with pytest.raises(ValueError, match="no chat template"):
        judged.coder.chat([{"role": "user", "content": "a"}], True)


def test_flax_models_of_transformers_are_judged_alike(tmp_path, monkeypatch) -> None:
    shorten(monkeypatch, tmp_path, blocks=1)
    ours, theirs = Judged(a4.models.load(tmp_path)), Judged(load_hf_flax(tmp_path))
    pairs = [pair[:2] for pair in GOLDEN["pairs"][:4]]
    for first, second in zip(ours.score(pairs), theirs.score(pairs), strict=True):
        assert second == (pytest.approx(first[0], rel=1e-5), first[1])
    prompts, settings, _ = zip(*GOLDEN["answers"][:2], strict=True)
    assert theirs.answer(prompts, settings) == ours.answer(prompts, settings)


def test_tokenizers_of_transformers_are_read_alike(model, tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf-flax")
    for name, content in model.tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    ours, theirs = Coder(model.tokenizer), Coder(transformers.AutoTokenizer.from_pretrained(tmp_path))
    assert (ours.prefix_id, ours.end_ids, ours.template) == (theirs.prefix_id, theirs.end_ids, theirs.template)
    for before, after, *_ in GOLDEN["pairs"][:10]:
        assert ours.pair(before, after) == theirs.pair(before, after)
        assert ours.decode(ours.encode(after)) == theirs.decode(theirs.encode(after))
    assert ours.encode("<s>Tom") == theirs.encode("<s>Tom") == ours.encode("Tom")
