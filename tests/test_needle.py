"""Needles: prompts of an exact length with the key at its depth, containment, and what the command line writes."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from any4_jax.cli import main
from any4_jax.data import essays
from any4_jax.evaluation.needle import KEYS, Trial, needle, shares
from any4_jax.generate import generate
from any4_jax.kv_cache import Kivi
from any4_jax.models import tiny as models
from any4_jax.models.base import Decoder

needles = importlib.import_module("any4_jax.evaluation.needle")  # the package has a function of this name
TEXT = "The grass is green. The sky is blue. Pi is 3.14159 or so! Is it? " * 3


@pytest.fixture(scope="module")
def small() -> Decoder:
    config = dataclasses.replace(models.random_llama().config, num_hidden_layers=1, vocab_size=512)
    model = models.random_llama(dataclasses.replace(config, max_position_embeddings=320))
    model.tokenizer = models.tiny().tokenizer
    return model


@pytest.fixture
def knowing(small, monkeypatch):
    """A model that knows the keys that begin with a 4 or that some text follows; its prompts and caches."""
    asked: list[tuple[str, Any]] = []

    def answers(model, rows, *, max_new_tokens, cache):
        texts, found = [model.tokenizer.decode(row) for row in rows], []
        asked.extend((text, cache) for text in texts)
        for text in texts:
            (key,) = (key for key in KEYS if key in text)
            known = key.startswith("4") or len(text) - text.index(key) > 130
            found.append(model.tokenizer.encode(f" {key}, of course" if known else " green", add_bos=False))
            assert len(model.tokenizer.encode(key, add_bos=False)) < max_new_tokens
        yield [[tokens[0]] for tokens in found]
        yield [tokens[1:] for tokens in found]

    monkeypatch.setattr(needles, "generate_tokens", answers)
    monkeypatch.setattr("any4_jax.cli.needle.open_model", lambda name, inputs: small)
    return asked


@pytest.mark.parametrize("haystack", [TEXT, essays()], ids=["short", "long"])
@pytest.mark.parametrize("length", [200, 307])
def test_a_prompt_has_its_length_and_the_needle_after_a_sentence(small, haystack: str, length: int) -> None:
    prompts = needles._Prompts.of(small, haystack, KEYS)
    before = -1
    for depth in (0.0, 0.3, 0.5, 0.9, 1.0):
        tokens = prompts.tokens(length, depth, KEYS[0])
        text = small.tokenizer.decode(tokens)
        assert len(tokens) == length and tokens.count(small.tokenizer.bos_id) == 1
        assert text.startswith("There is an important info") and text.endswith("The pass key is")
        begin, _, end = text.partition("\nThe pass key is 47x291. Remember it. 47x291 is the pass key.\n")
        hay = begin.partition("about the important information there.\n")[2].rstrip(" ")
        assert depth == 1 or hay[-1:] in ("", *".!?\n")
        assert depth > 0 or hay == ""
        assert (depth == 1) == (end.strip() == "What is the pass key? The pass key is")
        assert before <= len(hay)
        before = len(hay)


def test_answers_are_those_of_generate_and_batches_don_t_matter(small, monkeypatch) -> None:
    settings = {"lengths": [200], "depths": [0.5], "keys": KEYS[:3]}
    whole = needle(small, TEXT, **settings)
    monkeypatch.setattr(needles, "_BATCH_TOKENS", 400)
    steps: list[tuple[int, int]] = []
    assert needle(small, TEXT, **settings, progress=lambda *step: steps.append(step)) == whole
    assert steps == [(2, 3), (3, 3)] and [trial.key for trial in whole] == list(KEYS[:3])
    prompts = needles._Prompts.of(small, TEXT, KEYS[:3])
    ids = generate(small, prompts.tokens(200, 0.5, KEYS[1]), max_new_tokens=prompts.new)
    assert small.tokenizer.decode(ids).strip() == whole[1].answer.strip()


def test_needles_are_counted_by_length_and_depth(small, knowing) -> None:
    cache = Kivi(bits=2)
    trials = needle(small, TEXT, lengths=[300, 200], depths=[1.0, 0.0], cache=cache)
    assert len(trials) == 20 and all(used is cache for _, used in knowing)
    lengths, depths, found = shares(trials)
    assert (lengths, depths, found.tolist()) == ([200, 300], [0.0, 1.0], [[1.0, 1.0], [0.2, 0.2]])
    assert Trial(9, 0.5, "8a3605", "it is 8a3605.").found and not Trial(9, 0.5, "8a3605", "8a 3605").found


@pytest.mark.parametrize(
    "text, settings, words",
    [
        (" ", {}, "the haystack is empty; give a text"),
        (f"a {KEYS[1]}", {}, f"the haystack contains the key '{KEYS[1]}'"),
        (TEXT, {"lengths": []}, "got no lengths, and at least one is needed"),
        (TEXT, {"keys": ()}, "got no keys, and at least one is needed"),
        (TEXT, {"depths": [0.5, 1.5]}, "got the depth 1.5, and 0 .begin of the text. to 1"),
        (TEXT, {"lengths": [200, 99]}, "got a length of 99 tokens, and the question alone has 163; give more"),
        (
            TEXT,
            {"lengths": [318]},
            "318 tokens, which with 11 of the answer exceed the model's context of 320; give at",
        ),
    ],
)
def test_what_can_t_be_asked_is_refused(small, text: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        needle(small, text, **{"lengths": [200], **settings})


def test_the_command_writes_a_table_and_a_csv(knowing, tmp_path: Path, capsys) -> None:
    (tmp_path / "hay.txt").write_text(TEXT)
    flags = ["--lengths", "200", "300", "--depths", "0", "100", "--cache", "kivi", "--cache-bits", "2"]
    argv = ["needle", "small", "--text", f"{tmp_path}/hay.txt", "--csv", f"{tmp_path}/found.csv", *flags]
    assert main(argv) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [["all", "60%", "60%"], ["0", "%", "100%", "100%"], ["100", "%", "20%", "20%"]]
    assert all(used == Kivi(bits=2) for _, used in knowing)
    with open(tmp_path / "found.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["length_tokens", "depth_percent", "key", "found", "answer"] and len(rows) == 21
    assert rows[1][:4] == ["200", "0", KEYS[0], "1"] and rows[7][:4] == ["200", "100", KEYS[1], "0"]
    assert rows[7][4].strip() == "green"


def test_the_bundled_essays_and_lengths_of_the_context_are_the_default(knowing, capsys) -> None:
    assert main(["needle", "small", "--depths", "50", "--keys", KEYS[0], "--lengths", "256"]) == 0
    assert "The Last Lamp on Harrow Street" in knowing[0][0]
    assert main(["needle", "small", "--depths", "50", "--keys", KEYS[0]]) == 1
    assert "got a length of 102 tokens" in capsys.readouterr().err


def test_a_heat_map_without_matplotlib_is_refused_before_the_work(knowing, monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["needle", "small", "--png", f"{tmp_path}/map.png"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "picture needs the package matplotlib" in said and "'any4_jax[plot]'" in said
    assert not knowing
    assert main(["needle", "small", "--png", f"{tmp_path}/none/map.png"]) == 1


def test_a_heat_map_has_a_cell_for_each_length_and_depth(monkeypatch, tmp_path: Path) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    from any4_jax.evaluation.heat_map import heat_map

    drawn: list[Any] = []
    save = figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    trials = [Trial(n, d, key, key if n < 1000 else "") for n in (500, 2000) for d in (0.0, 0.5, 1.0) for key in "ab"]
    heat_map(trials, tmp_path / "map.png", "a name that is longer than what fits above a small picture of six cells")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    axes, bar = drawn[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["500", "2,000"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "length of the prompt (tokens)",
        "depth of the needle (% of the text)",
    )
    assert [text.get_text() for text in axes.texts] == ["100", "0"] * 3
    assert bar.get_ylabel() == "found, of 2 needles (%)"
