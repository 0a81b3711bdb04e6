"""Two hundred mutated inputs of every kind: each gives a result, or one sentence with its exit code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz.cases import KINDS
from fuzz.judge import Case, Finding, command, judged, load_and_run
from fuzz.originals import write_all
from fuzz.pool import Outcome, Worker

COUNT = 200


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "originals"
    write_all(folder)
    return folder


@pytest.fixture(scope="module")
def worker(originals: Path) -> Iterator[Worker]:
    worker = Worker(originals)
    yield worker
    worker.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_inputs_give_a_result_or_one_sentence(kind: str, worker: Worker) -> None:
    first = list(KINDS).index(kind)
    outcomes = [worker.run(kind, number) for number in range(len(range(first, COUNT, len(KINDS))))]
    findings = [str(outcome) for outcome in outcomes if outcome.verdict == "finding"]
    assert not findings, "\n".join(findings)
    assert any(outcome.verdict == "refused" for outcome in outcomes)


@pytest.mark.parametrize("number", range(3))
def test_a_case_is_known_by_its_number(number: int, worker: Worker) -> None:
    first, second = worker.run("gguf", number), worker.run("gguf", number)
    assert (first.verdict, first.change) == (second.verdict, second.change)


def test_what_is_unchanged_loads(originals: Path) -> None:
    """Else each change of it would be refused for another reason."""
    # The config that transformers 5 writes is read as the same (see test_family_goldens), and its tensors are the same.
    for pattern in ("folders/*", "configs/*/transformers4", "ggufs/*"):
        for path in sorted(originals.glob(pattern)):
            assert load_and_run(path, False, originals) == "a model"


@pytest.mark.parametrize(
    "error, verdict",
    [
        (ValueError("T is wrong; correct it"), "refused"),
        (FileNotFoundError("T is missing"), "refused"),
        (Finding("wrong shape"), "finding"),
        (KeyError("x"), "finding"),
        (RecursionError("too deep"), "finding"),
        (MemoryError(), "finding"),
        (ValueError("two\nlines of T"), "finding"),
        (ValueError(), "finding"),
        (ValueError("names nothing"), "finding"),
        (ValueError("T" * 5000), "finding"),
    ],
    ids=repr,
)
def test_the_judge(error: Exception, verdict: str, tmp_path: Path) -> None:
    def run() -> str:
        raise error

    assert judged(Case("", tmp_path, ("T",), run))[0] == verdict


def test_the_judge_of_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert judged(Case("", tmp_path, (), lambda: command(["--version"], tmp_path))) == ("result", "exit 0")
    assert judged(Case("", tmp_path, (), lambda: command(["inspect", "x"], tmp_path)))[0] == "refused"
    monkeypatch.setattr("fuzz.judge.main", lambda arguments: 3)
    assert judged(Case("", tmp_path, (), lambda: command([], tmp_path)))[0] == "finding"


@pytest.mark.parametrize(
    "code, words", [("import os; os._exit(7)", "exit code 7"), ("import time; time.sleep(9)", "1 s")]
)
def test_a_crash_and_a_hang_are_findings(
    code: str, words: str, originals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fuzz.pool.SECONDS", 1.0)
    monkeypatch.setattr("fuzz.pool.COMMAND", ("-c", code))
    worker = Worker(originals)
    outcome: Outcome = worker.run("gguf", 0)
    worker.stop()
    assert outcome.verdict == "finding" and words in outcome.words
