"""What the kernels of a dense cache's step must give, in float64, and a loop of steps as decoding runs it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.kv_cache import PLAIN, AttentionSettings, DenseCache
from any4_jax.kv_cache.step import step
from any4_jax.models.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """B rows, Hkv groups of G heads, D channels, S slots; the new token goes to slot `length`."""

    rows: int = 1
    groups: int = 2
    shared: int = 4
    size: int = 128
    slots: int = 256
    length: int = 200
    start: tuple[int, ...] = (0, 7, 31)
    settings: AttentionSettings = PLAIN
    dtype: Any = jnp.bfloat16
    rotates: bool = True


def table() -> list[Case]:
    """All sizes with all numbers of heads, and around one case every length, start, setting and dtype."""
    sizes = (16, 64, 80, 128, 192, 256)
    cases = [Case(size=d, shared=g, rows=3) for d in sizes for g in (1, 4, 7)]
    cases += [Case(shared=g) for g in (2, 8, 12, 16)]
    cases += [Case(length=n) for n in (0, 1, 7, 8, 31, 32, 33, 63, 64, 255)]
    cases += [Case(slots=s, length=s - 1, rows=r) for s in (64, 72, 1000, 2048, 8192) for r in (1, 3)]
    cases += [Case(slots=8, length=n) for n in (0, 7)]
    cases += [Case(rows=r, groups=g, slots=1024, length=777, start=(5,) * r) for r, g in ((8, 8), (40, 8), (2, 1))]
    settings = [{"window": 1}, {"window": 33}, {"window": 9999}, {"softcap": 2.0}, {"scale": 1.0, "softcap": 5.0}]
    cases += [Case(settings=AttentionSettings(**each), rows=3) for each in settings]
    cases += [Case(dtype=jnp.float16, size=d, shared=g) for d in sizes for g in (4, 8)]
    cases += [Case(rotates=False), Case(rotates=False, dtype=jnp.float16), Case(start=(200,)), Case(start=(192,))]
    return cases


class Inputs(NamedTuple):
    queries: np.ndarray
    new_keys: np.ndarray
    new_values: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    length: np.ndarray
    positions: np.ndarray
    start: np.ndarray


def draw(case: Case) -> Inputs:
    """Random arrays; the slots that no query may see hold NaN."""
    rng = np.random.default_rng(0)
    b, h, d, s = case.rows, case.groups, case.size, case.slots
    start = np.asarray(case.start[:b], np.int32)
    keys, values = rng.normal(size=(b * h, d, s)), rng.normal(size=(b * h, s, d))
    for pair in range(b * h):
        unseen = np.r_[0 : start[pair // h], case.length : s]
        keys[pair, :, unseen] = values[pair, unseen] = np.nan
    fresh = [rng.normal(size=(b, n, d)) for n in (h * case.shared, h, h)]
    arrays = [x.astype(case.dtype) for x in (*fresh, keys, values)]
    return Inputs(*arrays, np.int32(case.length), (case.length - start).astype(np.int32), start)


def factors_of(case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray] | None:
    angles = inputs.positions[:, None] * 10000.0 ** -np.linspace(0, 1, case.size // 2)
    return (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)) if case.rotates else None


def turned(x: np.ndarray, factors: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """x [B, heads, D] rotated in float32 and rounded once."""
    if factors is None:
        return x
    cos, sin = (f[:, None] for f in factors)
    low, high = np.split(x.astype(np.float32), 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def wanted(case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The step in float64, from the rotated arrays that the kernel must round too; keys and values exactly."""
    factors = factors_of(case, inputs)
    queries, new_keys = turned(inputs.queries, factors), turned(inputs.new_keys, factors)
    keys, values = inputs.keys.copy(), inputs.values.copy()
    keys[:, :, case.length] = new_keys.reshape(-1, case.size)
    values[:, case.length] = inputs.new_values.reshape(-1, case.size)
    mixed = np.zeros(queries.shape)
    settings = case.settings
    for b, h in np.ndindex(*queries.shape[:2]):
        first = inputs.start[b] if settings.window is None else max(inputs.start[b], case.length - settings.window + 1)
        pair, seen = b * case.groups + h // case.shared, slice(first, case.length + 1)
        scores = queries[b, h].astype(np.float64) @ keys[pair, :, seen].astype(np.float64)
        scores *= case.size**-0.5 if settings.scale is None else settings.scale
        if settings.softcap is not None:
            scores = settings.softcap * np.tanh(scores / settings.softcap)
        weights = np.exp(scores - scores.max())
        mixed[b, h] = weights @ values[pair, seen].astype(np.float64) / weights.sum()
    return mixed, keys, values


def loop(backend: str | None, count: int = 3):
    """`count` steps in a loop, as decoding runs them, from a cache that is given away."""

    def run(queries: Any, keys: Any, values: Any, cache: DenseCache) -> tuple[jax.Array, DenseCache]:
        def one(_: Any, carry: Any) -> Any:
            queries, cache = carry
            positions = (cache.length - cache.start)[:, None]
            held = cache.keys, cache.values, cache.length
            arrays = queries, keys, values, *held, positions, cache.start
            queries, *held = step(*arrays, rope=Rope(queries.shape[-1], 10000.0), backend=backend)
            return queries, dataclasses.replace(cache, keys=held[0], values=held[1], length=held[2])

        return jax.lax.fori_loop(0, count, one, (queries, cache))

    return jax.jit(run, donate_argnums=3)


def token(rows: int = 2, heads: int = 8, groups: int = 2, size: int = 64) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(n), (rows, 1, n, size), jnp.bfloat16) for n in (heads, groups, groups)]


def cache(slots: int = 64, dtype: Any = jnp.bfloat16) -> DenseCache:
    return DenseCache.create(0, 2, slots, 2, 64, jnp.asarray([0, 0], jnp.int32), dtype)
