"""Models for lm-evaluation-harness: what its own backend finds with torch, float64 by hand, and its interface."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from short_models import shorten

import any4_jax as a4
from any4_jax.cli import main
from any4_jax.evaluation.coders import Coder
from any4_jax.evaluation.harness import Judged, harness_model
from any4_jax.evaluation.harness_tasks import Tasks
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


def test_answers_are_those_of_the_harness_with_torch(model) -> None:
    prompts, settings, expected = zip(*GOLDEN["answers"], strict=True)
    assert Judged(model).answer(prompts, settings) == list(expected)


def test_a_second_evaluation_of_the_same_lengths_compiles_nothing(model, count_compiles) -> None:
    pairs = [pair[:2] for pair in GOLDEN["pairs"]]
    others = [(before, after.replace("o", "a")) for before, after in pairs]
    prompts, settings, _ = zip(*GOLDEN["answers"], strict=True)
    Judged(model).score(others), Judged(model).answer(prompts, settings)
    with count_compiles() as compiles:
        Judged(model).score(pairs)
        Judged(model).answer([prompt.replace("a", "o") for prompt in prompts], settings)
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


class Base:
    """What `lm_eval.api.model.LM` is."""

    def __init__(self) -> None:
        self.kept = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *found: self.kept.append(found))


class Manager:
    """What `lm_eval.tasks.TaskManager` is."""

    def __init__(self, include_path) -> None:
        self.all_tasks = ["hellaswag", "mmlu", "mmlu_law", "mmlu_art", "humaneval", "minerva_math500"]


def simple_evaluate(model, tasks, **given):
    """A task whose accuracy is the share of questions answered likeliest; a group of two; one that runs code."""
    (task,) = tasks
    if task == "humaneval" and not given["confirm_run_unsafe_code"]:
        raise ValueError("attempted to run an unsafe task")
    if task == "minerva_math500":
        raise ConnectionError
    questions = [pair[:2] for pair in GOLDEN["pairs"][: given["limit"]]]
    right = [greedy for _, greedy in model.loglikelihood([SimpleNamespace(args=tuple(q)) for q in questions])]
    metrics = {"alias": task, "acc,none": np.float64(np.mean(right)), "acc_stderr,none": 0.25, "f1,strict": 0.5}
    metrics |= {"f1_stderr,strict": "N/A"}
    whole = {task: metrics}
    parts = {"mmlu_law": metrics, "mmlu_art": metrics} if task == "mmlu" else whole
    return {
        "results": whole | parts,
        "groups": whole if task == "mmlu" else {},
        "higher_is_better": {name: {"acc": True} for name in whole | parts},
        "n-samples": {name: {"original": 100, "effective": len(questions)} for name in parts},
        "n-shot": dict.fromkeys(parts, given["num_fewshot"]),
        "versions": {task: 1.0},
        "lm_eval_version": "0",
    }


@pytest.fixture
def harness(monkeypatch):
    """The package lm_eval, in little."""
    package, api, base, tasks = (ModuleType(name) for name in ("lm_eval", "api", "model", "tasks"))
    base.LM, tasks.TaskManager, package.simple_evaluate = Base, Manager, simple_evaluate
    for name, module in {"": package, ".api": api, ".api.model": base, ".tasks": tasks}.items():
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", module)


def test_the_adapter_is_the_harness_s_own_kind_of_model(model, harness) -> None:
    adapter = harness_model(model)
    assert isinstance(adapter, Base)
    pairs = [tuple(pair[:2]) for pair in GOLDEN["pairs"][:3]]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    assert adapter.loglikelihood(requests) == Judged(model).score(pairs)
    assert [found[:2] for found in adapter.kept] == [("loglikelihood", pair) for pair in pairs]
    (text,) = adapter.loglikelihood_rolling([SimpleNamespace(args=("Tom had a red ball.",))])
    assert text == Judged(model).score_texts(["Tom had a red ball."])[0] < -10
    prompt, settings, answer = GOLDEN["answers"][0]
    assert adapter.generate_until([SimpleNamespace(args=(prompt, settings))]) == [answer]
    assert adapter.generate_until([]) == [] and adapter.kept[-1] == ("generate_until", (prompt, settings), answer)
    assert adapter.chat_template(True) is None and "/" not in adapter.tokenizer_name


def test_tasks_by_name(model, harness, tmp_path) -> None:
    tasks = Tasks()
    assert tasks.expand(["math-500", "mmlu", "hellaswag", "mmlu"]) == ["minerva_math500", "mmlu", "hellaswag"]
    with pytest.raises(
        ValueError, match="got the task 'helaswag', which the harness doesn't know; did you mean hellasw"
    ):
        tasks.expand(["helaswag"])
    found = tasks.run(harness_model(model), "mmlu", limit=9, shots=3)
    share = np.mean([pair[3] for pair in GOLDEN["pairs"][:9]])
    assert found["metrics"] == {
        "acc": {"value": share, "error": 0.25, "higher_is_better": True},
        "f1,strict": {"value": 0.5, "error": None, "higher_is_better": None},
    }
    assert set(found["tasks"]) == {"mmlu_law", "mmlu_art"} and (found["samples"], found["shots"]) == (18, 3)
    with pytest.raises(ValueError, match="humaneval runs code that the model writes, which is refused"):
        tasks.run(harness_model(model), "humaneval", limit=1)
    assert tasks.run(harness_model(model), "humaneval", limit=1, allow_code=True)["samples"] == 1
    with pytest.raises(OSError, match="the data of minerva_math500 can't be had .ConnectionError."):
        tasks.run(harness_model(model), "minerva_math500")
    with pytest.raises(OSError, match="is no folder"):
        Tasks(tmp_path / "nowhere")


def test_eval_goes_on_where_it_was_killed(harness, tmp_path, capsys, monkeypatch) -> None:
    out = tmp_path / "run"
    argv = ["eval", "tiny", "--limit", "9", "--shots", "0", "--out", str(out), "--tasks"]
    assert main([*argv, "hellaswag", "minerva_math500", "mmlu"]) == 1
    assert "the data of minerva_math500" in capsys.readouterr().err
    assert list(json.loads((out / "results.json").read_text())["results"]) == ["hellaswag"]
    asked = []
    monkeypatch.setattr(
        sys.modules["lm_eval"],
        "simple_evaluate",
        lambda **given: asked.append(given["tasks"]) or simple_evaluate(**given),
    )
    assert main([*argv, "hellaswag", "mmlu"]) == 0
    streams = capsys.readouterr()
    assert asked == [["mmlu"]] and "hellaswag: measured before" in streams.err
    assert streams.out.splitlines()[1].split() == ["hellaswag", "acc", "0.1111", "0.2500", "9", "0"]
    assert list(json.loads((out / "results.json").read_text())["results"]) == ["hellaswag", "mmlu"]
    assert main([*argv, "hellaswag", "--again"]) == 0 and asked[1:] == [["hellaswag"]]
    before = (out / "results.json").read_text()
    assert list(json.loads(before)["results"]) == ["hellaswag", "mmlu"]
    assert main(["eval", "tiny", "--limit", "8", "--shots", "0", "--out", str(out), "--tasks", "mmlu"]) == 1
    assert "holds results with limit 9, and this run has 8; give another folder" in capsys.readouterr().err
    assert (out / "results.json").read_text() == before
    assert main([*argv, "helaswag"]) == 2


def test_eval_without_the_harness_says_what_to_install(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "tiny", "--tasks", "wikitext-3"]) == 1
    assert "wikitext-3 is no text that any4 knows, and tasks need the package lm_eval" in capsys.readouterr().err
    with pytest.raises(ImportError, match="pip install 'any4_jax.eval.'"):
        harness_model(a4.models.load("tiny"))
