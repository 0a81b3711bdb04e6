"""`any4 tune`: its flags reach the training, its checkpoint says what it was trained on, and `eval` heeds that."""

import dataclasses
import json

import pytest

import any4_jax as a4
from any4_jax.cli import main, tune
from any4_jax.data import stories
from any4_jax.data.passages import sketch
from any4_jax.surgery import Training, map_operators


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("tune") / "int"
    assert main(["quantize", "tiny", str(out), "--method", "int", "--group-size", "32", "--calibrate", "none"]) == 0
    return out


def test_a_checkpoint_is_trained_and_not_measured_on_the_same_text(tmp_path, checkpoint, monkeypatch, capsys) -> None:
    """The training itself has tests of its own; here a model comes back as it was, with the record of one."""
    seen = {}

    def trained(model, teacher, data, *, progress, finished, **settings):
        seen.update(settings, data=data, teacher=teacher)
        progress(1, 1, "")
        found = {**settings, "kl_before": 0.5, "kl_after": 0.25, "best_step": 7}
        new = map_operators(model, lambda path, leaf: leaf)
        rows = [model.tokenizer.encode(stories())]
        record = Training("end to end", tuple(sorted(found.items())), len(rows[0]), sketch(rows))
        new.recipe = dataclasses.replace(model.recipe, training=(record,))
        return new

    monkeypatch.setattr(tune, "tune", trained)
    text, out = tmp_path / "stories.txt", tmp_path / "tuned"
    text.write_text(stories())
    flags = ["--teacher", "tiny", "--data", str(text), "--steps", "9", "--learning-rate", "0.002", "--norms"]
    assert main(["tune", str(checkpoint), str(out), *flags, "--seqlen", "100", "--samples", "5", "--seed", "3"]) == 0
    assert seen["data"].shape == (5, 100) and type(seen["teacher"]).__name__ == "Llama"
    wanted = {"steps": 9, "learning_rate": 0.002, "norms": True, "seqlen": 100, "batch_size": 8, "seed": 3}
    assert {name: seen[name] for name in wanted} == wanted
    printed = capsys.readouterr().out
    assert "held-out rows: 0.5000 nats per token before, 0.2500 after 7 of 9 steps; trained on 3588 tokens" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stories.txt", "tuned"]

    assert a4.load(out).recipe.training[0].tokens == 3588
    assert main(["inspect", str(out)]) == 0
    assert "trained (end to end) on 3588 tokens: batch_size=8 best_step=7 kl_after=0.25" in capsys.readouterr().out
    measure = ["eval", str(out), "--text", str(text), "--seqlen", "64", "--windows", "2"]
    assert main(measure) == 1
    assert "got a text with passages of 64 tokens that the model was trained on" in capsys.readouterr().err
    results = tmp_path / "results.json"
    assert main([*measure, "--allow-training-text", "--out", str(results)]) == 0
    assert json.loads(results.read_text())["method"] == "int, trained end to end"


def test_a_training_without_a_gain_says_so() -> None:
    told = {"best_step": 0, "steps": 9, "kl_after": 0.5}
    assert tune.reached(told) == "and no less in 9 steps, so that all weights stay as they were"
    assert tune.reached(told | {"best_step": 8}) == "0.5000 after 8 of 9 steps"
