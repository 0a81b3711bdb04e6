"""Every family computes what torch computes from its files: whole, cached, padded; and what llama.cpp computes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_goldens import FAMILIES, GGUFS, GOLDEN, VARIANTS, error, golden
from flax import nnx

import any4_jax as a4
from any4_jax.models import families, read_config
from any4_jax.models.families import by_gguf
from any4_jax.models.fold import fold, inputs_of, is_foldable
from any4_jax.models.gguf_file import GGUFFile
from any4_jax.models.gguf_metadata import Metadata
from any4_jax.models.tiny import random_llama


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_torch(variant: str) -> None:
    wanted = golden(variant)
    model = wanted.model()
    for length in set(wanted.lengths):
        rows = wanted.lengths == length
        got = model(wanted.tokens[rows][:, :length])
        assert error(got, wanted.logits[rows][:, :length]) < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_4_and_5_write_one_config(variant: str) -> None:
    old, new = golden(variant).configs
    assert read_config(old) == read_config(new)


@pytest.mark.parametrize("variant", FAMILIES)
def test_cached_decoding_equals_the_whole_forward(variant: str) -> None:
    wanted = golden(variant)
    model, tokens = wanted.model(), wanted.tokens
    rows, length = tokens.shape
    graphdef, state = nnx.split(model)

    @jax.jit
    def feed(state: Any, tokens: jax.Array, caches: Any, first: jax.Array) -> tuple:
        model = nnx.merge(graphdef, state)
        positions = first + jnp.arange(tokens.shape[1]) + jnp.zeros((rows, 1), jnp.int32)
        x, caches = model.decode(tokens, caches, positions)
        return model.head(x), caches

    # One token at a time from before the smallest window, 8, to past several of them.
    caches, got, first = model.init_cache(rows, length), [], 0
    for step in (6, *[1] * (length - 6)):
        piece, caches = feed(state, tokens[:, first : first + step], caches, first)
        got.append(np.asarray(piece))
        first += step
    assert error(np.concatenate(got, axis=1), wanted.logits) < 1e-4


# One of each way to see positions: two ropes and windows, experts, learned positions.
@pytest.mark.parametrize("variant", ["gemma3", "mixtral", "opt"])
def test_rows_padded_on_the_left_equal_their_single_runs(variant: str) -> None:
    wanted = golden(variant)
    model, length = wanted.model(), 20
    start = np.asarray([0, 9], np.int32)
    rows = np.stack([np.roll(row[:length], first) for row, first in zip(wanted.tokens[[0, 0]], start, strict=True)])

    @jax.jit
    def run(model: Any) -> jax.Array:
        caches = model.init_cache(2, length, start=jnp.asarray(start))
        x, _ = model.decode(rows, caches, jnp.arange(length, dtype=jnp.int32) - start[:, None])
        return model.head(x)

    got = np.asarray(run(model))
    assert np.isfinite(got).all()
    for row, first in zip(got, start, strict=True):
        assert error(row[first:], wanted.logits[0, : length - first]) < 1e-4


@pytest.mark.parametrize("variant", ["rope_dynamic", "rope_longrope"])
def test_a_row_within_the_original_context_is_not_rotated_for_a_longer_row(variant: str) -> None:
    wanted = golden(variant)
    model = wanted.model()
    length, own = 40, 20
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, length)).astype(np.int32)
    start = np.asarray([0, length - own], np.int32)
    assert own < model.config.rope_scaling.original_max_position_embeddings < length

    @jax.jit
    def run(model: Any) -> jax.Array:
        caches = model.init_cache(2, length, start=jnp.asarray(start))
        x, _ = model.decode(tokens, caches, jnp.arange(length, dtype=jnp.int32)[None] - start[:, None])
        return model.head(x)

    got = np.asarray(run(model))
    for row, first, alone in zip(got, start, tokens, strict=True):
        assert error(row[first:], np.asarray(model(alone[None, first:]))[0]) < 1e-5


@pytest.mark.parametrize("variant", FAMILIES)
def test_sites_hold_every_linear_once_and_factors_fold_into_what_is_before_them(variant: str) -> None:
    """The float model stays the same within 1e-5 of its logits' scale."""
    wanted = golden(variant)
    model, rng = wanted.model(), np.random.default_rng(0)
    plain = np.asarray(model(wanted.tokens))
    for index, block in enumerate(model.layers):
        linears = {".".join(map(str, path)) for path, node in nnx.iter_modules(block) if isinstance(node, nnx.Linear)}
        named = [path for site in model.sites(index) for path in site.linears]
        assert sorted(named) == sorted(linears)
        for site in model.sites(index):
            if is_foldable(block, site):
                factor = rng.uniform(0.5, 2, inputs_of(block, site) // site.repeat)
                factor = np.repeat(factor.reshape(-1, site.width), site.repeat, axis=0).reshape(-1)
                block, leftover = fold(block, site, factor)
                assert leftover is None
        model.layers[index] = block
    assert error(model(wanted.tokens), plain) < 1e-5


def test_every_family_has_a_golden_or_is_llama() -> None:
    configs = [read_config(golden(variant).configs[0]) for variant in FAMILIES]
    covered = {families.family_of_config(config).name for config in (*configs, random_llama().config)}
    ours = {name for name, family in families.FAMILIES.items() if family.module.__module__.startswith("any4_jax.")}
    assert ours <= covered


@pytest.mark.parametrize("variant", FAMILIES)
def test_it_is_quantized_saved_loaded_and_generates(variant: str, tmp_path) -> None:
    wanted = golden(variant)
    model = wanted.model()
    method = a4.methods.Any4(group_size=16, table_dtype="float32", scale_dtype="float32")
    quantized = a4.quantize_model(model, method, data=wanted.tokens[:, :16])
    assert set(a4.surgery.quantized_leaves(quantized)) == _linears(model)
    lost = np.linalg.norm(np.asarray(quantized(wanted.tokens)) - wanted.logits) / np.linalg.norm(wanted.logits)
    assert 1e-3 < lost < 0.4
    a4.save(tmp_path / "saved", quantized)
    loaded = a4.load(tmp_path / "saved")
    prompts = [list(map(int, wanted.tokens[0, :n])) for n in (5, 9)]
    got = a4.generate(loaded, prompts, max_new_tokens=6, eos=())
    assert got == a4.generate(quantized, prompts, max_new_tokens=6, eos=())
    assert [len(row) for row in got] == [6, 6]


def _linears(model: Any) -> set[str]:
    """The dotted paths of all linears but the head and routers."""
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model)) if path[-1] == "kernel"]
    return {".".join(map(str, path[:-1])) for path in paths if path[-2] not in ("lm_head", "router")}


@pytest.mark.parametrize("name", GGUFS)
def test_a_gguf_gives_the_logits_of_llama_cpp(name: str) -> None:
    with np.load(GOLDEN / "family_gguf.npz") as file:
        tokens, logits, torch = (file[f"{name}/{key}"] for key in ("tokens", "logits", "torch"))
    got = a4.models.load(GOLDEN / f"gguf_{name}.gguf", dtype="float32")(tokens[None])[0]
    assert error(got, torch) < 1e-4
    assert error(got, logits) < 2e-3


def test_a_gemma_2_file_without_caps_or_window_has_those_of_the_published_models() -> None:
    file = GGUFFile(GOLDEN / "gguf_gemma2.gguf")
    keys = ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window")
    file.metadata = Metadata(
        file.path, {key: value for key, value in file.metadata.items() if key.partition(".")[2] not in keys}, {}
    )
    config = by_gguf("gemma2")[1].read_config(file)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert config.windows[:2] == (4096, None)
