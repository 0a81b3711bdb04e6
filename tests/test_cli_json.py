"""`--json`: stdout is one JSON object that holds what the command prints for people, and nothing else."""

import argparse
import inspect
import io
import json
import math
from collections.abc import Iterator

import pytest

import any4_jax as a4
from any4_jax.cli import main
from any4_jax.cli.commands import parser_of
from any4_jax.cli.output import as_json
from any4_jax.cli.stored_sizes import Layer, compared, histogram, size_table
from any4_jax.data import stories
from any4_jax.surgery import quantized_leaves

PROMPT = "Once upon a time, there was a"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint, and what `any4 quantize --json` says of it."""
    folder = tmp_path_factory.mktemp("json")
    (folder / "text.txt").write_text(stories())
    with pytest.MonkeyPatch.context() as patch:
        shown: list[str] = []
        patch.setattr("any4_jax.cli.output.print", lambda text, **_: shown.append(text), raising=False)
        argv = ["quantize", "tiny", str(folder / "c"), "--method", "nf4", "--group-size", "32", "--calibrate", "none"]
        assert main([*argv, "--rules", ".*down_proj=int8", "--json"]) == 0
    return folder, json.loads("".join(shown))


def told(argv, capsys):
    """The JSON that a command prints, and what it prints for people."""
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out), shown


def test_quantize_and_inspect_agree_on_sizes(made, capsys) -> None:
    folder, quantized = made
    leaves = quantized_leaves(a4.load(folder / "c"))
    stored, weights = (
        sum(f(leaf) for leaf in leaves.values()) for f in (lambda x: x.nbytes, lambda x: math.prod(x.shape))
    )
    assert (quantized["layers"], quantized["bytes"], quantized["weights"]) == (len(leaves), stored, weights)
    assert quantized["method"]["method"] == "nf4" and quantized["bits_per_weight"] == 8 * stored / weights

    found, shown = told(["inspect", str(folder / "c")], capsys)
    assert sum(layer["nbytes"] for layer in found["layers"]) == sum(size["bytes"] for size in found["sizes"]) == stored
    assert {layer["method"] for layer in found["layers"]} == {"nf4", "int"}
    for size in found["sizes"]:
        assert size["float_bytes"] == 2 * size["weights"]
        assert any(f"{size['weights']:,}" in line for line in shown.splitlines() if line.startswith(size["kind"]))
    assert f"{2 * weights / stored:.2f}" in shown


def test_generate_and_explain(made, capsys) -> None:
    checkpoint = str(made[0] / "c")
    found, shown = told(["generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", "20"], capsys)
    assert [*found["texts"], ""] == shown.split("\n") and found["tokens"] == 20 and found["prompt"] == PROMPT
    found, shown = told(["explain", checkpoint], capsys)
    assert sum(layer["count"] for group in found["groups"] for layer in group["layers"]) >= 35
    for group in found["groups"]:
        assert all(line in shown for line in (*group["backends"], *(layer["path"] for layer in group["layers"])))


def test_eval(made, capsys) -> None:
    text = ["--text", str(made[0] / "text.txt"), "--seqlen", "128", "--windows", "2"]
    found, shown = told(["eval", str(made[0] / "c"), *text, "--against", "tiny"], capsys)
    (result,) = found["results"].values()
    compared = result["against"]
    assert f"{result['perplexity']:.4f}" in shown and f"{compared['kl_99_percent_nats']:.5f}" in shown
    assert compared["flips_lost"] + compared["flips_won"] == pytest.approx(compared["flips"])
    assert f"{compared['flips']:.2%}" in shown and 0 < compared["flips"] < 1 - compared["top1_agreement"] + 1e-9
    by_position = compared["position_kl_nats"]
    assert len(by_position) == 127 and sum(by_position) / 127 == pytest.approx(compared["kl_nats_per_token"], rel=1e-6)
    assert f"{sum(by_position[:16]) / 16:.5f}" in shown and "65-127" in shown


def test_completion_and_errors(capsys) -> None:
    found, shown = told(["completion", "bash"], capsys)
    assert found == {"shell": "bash", "script": shown} and "--json" in shown
    assert main(["inspect", "nowhere", "--json"]) == 1
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.startswith("any4: error: nowhere")


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of the commands that have none below them."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in below:
        for inner in action.choices.values():
            yield from commands(inner)
    if not below:
        yield parser


def test_no_command_is_silent() -> None:
    found = {parser.prog: inspect.getmodule(parser.get_default("run")) for parser in commands(parser_of([]))}
    assert {"any4 eval", "any4 bench gemm", "any4 tables", "any4 tune"} <= set(found)
    for name, module in found.items():
        # `finish` is how benchmarks end; it tells their results.
        assert {"tell", "finish"} & set(vars(module)), name


def test_numbers_that_json_lacks_are_null() -> None:
    assert json.loads(as_json({"a": [math.inf, 1.5], "b": math.nan}, None)) == {"a": [None, 1.5], "b": None}


def test_sizes_by_hand() -> None:
    layers = [
        Layer("layers.0.up", "nf4", (10, 100), 500, 0),  # 4 bits
        Layer("layers.1.up", "nf4", (10, 100), 530, 30),  # 4.24 bits
        Layer("head", "int", (20, 100), 2000, 0),  # 8 bits
    ]
    up, head = compared(layers)
    assert (up.kind, up.layers, up.weights, up.bytes, up.float_bytes) == ("up", 2, 2000, 1030, 4000)
    assert (head.kind, head.layers, head.bytes) == ("head", 1, 2000)
    lines = [line.split() for line in size_table(layers, 970).splitlines()]
    assert lines[1] == ["up", "2", "2,000", "4.120", "0.001", "0.004", "3.88"]
    assert lines[-3][-1] == "2.64" and lines[-1] == ["the", "model", "0.004", "0.009", "2.24"]
    bars = histogram(layers).splitlines()[1:]
    assert [line.split() for line in bars] == [
        ["4.00", "to", "4.25", "2", "50.0%", "#" * 20],
        ["8.00", "to", "8.25", "1", "50.0%", "#" * 20],
    ]


def test_each_answer_of_a_chat_is_a_line(monkeypatch, capsys) -> None:
    def open_model(name, inputs):
        model = a4.models.load(name)
        model.tokenizer.chat_template = "{{ messages[0].content }}"
        return model

    monkeypatch.setattr("any4_jax.cli.chat.open_model", open_model)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Once upon\n/reset\nOnce upon\n"), encoding="utf-8"))
    assert main(["chat", "tiny", "--json", "--max-new-tokens", "20"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["texts"] == second["texts"] and first["tokens"] == 20 and first["message"] == "Once upon"
