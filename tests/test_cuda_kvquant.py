"""The CUDA step of a KVQuant cache: against float64 and XLA on a GPU, and how it is lowered and what it declines."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kvquant_contract import Case, draw, near_and_far, table, wanted

from any4_jax.kv_cache import PLAIN, KVQuant
from any4_jax.kv_cache.kvquant_step import BACKENDS
from any4_jax.kv_cache.one_token import step
from any4_jax.models.rope import Rope
from any4_jax.models.rope_scaling import DynamicScaling
from cuda_ffi import kvquant_attention, registration

why_not = registration.why_not("cuda")
gpu = pytest.mark.skipif(jax.default_backend() != "gpu" or why_not is not None, reason="needs an NVIDIA GPU")


@gpu
@pytest.mark.parametrize("case", table(), ids=str)
def test_a_step(case: Case) -> None:
    queries, held, positions = draw(case)
    settings = case.settings
    near, far = near_and_far(case)
    got = kvquant_attention.attend(
        jnp.asarray(queries),
        jax.tree.map(jnp.asarray, held),
        jnp.asarray(positions),
        near,
        far,
        bits=case.bits,
        scale=case.size**-0.5 if settings.scale is None else settings.scale,
        softcap=settings.softcap,
        window=settings.window,
    )
    # Half a unit in the last place, and numbers that two roundings take elsewhere than one.
    np.testing.assert_allclose(
        np.asarray(got, np.float64),
        wanted(case, queries, held, positions),
        rtol=0.51 * float(jnp.finfo(case.dtype).eps),
        atol=3e-4,
    )


FACTORY = KVQuant(4, recent=32).stand_in(1, 2, 64)
ROPE = Rope(64, 10000.0)
BY_LENGTH = DynamicScaling(factor=4.0, original_max_position_embeddings=128)


def token(rows: int = 2, heads: int = 8, groups: int = 2, size: int = 64, tokens: int = 1) -> list[jax.Array]:
    shapes = [(rows, tokens, n, size) for n in (heads, groups, groups)]
    return [jax.random.normal(jax.random.key(n), shape, jnp.bfloat16) for n, shape in enumerate(shapes)]


def cache(factory: KVQuant = FACTORY, groups: int = 2, size: int = 64, dtype: Any = jnp.bfloat16) -> Any:
    return factory.create(0, 2, 256, groups, size, jnp.asarray([0, 3], jnp.int32), dtype)


def loop(backend: str | None, count: int = 140):
    """Steps from a cache that is given away, as decoding runs them; each token's query is the mixture before it."""

    def run(queries: Any, keys: Any, values: Any, held: Any) -> tuple[jax.Array, Any]:
        def one(i: Any, carry: Any) -> Any:
            queries, held = carry
            positions = (held.length - held.start)[:, None]
            new = (x * jnp.cos(i + jnp.arange(64)).astype(x.dtype) for x in (keys, values))
            mixed, held = step(held, queries, *new, positions, rope=ROPE, backend=backend)
            return (mixed + queries).astype(queries.dtype) / 2, held

        return jax.lax.fori_loop(0, count, one, (queries, held))

    return jax.jit(run, donate_argnums=3)


@gpu
def test_a_loop_equals_xla_and_copies_no_cache() -> None:
    ours, theirs = (loop(backend)(*token(), cache()) for backend in (None, "xla"))
    np.testing.assert_allclose(*(np.asarray(x[0], np.float32) for x in (ours, theirs)), rtol=0.03, atol=0.03)
    for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
        # Where XLA rounds otherwise, a few codes differ.
        assert (np.asarray(a) == np.asarray(b)).mean() > 0.99
    text = loop(None).lower(*token(), cache()).compile().as_text()
    assert kvquant_attention.TARGET in text
    for leaf in jax.tree.leaves((cache().keys, cache().values)):
        kind = {"uint8": "u8", "uint16": "u16", "bfloat16": "bf16"}[leaf.dtype.name]
        assert re.findall(rf"= {kind}\[{','.join(map(str, leaf.shape))}\]\S* copy\(", text) == []


@pytest.fixture
def as_if_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose library isn't called, only lowered to."""
    monkeypatch.setattr(registration, "_register", lambda kind: object())


def lowered(function: Any, *arguments: Any) -> str:
    """StableHLO for an NVIDIA GPU, which this machine needn't have."""
    checks = [jax.export.DisabledSafetyCheck.custom_call(kvquant_attention.TARGET)]
    return jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*arguments).mlir_module()


@pytest.mark.usefixtures("as_if_built")
def test_a_token_is_lowered_to_one_call_and_a_prompt_to_none() -> None:
    text = lowered(loop(None), *token(), cache())
    assert text.count(f"@{kvquant_attention.TARGET}(") == 1 and "stablehlo.dot_general" not in text
    positions = jnp.asarray([[0, 1]] * 2, jnp.int32)
    text = lowered(lambda *new: cache().append_attend(*new, positions, ROPE)[0], *token(tokens=2))
    assert f"@{kvquant_attention.TARGET}(" not in text and "stablehlo.dot_general" in text


@pytest.mark.usefixtures("as_if_built")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 3}, "there are 3 new tokens a row, not 1"),
        ({"size": 96}, "a head has 96 channels, not 64 or 128"),
        ({"factory": KVQuant(outliers=0.4)}, "a token has slots for 52 outliers, more than 48"),
        ({"rope": Rope(64, 1e4, BY_LENGTH)}, "the rope's angles aren't proportional to the position"),
        ({"dtype": jnp.float32}, "the dtypes of queries and cache differ, bfloat16 and float32"),
        ({"dtype": jnp.float32, "queries": jnp.float32}, "queries and cache are float32, not bfloat16 or float16"),
        ({"platform": "cpu"}, "it runs on cuda, not on cpu"),
        ({}, None),
        ({"factory": KVQuant(3, outliers=0, sinks=0, recent=0), "rope": None}, None),
    ],
)
def test_what_it_declines_it_says(change: dict[str, Any], words: str | None) -> None:
    default = dict(tokens=1, size=64, dtype=jnp.bfloat16, queries=jnp.bfloat16, platform="cuda", rope=ROPE)
    case = default | {"factory": KVQuant()} | change
    queries, new = (jax.ShapeDtypeStruct((2, case["tokens"], n, case["size"]), case["queries"]) for n in (8, 2))
    held = jax.eval_shape(lambda: cache(case["factory"].stand_in(1, 2, case["size"]), 2, case["size"], case["dtype"]))
    assert BACKENDS.named("cuda").supports(held, queries, new, case["rope"], PLAIN, case["platform"]) == words


@pytest.mark.usefixtures("as_if_built")
def test_derivatives_are_those_of_xla() -> None:
    held, positions = dataclasses.replace(cache(), length=jnp.int32(3)), jnp.asarray([[3], [0]], jnp.int32)

    def total(*tokens: jax.Array) -> jax.Array:
        run = BACKENDS.named("cuda").run
        return run(held, *tokens, positions, rope=ROPE, settings=PLAIN)[0].astype(jnp.float32).sum()

    gradient = str(jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(*token()))
    assert "dot_general" in gradient and "ffi_call" not in gradient
