"""What CONTRIBUTING.md says about adding things, followed from outside of the package."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import any4_jax as a4
from any4_jax.cli import main
from any4_jax.formats import Format
from any4_jax.methods import CATALOGUE
from any4_jax.methods.rtn import RoundToNearest
from any4_jax.methods.spec import method_from_json, method_to_json
from any4_jax.models.tiny import random_llama
from any4_jax.statistics import Statistic

REPOSITORY = Path(__file__).resolve().parent.parent
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
ADDING = CONTRIBUTING.split("## Add a ...")[1].split("\n## ")[0]
ENTRIES = {
    name: " ".join(text.split()) for name, text in re.findall(r"(?s)\n- \*\*([^*]+)\*\*: (.+?)(?=\n- |\Z)", ADDING)
}
FILE = re.compile(r"`([\w./]+\.(?:py|md|h|cc|cu))`")

LEVELS = (-1.0, -0.5, -0.25, -0.125, 0.0, 0.25, 0.5, 1.0)
N, K, GROUP = 16, 64, 16
TOKENS = np.random.default_rng(0).integers(0, 128, (2, 12), dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class Powers(RoundToNearest):
    """A format of 3 bits: powers of two, scaled by the group's max|w|.

    Attributes:
      finest: whether the level next to zero is an eighth; else it is a quarter, twice.
    """

    name: ClassVar[str] = "toy-powers"
    finest: bool = True

    def format(self, k: int) -> Format:
        del k
        levels = LEVELS if self.finest else (*LEVELS[:3], *LEVELS[2:3], *LEVELS[4:])
        return Format(bits=3, levels=tuple(sorted(levels)), rule="absmax")


@dataclasses.dataclass(frozen=True)
class Least:
    """A statistic: the smallest |x| of each input, over all tokens."""

    def empty(self, k: int) -> Any:
        return np.full(k, np.inf, np.float32)

    def update(self, accumulator: Any, x: Any, mask: Any) -> Any:
        return jnp.minimum(accumulator, jnp.where(mask[:, None], jnp.abs(x), jnp.inf).min(axis=0, initial=jnp.inf))

    def merge(self, a: Any, b: Any) -> Any:
        return jnp.minimum(a, b)

    def scaled(self, accumulator: Any, factor: Any) -> Any:
        return accumulator * factor


@dataclasses.dataclass(frozen=True)
class Watching(Powers):
    """The format again, by a method that asks for a statistic of its own."""

    name: ClassVar[str] = "toy-watching"
    needs: ClassVar[tuple[Statistic, ...]] = (Least(),)


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOGUE, Powers.name, Powers)


def weights() -> np.ndarray:
    return np.random.default_rng(1).standard_t(3, (N, K)).astype(np.float32)


def test_a_format_is_quantized_to_its_nearest_levels() -> None:
    w = weights()
    q = a4.quantize(jnp.asarray(w), Powers(group_size=GROUP))
    assert (q.bits, q.shape, q.lut.tolist()) == (3, (N, K), [list(LEVELS)])
    assert q.bits_per_weight == 3 + 16 / GROUP + 8 * 16 / (N * K)
    groups = w.reshape(N, -1, GROUP)
    scales = np.asarray(q.scales, np.float32)[..., None]
    candidates = scales[..., None] * np.asarray(LEVELS, np.float32)
    nearest = np.abs(candidates - groups[..., None]).min(axis=-1)
    chosen = np.abs(np.asarray(a4.dequantize(q)).reshape(groups.shape) - groups)
    np.testing.assert_allclose(chosen, nearest, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", [None, "xla"])
def test_a_format_is_multiplied_by_every_kernel_that_can(backend: str | None) -> None:
    x = np.random.default_rng(2).normal(size=(3, K)).astype(np.float32)
    q = a4.quantize(jnp.asarray(weights()), Powers(group_size=GROUP))
    expected = x.astype(np.float64) @ np.asarray(a4.dequantize(q), np.float64).T
    np.testing.assert_allclose(a4.matmul(x, q, backend=backend), expected, rtol=1e-5, atol=1e-4)


def test_a_format_is_saved_with_its_method_and_loaded(listed: None, tmp_path: Path) -> None:
    method = Powers(finest=False, group_size=GROUP)
    model = a4.quantize_model(random_llama(), method)
    a4.save(tmp_path / "model", model)
    again = a4.load(tmp_path / "model")
    assert again.recipe == model.recipe and {m for _, m, _ in again.recipe.linears} == {method}
    for loaded, saved in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (again, model)), strict=True):
        np.testing.assert_array_equal(loaded[1].get_value(), saved[1].get_value())
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))


def test_a_method_that_is_not_in_the_catalogue_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="got the method Powers, .* under 'toy-powers'; add it there"):
        method_to_json(Powers())
    with pytest.raises(
        ValueError, match="got a method 'toy-powers', this version knows int, nf4, .* or import the module"
    ):
        method_from_json({"method": "toy-powers", "fields": {}})


def test_a_method_in_the_catalogue_comes_back_from_json(listed: None) -> None:
    method = Powers(finest=False, group_size=32)
    assert method_from_json(method_to_json(method)) == method


def test_a_method_in_the_catalogue_is_on_the_command_line(
    listed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    flags = ["--method", "toy-powers", "--no-finest", "--group-size", "32", "--rules", r"layers\.[1-4].*=none"]
    assert main(["quantize", "tiny", out, "--calibrate", "none", *flags]) == 0
    assert main(["inspect", out]) == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"^layers\.0\S+ +toy-powers ", shown, re.MULTILINE)) == 7
    assert "toy-powers: clip=False finest=False group_size=32" in " ".join(shown.replace(",", "").split())


def test_a_statistic_is_gathered_where_a_method_needs_it() -> None:
    model, path = random_llama(), "layers.0.self_attn.q_proj"
    whole, first, second = (
        a4.calibrate(model, tokens, Watching())[path][Least()] for tokens in (TOKENS, TOKENS[:1], TOKENS[1:])
    )
    np.testing.assert_allclose(Least().merge(first, second), whole, rtol=1e-5)
    assert np.isfinite(whole).all() and not np.array_equal(first, second)
    assert Least() not in a4.calibrate(model, TOKENS, Powers())[path]


def test_every_file_that_is_named_exists() -> None:
    named = FILE.findall(CONTRIBUTING)
    assert len(named) > 20
    assert [name for name in named if not (REPOSITORY / name).is_file()] == []
    folders = re.findall(r"`([\w./]+/)`", CONTRIBUTING)
    assert [name for name in folders if not (REPOSITORY / name).is_dir()] == []


def test_every_kind_of_thing_has_an_entry() -> None:
    kinds = ["method of one matrix", "method of a site", "method of a block", "statistic", "format"]
    assert list(ENTRIES) == [*kinds, "operator", "kernel", "solver's kernel", "model family", "cache"]


@pytest.mark.parametrize("kind", ENTRIES)
def test_an_entry_names_two_files_to_read_and_a_test(kind: str) -> None:
    reading, following = re.fullmatch(r"read (.+?`)\. Write .+ Walked through in (.+)\.", ENTRIES[kind]).groups()
    assert 1 <= len(FILE.findall(reading)) <= 2
    assert all(name.startswith("tests/") for name in FILE.findall(following)) and FILE.findall(following)
