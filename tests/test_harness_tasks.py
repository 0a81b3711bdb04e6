"""Tasks of lm-evaluation-harness: with a little package in its place everywhere, with the real one where it is."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import any4_jax as a4
from any4_jax.cli import main
from any4_jax.evaluation.harness import Judged, harness_model
from any4_jax.evaluation.harness_tasks import Tasks

GOLDEN = json.loads((Path(__file__).parent / "golden" / "harness.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model():
    return a4.models.load("tiny")


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


TASK = """
task: toys
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{story}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 3.0}
"""


def test_a_task_of_one_s_own_in_the_real_harness(model, tmp_path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    questions = [
        {"story": "Once upon a time, there was a little girl named", "choices": [" Lily", " the"], "answer": 0},
        {"story": "Tom and Sue went to the", "choices": [" was", " park"], "answer": 1},
        {"story": "Tom and Sue went to the", "choices": [" park", " was"], "answer": 1},
    ]
    (tmp_path / "toys.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    (tmp_path / "toys.yaml").write_text(TASK % (tmp_path / "toys.jsonl"))
    tasks = Tasks(tmp_path)
    assert tasks.expand(["toys"]) == ["toys"]
    found = tasks.run(harness_model(model), "toys")
    assert found["metrics"]["acc"]["value"] == pytest.approx(2 / 3) and found["metrics"]["acc"]["higher_is_better"]
    assert found["metrics"]["acc"]["error"] == pytest.approx(1 / 3, rel=1e-3)
    assert (found["samples"], found["shots"], found["version"], found["tasks"]) == (3, 0, 3.0, {})
    assert tasks.run(harness_model(model), "toys", limit=1)["samples"] == 1


def test_eval_without_the_harness_says_what_to_install(monkeypatch, capsys) -> None:
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["eval", "tiny", "--tasks", "wikitext-3"]) == 1
    assert (
        "wikitext-3 is no text that any4 knows (did you mean wikitext-2?), and tasks need the package lm_eval"
        in capsys.readouterr().err
    )
    with pytest.raises(ImportError, match="pip install 'any4_jax.eval.'"):
        harness_model(a4.models.load("tiny"))
