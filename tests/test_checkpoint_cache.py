"""The cache that a checkpoint carries: saved, loaded, used where no other is asked for, and damaged."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import any4_jax as a4
from any4_jax.checkpoint.contents import build, current, describe, taking
from any4_jax.cli import main
from any4_jax.data import texts
from any4_jax.evaluation.cached import reading
from any4_jax.generate import loop
from any4_jax.kv_cache import DefaultCache, DenseCache, Kivi, KVQuant, RoundedAttention, default_cache
from any4_jax.kv_cache.nonuniform import Levels
from any4_jax.models.tiny import random_llama

LEVELS = Levels(
    np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4),
    np.ones((2, 2, 8), np.float32),
    np.zeros((2, 2, 8), np.float32),
    np.linspace(-2, 1, 8, dtype=np.float32).reshape(2, 4),
)
COARSE = KVQuant(2, sinks=0, recent=4, levels=jax.tree.map(jax.numpy.asarray, LEVELS))


@pytest.mark.parametrize("cache", [COARSE, Kivi(2, residual=32)])
def test_a_cache_comes_back_and_stays(cache: Any, tmp_path: Path) -> None:
    model = random_llama()
    a4.save(tmp_path / "a", model, cache=cache)
    assert default_cache(model) is None, "the model itself was changed"
    loaded = a4.load(tmp_path / "a", into=jax.eval_shape(lambda: model))
    a4.save(tmp_path / "b", a4.quantize_model(loaded, a4.methods.NF4(group_size=8)))
    for found in map(default_cache, (loaded, a4.load(tmp_path / "b"))):
        assert repr(found) == repr(cache)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(found), jax.tree.leaves(cache))
    a4.save(tmp_path / "b", loaded, cache=DenseCache)
    assert default_cache(a4.load(tmp_path / "b")) is None


def test_it_is_used_where_no_other_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = random_llama(), random_llama()
    model.cache = DefaultCache(COARSE)
    assert reading(plain, None) is plain
    assert reading(model, None).args[1] is COARSE and reading(model, DenseCache).args[1].factory is DenseCache
    used: list[Any] = []
    monkeypatch.setattr(loop, "_prefill", lambda program, slots, cache, *_: used.append(cache) or 1 / 0)
    for each, given in ((model, {}), (model, {"cache": DenseCache}), (plain, {})):
        with pytest.raises(ZeroDivisionError):
            a4.generate(each, [1, 2], **given)
    assert used[0] is COARSE and [each.factory for each in used[1:]] == [DenseCache] * 2


def changed(change: Any) -> str:
    """The message about a content whose cache was changed."""
    arrays: dict[str, Any] = {}
    content = copy.deepcopy(describe(random_llama(), arrays, COARSE))
    change(content["cache"], arrays)
    with pytest.raises(ValueError) as caught:
        build(current(content), taking(arrays))
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c, a: c.update(cache="kv9"), "got a cache 'kv9', this version knows kvquant, kivi"),
        (lambda c, a: c["fields"].update(depth=3), "its cache 'kvquant' has no field 'depth' in this version"),
        (lambda c, a: c["tables"].update(bits={}), "has no field 'bits' in this version"),
        (lambda c, a: c["fields"].update(bits="x"), "bits is x, and 4, 3 or 2 is needed"),
        (lambda c, a: c["fields"].update(outliers=[]), "can't be made of its fields"),
        (lambda c, a: c["tables"]["levels"].pop("keys"), "can't be made of its fields .*missing 1 required"),
        (lambda c, a: c["tables"].clear(), "doesn't fit the model .*has no levels yet"),
        (lambda c, a: c["fields"].update(bits=3), "levels of shapes .*don't belong together"),
        (
            lambda c, a: a.update({f"kv_cache/levels/{n}": LEVELS[i][:1] for i, n in enumerate(LEVELS._fields)}),
            "1 block",
        ),
        (lambda c, a: c["tables"]["levels"].update(keys="none"), "the array 'none', which any4.json lacks"),
        (lambda c, a: c.update(more=1), "cache.more is unknown"),
    ],
)
def test_a_damaged_cache_is_refused(change: Any, words: str) -> None:
    assert re.search(words, changed(change))


def test_what_a_checkpoint_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got the cache RoundedAttention, which a checkpoint is read without unless"):
        a4.save(tmp_path / "a", random_llama(), cache=RoundedAttention())
    with pytest.raises(TypeError, match="got a cache for a dict, and a Decoder is needed"):
        a4.save(tmp_path / "a", {"a": np.ones(3)}, cache=Kivi())
    with pytest.raises(ValueError, match="KVQuant has no levels yet; learn them"):
        a4.save(tmp_path / "a", random_llama(), cache=KVQuant())
    with pytest.raises(ValueError, match="KVQuant has levels of 1 blocks with keys of 3 x 8 channels"):
        a4.save(tmp_path / "a", random_llama(), cache=KVQuant().stand_in(1, 3, 8))
    assert not (tmp_path / "a").exists()


def test_flags_of_quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("any4_jax.cli.quantize.models.load", lambda _: random_llama())
    monkeypatch.setattr(
        "any4_jax.cli.quantize.calibrate_cache", lambda _, cache, data, **__: seen.append(data) or COARSE
    )
    # The model has no tokenizer for the text.
    quantize = a4.quantize_model
    monkeypatch.setattr("any4_jax.cli.quantize.quantize_model", lambda model, method, **_: quantize(model, method))
    out = str(tmp_path / "out")
    assert main(["quantize", "any", out, "--method", "nf4", "--cache", "kvquant", "--cache-bits", "2"]) == 0
    assert seen == [texts.prompt()]
    assert main(["inspect", out]) == 0
    assert "cache: kvquant, bits 2, outliers 0.01, recent 4" in capsys.readouterr().out
    flags = ["--method", "nf4", "--cache", "kvquant", "--calibrate", "none"]
    assert main(["quantize", "any", out, *flags]) == 2
    assert "which learns from a text, and there is none; name one by --calibrate" in capsys.readouterr().err
    # The checkpoint's is taken if it has what is asked for; there is no tokenizer to learn another one with.
    assert main(["eval", out, "--text", __file__, "--cache", "kvquant", "--cache-bits", "3"]) == 1
    assert "has no tokenizer, and --cache kvquant has to learn from a text" in capsys.readouterr().err
