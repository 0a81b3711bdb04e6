"""What `any4 generate` does with a chat template, prompts from files and stdin, and modules to import."""

import io
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import any4_jax as a4
from any4_jax.cli import compiled, main, output
from any4_jax.cli.completion import script
from any4_jax.cli.sizes import expected, where_the_bits_go
from any4_jax.data import assets
from any4_jax.models import Tokenizer
from any4_jax.surgery import quantized_leaves

RAW = ["generate", "tiny", "--raw", "--max-new-tokens", "8"]


@pytest.fixture
def asked(monkeypatch):
    """The tiny model gets a chat template, which writes the contents one after another; the messages that it saw."""
    seen = []

    def open_model(name, inputs):
        model = a4.models.load(name)
        model.tokenizer.chat_template = "a template"
        return model

    def encode_chat(self, messages):
        seen.append([dict(message) for message in messages])
        return self.encode(" ".join(message["content"] for message in messages))

    monkeypatch.setattr(Tokenizer, "encode_chat", encode_chat, raising=False)
    monkeypatch.setattr("any4_jax.cli.generate.open_model", open_model)
    return seen


@pytest.fixture
def typed(monkeypatch):
    """Gives stdin these bytes."""
    return lambda raw: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))


def test_generate_answers_with_the_template_and_raw_continues(asked, capsys) -> None:
    prompt = ["--prompt", "Once upon"]
    assert main(["generate", "tiny", "--max-new-tokens", "8", "--system", "Be kind.", *prompt]) == 0
    assert asked == [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Once upon"}]]
    assert len(capsys.readouterr().out) > 10
    assert main([*RAW, *prompt]) == 0
    assert len(asked) == 1
    assert capsys.readouterr().out == a4.generate(a4.models.load("tiny"), "Once upon", max_new_tokens=8) + "\n"


@pytest.mark.parametrize("raw", [b"Once upon", b"Once upon\n", b"Once upon\r\n"])
def test_a_prompt_from_a_file_or_stdin_is_that_of_the_command_line(raw, asked, typed, tmp_path, capsys) -> None:
    (tmp_path / "prompt").write_bytes(raw)
    typed(raw)
    texts = []
    for source in (["--prompt", "Once upon"], ["--prompt", "-"], ["--prompt-file", tmp_path / "prompt"]):
        assert main([*RAW, *map(str, source)]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] != "\n"


@pytest.mark.parametrize(("raw", "code", "words"), [(b"", 2, "is empty"), (b"\xff", 1, "on stdin is not UTF-8 text")])
def test_stdin_is_refused_like_any_prompt(raw, code, words, asked, typed, capsys) -> None:
    typed(raw)
    assert main([*RAW, "--prompt", "-"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize(("raw", "advice"), [(["--raw"], "another prompt"), ([], "try --raw")])
def test_a_model_that_ends_at_once_is_told(raw, advice, asked, monkeypatch, capsys) -> None:
    monkeypatch.setattr("any4_jax.cli.sampling.generate_tokens", lambda *_, **__: iter([[[]]]))
    assert main(["generate", "tiny", "--prompt", "x", *raw]) == 0
    assert f"the model ended at once, without a word; {advice}" in capsys.readouterr().err.replace(
        "try another", "another"
    )


MODULE = """
import dataclasses
from typing import ClassVar
from any4_jax.methods import CATALOGUE, Int

@dataclasses.dataclass(frozen=True)
class Own(Int):
    name: ClassVar[str] = "own"
    care: int = 1

CATALOGUE["own"] = Own
"""


def test_an_imported_module_brings_methods_with_their_flags(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "own_methods.py").write_text(MODULE)
    (tmp_path / "broken_methods.py").write_text("import nothing_of_that_name")
    monkeypatch.syspath_prepend(tmp_path)
    show = ["quantize", "--method", "own", "--help"]
    assert main(show) == 2
    for argv in (["--import", "own_methods", *show], [*show, "--import", "own_methods"]):
        capsys.readouterr()
        assert main(argv) == 0
        assert "--care" in capsys.readouterr().out
    del a4.methods.CATALOGUE["own"]
    assert main(["--import", "broken_methods", *show]) == 1
    assert "nothing_of_that_name" in capsys.readouterr().err


def test_version_and_help(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"any4 {a4.__version__}\n"
    assert main(["quantize", "--help"]) == 0
    assert "any4 quantize --method M --help" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["any4", "qu"], ["quantize"]),
        (["any4", "bench", "g"], ["gemm"]),
        (["any4", "bench", "gemm", "--sh"], ["--shapes"]),
        (["any4", "quantize", "a", "b", "--method", "nf"], ["nf4"]),
        (["any4", "quantize", "a", "b", "--zero"], ["--zero-point"]),
        (["any4", "eval", "READ"], ["README.md"]),
        (["any4", "--ver"], ["--version"]),
    ],
)
def test_the_shell_completes(words, offered, tmp_path) -> None:
    (tmp_path / "README.md").touch()
    line = f'COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; _any4; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", f"{script()}\n{line}"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout.split(), done.stderr) == (offered, "")


def test_zsh_loads_the_script_of_bash(capsys) -> None:
    assert main(["completion", "zsh"]) == 0
    shown = capsys.readouterr().out
    assert "bashcompinit" in shown and shown.endswith(script())


@pytest.mark.parametrize("method", [a4.methods.Any4(bits=3, group_size=32), a4.methods.NF4()], ids=lambda m: m.name)
def test_sizes_before_and_after_are_those_of_the_arrays(method) -> None:
    model = a4.models.load("tiny")
    line = expected(model, method, [(r".*mlp.*", a4.methods.Int(8))])
    leaves = quantized_leaves(a4.quantize_model(model, method, rules=[(r".*mlp.*", a4.methods.Int(8))])).values()
    stored, weights = sum(leaf.nbytes for leaf in leaves), sum(leaf.shape[0] * leaf.shape[1] for leaf in leaves)
    assert line.startswith(f"to quantize: {len(leaves)} layers, ")
    assert f"-> {output.megabytes(stored)} MB ({8 * stored / weights:.2f} bits per weight)" in line
    after = where_the_bits_go(leaves)
    parts = {
        words.split()[0]: float(words.split()[1]) for words in after.removeprefix("bits per weight: ").split(", ")[:4]
    }
    assert sum(parts.values()) == pytest.approx(8 * stored / weights, abs=0.002)
    assert ("each row has a table, shared by its 64 weights" in after) == (method.name == "any4")


def test_the_size_is_told_for_a_method_that_needs_statistics() -> None:
    """GPTQ stores what its inner method does, and tells as much without data."""
    model, inner = a4.models.load("tiny"), a4.methods.NF4(group_size=32)
    line = expected(model, inner, [])
    assert " MB (4." in line and expected(model, a4.methods.GPTQ(inner), []) == line


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys) -> None:
    clock = iter([0.0, 1.0, 11.0, 12.0, 40.0])
    monkeypatch.setattr(output.time, "monotonic", lambda: next(clock))
    with output.progress("quantize", "linear") as bar:
        for done in (1, 2, 3, 4):
            bar(done, 4, "path")
    assert capsys.readouterr().err == "quantize: 2 of 4 linears, about 11 s left\n"


def test_smollm2_is_a_name_like_tiny(monkeypatch, tmp_path) -> None:
    def unavailable():
        raise assets.AssetUnavailable("there is no network here")

    monkeypatch.setattr(assets, "fetch_smollm2", unavailable)
    with pytest.raises(assets.AssetUnavailable, match="no network here"):
        a4.models.load("smollm2")
    with pytest.raises(FileNotFoundError, match="or tiny or smollm2"):
        a4.models.load("smollm3")
    (tmp_path / "model.gguf").write_bytes(b"")
    monkeypatch.setattr(assets, "fetch_smollm2", lambda: tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"model\.gguf"):
        a4.models.load("smollm2")


@pytest.mark.parametrize(
    ("variables", "own", "on"),
    [
        ({}, {}, True),
        ({"ANY4_NO_COMPILATION_CACHE": "1"}, {}, False),
        ({}, {"jax_enable_compilation_cache": False}, False),
        ({}, {"jax_compilation_cache_dir": "/own"}, False),
        ({"ANY4_CACHE": "/dev/null"}, {}, False),
    ],
)
def test_compiled_programs_are_kept_in_the_users_cache(variables, own, on, tmp_path, monkeypatch) -> None:
    names = ("dir", "max_size")
    before = {f"jax_compilation_cache_{name}": getattr(jax.config, f"jax_compilation_cache_{name}") for name in names}
    others = ("jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")
    before |= {name: getattr(jax.config, name) for name in others}
    start = {"jax_compilation_cache_dir": None, "jax_enable_compilation_cache": True} | own
    for name, value in ({"ANY4_CACHE": str(tmp_path)} | variables).items():
        monkeypatch.setenv(name, value)
    try:
        for name, value in start.items():
            jax.config.update(name, value)
        compiled.keep()
        folder, size = jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    if on:
        assert (Path(folder).parent, size) == (tmp_path / "compiled", compiled.MOST_BYTES)
    else:
        assert (folder, size) == (start["jax_compilation_cache_dir"], before["jax_compilation_cache_max_size"])


SAMPLED = [*RAW, "--prompt", "Once upon", "--temperature", "1", "--seed", "3"]


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (["--min-p", "0.2"], {"min_p": 0.2}),
        (["--repetition-penalty", "1.5"], {"repetition_penalty": 1.5}),
        (["--presence-penalty", "1"], {"presence_penalty": 1.0}),
        (["--frequency-penalty", "1"], {"frequency_penalty": 1.0}),
        (["--stop", "zzz", "--stop", "e"], {"stop": ["zzz", "e"]}),
        (["--n", "2"], {"n": 2}),
    ],
)
def test_flags_of_sampling_are_the_arguments_of_generate(flags, settings, capsys) -> None:
    assert main([*SAMPLED, *flags]) == 0
    fixed = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    texts = a4.generate(a4.models.load("tiny"), "Once upon", **fixed, **settings)
    written = texts if isinstance(texts, str) else "\n".join(f"--- {i}\n{text}" for i, text in enumerate(texts, 1))
    assert capsys.readouterr().out == written + "\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--min-p", "0.5"], "got --min-p without a temperature"),
        (["--n", "2"], "got --n without a temperature"),
        (["--n", "0"], "--n: got '0'"),
        (["--min-p", "2"], "--min-p: got '2', need a number of at least 0 and at most 1"),
        (["--repetition-penalty", "0"], "need a number above 0"),
        (["--presence-penalty", "3"], "of at least -2 and at most 2"),
        (["--stop", ""], "got an empty --stop"),
    ],
)
def test_flags_of_sampling_are_refused(flags, words, capsys) -> None:
    assert main([*RAW, "--prompt", "x", *flags]) == 2
    assert words in capsys.readouterr().err
