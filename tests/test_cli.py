"""The command line: exit codes and sentences, and the main job end to end."""

import json
import re
import shutil

import pytest
from short_models import shorten

import any4_jax as a4
from any4_jax.cli import main
from any4_jax.cli.output import table
from any4_jax.data import assets, stories
from any4_jax.models import Tokenizer
from cuda_ffi import registration


@pytest.fixture(autouse=True)
def plain_tokenizer(monkeypatch):
    monkeypatch.setattr(Tokenizer, "chat_template", None, raising=False)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 2, "COMMAND"),
        (["paint"], 2, "invalid choice: 'paint'"),
        (["quantize", "tiny"], 2, "OUT"),
        (["quantize", "tiny", "{new}", "--method", "any5"], 2, "invalid choice: 'any5'"),
        (["quantize", "tiny", "{new}", "--method"], 2, "--method"),
        (["quantize", "tiny", "{new}", "--sovler", "exact"], 2, "--sovler"),
        (["quantize", "tiny", "{new}", "--method", "nf4", "--solver", "exact"], 2, "--solver"),
        (["quantize", "tiny", "{new}", "--group-size", "0"], 2, "group_size"),
        (["quantize", "tiny", "{new}", "--init", "int"], 2, "solver='lloyd'"),
        (
            ["quantize", "tiny", "{new}", "--sample-weight", "mean_abs", "--calibrate", "none"],
            2,
            "without stat",
        ),
        (["quantize", "tiny", "{new}", "--rules", "layers"], 2, "REGEX=METHOD"),
        (
            ["quantize", "tiny", "{new}", "--rules", "nothing=nf4", "--calibrate", "none"],
            1,
            "'nothing' matches none",
        ),
        (["quantize", "tiny", "{new}", "--calibrate", "none", "--samples", "2"], 2, "with --calibrate none"),
        (["quantize", "tiny", "{new}", "--samples", "0"], 2, "--samples"),
        (["quantize", "tiny", "{new}", "--samples", "2", "--calibrate", "{short}"], 1, "of one piece"),
        (["quantize", "tiny", "{new}", "--method", "gptq", "--calibrate", "none"], 2, "pass data"),
        (["quantize", "tiny", "{new}", "--calibrate", "{missing}"], 1, "missing: No such file"),
        (["quantize", "tiny", "{new}", "--calibrate", "{binary}"], 1, "is not UTF-8 text"),
        (["quantize", "tiny", "{new}", "--calibrate", "{blank}"], 1, "holds no text"),
        (["quantize", "{missing}", "{new}"], 1, "missing"),
        (["quantize", "tiny", "{missing}/below"], 1, "create it first"),
        (["quantize", "tiny", "{full}"], 1, "not empty"),
        (["quantize", "tiny", "{blank}"], 1, "is a file"),
        (["generate", "tiny"], 2, "--prompt"),
        (["generate", "{missing}", "--prompt", "x"], 1, "missing"),
        (["generate", "tiny", "--prompt", "Once", "--max-new-tokens", "9999"], 1, "512"),
        (["generate", "tiny", "--prompt", "Once", "--temperature", "hot"], 2, "got 'hot', need a number"),
        (["eval", "tiny"], 2, "--text FILE"),
        (["eval", "tiny", "--text", "{missing}"], 1, "missing"),
        (["eval", "tiny", "--text", "{short}", "--seqlen", "64"], 1, "longer text"),
        (["eval", "tiny", "--text", "{short}", "--seqlen", "513"], 1, "context of 512"),
        (["eval", "tiny", "--text", "{short}", "--out", "{missing}/results.json"], 1, "create it first"),
        (["tune", "tiny", "{new}", "--teacher", "tiny", "--data", "essays"], 1, "tiny is no checkpoint; make one of"),
        (["tune", "tiny", "{new}", "--teacher", "tiny"], 2, "--data"),
        (["inspect", "{full}"], 1, "any4.json"),
        (["inspect", "{missing}"], 1, "any4.json"),
        (["explain", "{missing}"], 1, "missing"),
        (["demo", "--model", "tiny", "--out", "{full}"], 1, "not empty"),
        (["demo", "--model", "tiny", "--group-size", "0"], 2, "--group-size: got '0'"),
        (["demo", "--windows", "-1"], 2, "--windows: got '-1'"),
        (["explain", "tiny", "--rows", "0"], 2, "--rows: got '0'"),
        (["eval", "tiny", "--text", "{short}", "--windows", "-1"], 2, "--windows: got '-1'"),
        (["eval", "tiny", "--text", "{short}", "--seqlen", "1"], 2, "--seqlen: got '1', need a whole number of at"),
        (["eval", "tiny", "--text", "{short}"], 1, "windows of 512"),
        (["generate", "tiny", "--prompt", ""], 2, "the prompt is empty; pass at least one character"),
        (["generate", "tiny", "--prompt-file", "{empty}"], 2, "the prompt is empty"),
        (["generate", "tiny", "--prompt-file", "{binary}"], 1, "binary is not UTF-8 text"),
        (["generate", "tiny", "--prompt-file", "{missing}"], 1, "missing: No such file"),
        (["generate", "tiny", "--prompt-file", "{short}", "--prompt", "x"], 2, "not allowed with"),
        (["generate", "tiny", "--prompt", "a\udcff"], 1, "the prompt is not UTF-8 text"),
        (["generate", "tiny", "--prompt", "x", "--system", "a\udcff"], 1, "the system message is not UTF-8 text"),
        (["generate", "tiny", "--prompt", "x", "--raw", "--system", "y"], 2, "--raw"),
        (["generate", "tiny", "--prompt", "x", "--system", "y"], 1, "no chat template"),
        (["generate", "tiny", "--prompt", "x", "--max-new-tokens", "0"], 2, "--max-new-tokens: got '0'"),
        (["generate", "tiny", "--prompt", "x", "--top-k", "3"], 2, "got --top-k without a temperature"),
        (["generate", "tiny", "--prompt", "x", "--top-p", "0.5"], 2, "got --top-p without a temperature"),
        (["generate", "tiny", "--prompt", "x", "--seed", "0"], 2, "got --seed without a temperature"),
        (["generate", "tiny", "--prompt", "x", "--temperature", "1", "--top-k", "0"], 2, "--top-k: got '0'"),
        (
            ["generate", "tiny", "--prompt", "x", "--temperature", "1", "--top-p", "0"],
            2,
            "number above 0 and at most 1",
        ),
        (["generate", "tiny", "--prompt", "x", "--temperature", "1", "--seed", "-1"], 2, "--seed: got '-1'"),
        (["generate", "tiny", "--prompt", "x", "--temperature", "nan"], 2, "got 'nan', need a number"),
        (["chat", "tiny"], 1, "no chat template"),
        (["--import", "no.such", "generate", "tiny", "--prompt", "x"], 2, "got --import no.such"),
        (["generate", "tiny", "--prompt", "x", "--import", ".relative"], 2, "got --import .relative"),
        (["completion", "fish"], 2, "invalid choice: 'fish'"),
    ],
)
def test_exit_code_and_one_sentence(argv, code, words, tmp_path, capsys):
    paths = {name: tmp_path / name for name in ("new", "missing", "full", "binary", "blank", "short", "empty")}
    paths["full"].mkdir()
    (paths["full"] / "thesis.txt").write_text("years of work")
    paths["binary"].write_bytes(b"\xff\xfe\x00\x01")
    paths["blank"].write_text("\n")
    paths["short"].write_text("Lily had a ball.")
    paths["empty"].write_text("\n")
    before = sorted(tmp_path.rglob("*"))

    assert main([part.format(**paths) for part in argv]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("any4: error: ")
    assert words in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "argv",
    [
        ["--debug", "generate", "nowhere", "--prompt", "x"],
        ["generate", "nowhere", "--prompt", "x", "--debug"],
    ],
)
def test_debug_shows_the_traceback(argv, capsys):
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.strip().splitlines()[-1].startswith("any4: error: nowhere")


def test_interrupt_is_130(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("any4_jax.cli.generate.open_model", interrupt)
    assert main(["generate", "tiny", "--prompt", "x"]) == 130
    assert capsys.readouterr().err == "any4: interrupted; nothing was kept, so running it again begins anew\n"


def test_a_bug_is_no_bare_key(monkeypatch, capsys):
    monkeypatch.setattr("any4_jax.cli.generate.open_model", lambda name, inputs: {}[name])
    assert main(["generate", "tiny", "--prompt", "x"]) == 1
    assert "KeyError" in capsys.readouterr().err


def test_columns_are_aligned():
    text = table(["name", "a"], [["x", "1"], ["longer", "234"]])
    assert text.splitlines() == ["name      a", "x         1", "longer  234"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("cli") / "ckpt")
    rules = ["--rules", r"layers\.4.*=none", "--rules", r".*\.down_proj=nf4"]
    assert main(["quantize", "tiny", out, "--group-size", "32", "--table-dtype", "int8", *rules]) == 0
    return out


def test_quantize_then_inspect(checkpoint, capsys):
    assert main(["inspect", checkpoint]) == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"^layers\.\d+\S+ +any4 ", shown, re.MULTILINE)) == 4 * 6
    assert len(re.findall(r"^layers\.\d+\S+ +nf4 ", shown, re.MULTILINE)) == 4
    assert "layers.4" not in shown
    # A rule's method takes the flags that it has too, but no dtype of learned tables; what "auto" came to is told.
    assert "nf4: clip=False group_size=32" in shown
    assert "sample_weight=second_moment" in shown


def test_inspect_names_a_damaged_file(checkpoint, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    victim = max((copy.rglob("*")), key=lambda path: path.stat().st_size if path.is_file() else 0)
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.write_bytes(raw)
    assert main(["inspect", str(copy)]) == 1
    assert victim.name in capsys.readouterr().err


def test_explain(checkpoint, capsys):
    assert main(["explain", checkpoint]) == 0
    shown = capsys.readouterr().out
    assert "layers.*.self_attn.q_proj  [64 x 64]  4 layers" in shown
    assert f"{'xla' if registration.why_not('cpu') else 'cpu'}: taken" in shown


def test_generate_streams_what_generate_returns(checkpoint, capsys):
    prompt = "Once upon a time, there was a"
    assert main(["generate", checkpoint, "--prompt", prompt, "--max-new-tokens", "40"]) == 0
    streams = capsys.readouterr()
    assert streams.out == a4.generate(a4.load(checkpoint), prompt, max_new_tokens=40) + "\n"
    assert re.search(r"40 tokens in .* tokens/s", streams.err)


def test_eval_writes_what_it_shows(checkpoint, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "results.json"
    text.write_text(stories())
    for model in ("tiny", checkpoint):
        assert main(["eval", model, "--text", str(text), "--seqlen", "128", "--windows", "6", "--out", str(out)]) == 0
        (result,) = json.loads(out.read_text())["results"].values()
        assert result["windows"] == len(result["window_nats_per_token"]) == 6
        assert f"{result['perplexity']:.4f}" in capsys.readouterr().out
        if model == "tiny":
            float_result = result
    # 4 bits cost something, and do not break the model.
    assert 0 < result["nats_per_token"] - float_result["nats_per_token"] < 0.5


def test_eval_against_another_model(checkpoint, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "results.json"
    text.write_text(stories())
    flags = ["--text", str(text), "--seqlen", "128", "--windows", "4", "--out", str(out)]
    assert main(["eval", checkpoint, "--against", "tiny", *flags]) == 0
    shown, written = capsys.readouterr().out, json.loads(out.read_text())
    (result,) = written["results"].values()
    compared = result["against"]
    assert (written["model"], written["against"]) == (checkpoint, "tiny")
    assert f"{result['perplexity']:.4f}" in shown and f"{compared['kl_nats_per_token']:.5f}" in shown
    assert f"{compared['kl_standard_error']:.5f}" in shown and f"{compared['top1_agreement']:.2%}" in shown
    assert 0 < compared["kl_standard_error"] < compared["kl_nats_per_token"] < 0.5 < compared["top1_agreement"] < 1
    assert compared["perplexity"] < result["perplexity"]  # the float model's
    assert len(compared["window_kl_nats_per_token"]) == 4


def test_demo_offline(tmp_path, capsys, monkeypatch):
    def unavailable():
        raise assets.AssetUnavailable("there is no network here")

    shorten(monkeypatch, tmp_path / "short", blocks=2)
    monkeypatch.setattr(assets, "fetch_smollm2", unavailable)
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--windows", "4", "--group-size", "32"]) == 0
    shown = capsys.readouterr().out
    assert "there is no network here" in shown
    assert "serves instead" in shown
    lines = shown.splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 120
    for method in ("float", "int4", "nf4", "any4"):
        assert any(line.startswith(method) and "+-" in line for line in lines)
    assert "the same 24 tokens" in shown
    assert (out / "any4.json").is_file()
