"""`any4 bench decode`: who takes part, what is written of whom, and the random models. No timing is asserted."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from any4_jax.benchmarks import contestants, decode, machine, plot, profile, read, shapes, timing
from any4_jax.benchmarks.contestants import Contestant, Entry
from any4_jax.cli import main
from any4_jax.methods import quantize
from any4_jax.models.tiny import random_llama, tiny

GIGA = 10**9


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> timing.StreamingRead:
    """A streaming read of 1 MB, which measures nothing and costs nothing."""
    monkeypatch.setattr(timing, "STREAM_BYTES", {"cpu": 2**20})
    return timing.StreamingRead("cpu")


def test_decode_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "r.json")
    argv = ["bench", "decode", "tiny", "--contexts", "4", "--tokens", "2", "--rounds", "1", "--out", out]
    assert main(argv) == 0, capsys.readouterr().err
    (row,) = read(out).rows
    assert (row["model"], row["method"], row["head"], row["dtype"]) == ("tiny", "float", "float", "float32")
    assert (row["prompt_tokens"], row["batch"], row["speed_ratio_to_first"]) == (4, 1, 1)
    assert "tiny" in capsys.readouterr().out


def test_decode_of_a_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, svg = str(tmp_path / "r.json"), tmp_path / "r.svg"
    argv = ["bench", "decode", "--shape", "tiny-llama", "--methods", "bfloat16,nf4", "--head", "int8", "--batch", "2"]
    argv += ["--contexts", "4,5", "--tokens", "2", "--rounds", "1", "--out", out, "--svg", str(svg)]
    assert main(argv) == 0, capsys.readouterr().err
    rows = read(out).rows
    assert [(row["prompt_tokens"], row["batch"], row["method"], row["head"]) for row in rows] == [
        (context, 2, *kind) for context in (4, 5) for kind in (("float", "float"), ("nf4", "int8"))
    ]
    for row in rows:
        assert row["decode_tokens_per_s"] == pytest.approx(row["batch"] * row["decode_tokens_per_s_of_a_row"], rel=1e-3)
        assert row["peak_gb"] > 0 and row["prefill_compile_s"] >= 0
    for line in ("float, float", "nf4, int8"):
        assert line in svg.read_text()
    # Two bytes a weight; half a byte and a scale for 128 of them; a byte, a scale and an offset. Each has one table.
    linears, head = 128 * 128 * 2 + 64 * 128 * 2 + 3 * 128 * 256, 64 * 128
    saved = linears * (2 - 0.5 - 2 / 128) - 7 * 32 + head * (2 - 1 - 4 / 128) - 512
    assert 1e6 * (rows[0]["read_mb_per_token"] - rows[1]["read_mb_per_token"]) == pytest.approx(saved, rel=1e-3)


@pytest.mark.parametrize(("of_step", "head"), [("LutTurns", "unknown"), ("LutTurns nvjet", "1.000 (1)")])
def test_a_profile_is_written_and_shown(
    of_step: str, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def decoding(chunks, tokens: int, wall_ms: float) -> dict:
        assert sum(len(row) for (row,) in chunks) == tokens + 1 and wall_ms > 0
        kernels = [profile.Kernel(name, 1e6 * i, 1e6) for i, name in enumerate(of_step.split() * tokens)]
        return profile.columns(kernels, {}, tokens, 5e3 * tokens)

    monkeypatch.setattr(profile, "PLATFORMS", ("cpu",))
    monkeypatch.setattr(profile, "decoding", decoding)
    out = str(tmp_path / "r.json")
    argv = ["bench", "decode", "--contexts", "4", "--tokens", "3", "--rounds", "1", "--profile", "--out", out]
    assert main(argv) == 0, capsys.readouterr().err
    (row,) = read(out).rows
    launches = len(of_step.split())
    assert (row["launches_per_token"], row["products_ms"], row["gaps_ms"]) == (launches, 1, 5000 - launches)
    shown = capsys.readouterr().out
    assert head in shown and "launches" in shown


@pytest.mark.parametrize("name", [name for name, method in shapes.METHODS.items() if method is not None])
def test_random_weights_have_the_form_that_their_method_gives(name: str) -> None:
    method = shapes.METHODS[name]
    assert method is not None
    n, k = 24, 200
    made = shapes.random_weight(1, n, k, method)
    made.check()
    form = jax.eval_shape(lambda w: method.apply(w, None).operator, jax.ShapeDtypeStruct((n, k), jnp.float32))
    assert jax.tree.structure(made) == jax.tree.structure(form)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(made)] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(form)
    ]
    if form.lut.shape[0] == 1:
        real = quantize(jax.random.normal(jax.random.key(3), (n, k)), method)
        assert np.array_equal(np.asarray(made.lut), np.asarray(real.lut))
    assert np.unique(np.asarray(jax.tree.leaves(made.codes)[0])).size > 100


@pytest.mark.parametrize(("method", "head"), [("bfloat16", "bfloat16"), ("nf4", "bfloat16"), ("nf4", "int8")])
def test_the_bytes_of_a_model_are_known_before_it_is_made(method: str, head: str) -> None:
    of = "tiny-llama", shapes.METHODS[method], shapes.METHODS[head]
    assert shapes.model_bytes(*of) == sum(leaf.nbytes for leaf in leaves(shapes.random_model(*of)))


def test_the_embedding_that_is_the_head_is_stored_once() -> None:
    blocks, embedding = 16 * (2048 * 2048 * 2 + 512 * 2048 * 2 + 3 * 2048 * 8192), 128256 * 2048
    norms = 2 * 2048 * (2 * 16 + 1)
    plain = shapes.model_bytes("llama-3.2-1b")
    assert plain == 2 * (blocks + embedding) + norms
    coded = shapes.model_bytes("llama-3.2-1b", None, shapes.METHODS["int8"])
    assert plain - coded == int(embedding * (2 - 1 - 4 / 128)) - 512


def test_bytes_a_token_reads() -> None:
    tied, free = tiny(), random_llama()
    assert tied.config.tie_word_embeddings and not free.config.tie_word_embeddings
    assert contestants.read_bytes(tied) == sum(leaf.nbytes for leaf in leaves(tied))
    embedding = free.config.vocab_size * free.config.hidden_size * 4
    assert contestants.read_bytes(free) == sum(leaf.nbytes for leaf in leaves(free)) - embedding


def leaves(model) -> list:
    return jax.tree.leaves(nnx.state(model))


@pytest.mark.parametrize(
    ("sizes", "room", "held", "notes"),
    [
        ({"a": 5, "b": 40}, None, [["a", "b"]], []),
        ({"a": 5, "b": 40}, 45, [["a", "b"]], []),
        ({"a": 5, "b": 40}, 44, [["a"], ["b"]], ["turns were taken among a, then b"]),
        ({"a": 5, "b": 5, "c": 8}, 10, [["a", "b"], ["c"]], ["turns were taken among a and b, then c"]),
        ({"a": 141, "b": 41}, 105, [["b"]], ["a is left out: its weights take 141.0 GB, and there is room for 105.0"]),
        ({"a": 141}, 105, [], ["a is left out"]),
    ],
)
def test_who_fits_in_memory_together(sizes: dict, room: int | None, held: list, notes: list[str]) -> None:
    entries = {name: Entry(lambda: pytest.fail("created"), size * GIGA) for name, size in sizes.items()}
    got, told = contestants.groups(entries, None if room is None else room * GIGA)
    assert got == held
    assert len(told) == len(notes) and all(words in note for words, note in zip(notes, told, strict=True))


def player(name: str, log: list[str] | None = None, fails: int | None = None, short: bool = False) -> Contestant:
    """One that writes its turns down; its memory is enough for fewer than `fails` rows."""

    def run(prompts: np.ndarray, tokens: int):
        if log is not None:
            log.append(name)
        if fails is not None and len(prompts) >= fails:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return iter([[[1]] * len(prompts)] * (tokens - short))

    return Contestant(run, 8, 8, {"model": name})


def test_contestants_exist_only_while_their_group_has_turns(stream: timing.StreamingRead) -> None:
    log: list[str] = []
    made: dict[str, weakref.ref[Contestant]] = {}

    def entry(name: str) -> Entry:
        def create() -> Contestant:
            log.append(f"+{name}")
            assert name != "c" or not any(other() for other in made.values())
            contestant = player(name, log)
            made[name] = weakref.ref(contestant)
            return contestant

        return Entry(create, 1)

    rows, (note,) = decode.run(
        {name: entry(name) for name in "abc"}, decode.Decode(tokens=2, rounds=2), stream=stream, room=2
    )
    assert log == ["+a", "+b", *"abbaab", "+c", *"ccc"]
    assert [row["model"] for row in rows] == ["a", "b", "c"] and "a and b, then c" in note


def test_who_runs_out_of_memory_has_no_row_and_a_note(stream: timing.StreamingRead) -> None:
    entries = {"a": Entry.of(player("a", fails=2)), "b": Entry.of(player("b"))}
    rows, notes = decode.run(entries, decode.Decode(batches=(1, 4), tokens=3, rounds=1), stream=stream)
    assert [(row["model"], row["batch"]) for row in rows] == [("a", 1), ("b", 1), ("b", 4)]
    assert notes == ["a ran out of memory with 4 prompts of 32 tokens"]
    assert rows[2]["speed_ratio_to_first"] is None


def test_a_context_that_is_too_short_is_refused_before_the_first_turn(stream: timing.StreamingRead) -> None:
    log: list[str] = []
    short = dataclasses.replace(player("b", log), context=10)
    entries = {"a": Entry.of(player("a", log)), "b": Entry.of(short)}
    with pytest.raises(ValueError, match="b has a context of 10 tokens, and 8 of a prompt with 3 new ones are 11"):
        decode.run(entries, decode.Decode((4, 8), tokens=3, rounds=1), stream=stream)
    assert log == []
    decode.run(entries, decode.Decode((4, 7), tokens=3, rounds=1), stream=stream)


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["tiny"], ["tiny"]),
        (["a/x", "a/y"], ["x", "y"]),
        (["a/x", "/b/x", "y"], ["a/x", "b/x", "y"]),
        (["a/x", "/c/a/x"], ["a/x", "c/a/x"]),
        (["x", "a/x"], ["x", "a/x"]),
        ([".", ".."], [".", ".."]),
    ],
)
def test_rows_tell_models_of_one_name_apart(names: list[str], labels: list[str]) -> None:
    assert contestants.labels(names) == dict(zip(names, labels, strict=True))


def test_nothing_measured_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 1000)
    assert main(["bench", "decode", "--shape", "tiny-llama", "--methods", "any4"]) == 1
    assert "nothing could be measured: any4 is left out: its weights take" in capsys.readouterr().err


def test_other_errors_of_the_device_are_raised(stream: timing.StreamingRead) -> None:
    def run(prompts: np.ndarray, tokens: int):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    broken = dataclasses.replace(player("a"), run=run)
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        decode.run({"a": Entry.of(broken)}, decode.Decode(), stream=stream)


def test_an_engine_that_stops_early_is_not_timed(stream: timing.StreamingRead) -> None:
    with pytest.raises(RuntimeError, match="got 3 new tokens, need 4"):
        decode.run({"a": Entry.of(player("a", short=True))}, decode.Decode(tokens=4, rounds=1), stream=stream)


def test_every_batch_meets_every_context() -> None:
    assert decode.Decode((8, 32), (1, 4)).cases == [(8, 1), (32, 1), (8, 4), (32, 4)]


@pytest.mark.parametrize("fields", [dict(contexts=()), dict(contexts=(4, 0)), dict(batches=()), dict(rounds=0)])
def test_what_is_measured_is_checked(fields: dict) -> None:
    with pytest.raises(ValueError, match="need 1 or more"):
        decode.Decode(**fields)


@pytest.mark.parametrize("speeds", [(0.4, 0.05), (380.0,), (301.0, 430.0, 1000.0), (7000.0, 1.0)])
def test_the_plot_holds_all_points(speeds: tuple[float, ...]) -> None:
    kind = dict(model="m", method="any4", head="float", dtype="bfloat16", batch=1)
    rows = [{**kind, "prompt_tokens": 2**i, "decode_tokens_per_s": speed} for i, speed in enumerate(speeds)]
    drawn = plot.decode_plot(rows, "title")
    assert drawn.count("<circle") == len(speeds) + 1 and "any4" in drawn  # one is the legend's
    for height in (float(part.split(chr(34))[0]) for part in drawn.split("cy=" + chr(34))[1:]):
        assert plot.TOP - 1e-6 <= height <= plot.HEIGHT - 50 + 1e-6
