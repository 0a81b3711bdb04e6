"""The contract of the kernels of a KIVI cache's step: cases, and what they give in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from any4_jax.kv_cache import PLAIN, AttentionSettings
from cuda_ffi.kivi_attention import Held


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """B rows, Hkv groups of `shared` heads, D channels, R exact tokens; the new token's slot is `length`."""

    rows: int = 1
    groups: int = 2
    shared: int = 4
    size: int = 128
    positions: int = 512
    residual: int = 128
    group_size: int = 32
    key_bits: int = 4
    value_bits: int = 4
    length: int = 400
    start: tuple[int, ...] = (0, 7, 131)
    settings: AttentionSettings = PLAIN
    dtype: Any = jnp.bfloat16
    rotates: bool = True


def table() -> list[Case]:
    """Around one case every number of heads, size, width, length at the edges of tiles and flushes, and setting."""
    both = ((4, 4), (2, 2), (4, 2), (2, 4))
    cases = [
        Case(size=d, key_bits=k, value_bits=v, group_size=g, rows=3)
        for d in (64, 128)
        for k, v in both
        for g in (32, 64, 128)
    ]
    cases += [Case(shared=g) for g in (1, 2, 3, 7, 8)]
    cases += [Case(length=n) for n in (0, 1, 63, 64, 126, 127, 128, 129, 191, 255, 256, 257, 383, 384, 511, 512)]
    cases += [Case(residual=64, length=n, rows=3) for n in (194, 258, 319, 320)]
    cases += [Case(positions=8192 + 64 * r, length=8300, rows=r) for r in (1, 3)]
    cases += [Case(positions=2560, length=2600, rows=r, groups=g, start=(5,) * r) for r, g in ((8, 8), (40, 8), (2, 1))]
    settings = [
        {"window": 1},
        {"window": 33},
        {"window": 130},
        {"window": 200},
        {"softcap": 2.0},
        {"scale": 1.0, "softcap": 5.0},
    ]
    cases += [Case(settings=AttentionSettings(**each), rows=3, length=n) for each in settings for n in (400, 511)]
    cases += [Case(dtype=jnp.float16, size=d, key_bits=k, value_bits=k) for d in (64, 128) for k in (2, 4)]
    return [*cases, Case(rotates=False), Case(start=(400,)), Case(start=(401,)), Case(start=(270,))]


def encoded(x: np.ndarray, bits: int, group_size: int, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed codes, steps and lowest values of x [N, M] in groups of the last axis."""
    x = x.astype(np.float32).reshape(len(x), -1, min(group_size, x.shape[-1]))
    low = x.min(axis=-1)
    steps = ((x.max(axis=-1) - low) / np.float32(2**bits - 1)).astype(dtype)
    codes = np.clip(np.rint((x - low[..., None]) / steps.astype(np.float32)[..., None]), 0, 2**bits - 1)
    return packed(codes.astype(np.uint8).reshape(len(x), -1), bits), steps, low.astype(dtype)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    parts = codes.reshape(*codes.shape[:-1], -1, 8 // bits)
    return sum(parts[..., i] << (bits * i) for i in range(8 // bits)).astype(np.uint8)


def decoded(codes: np.ndarray, steps: np.ndarray, lowest: np.ndarray, bits: int, dtype: Any) -> np.ndarray:
    """Float64 numbers, rounded to the dtype."""
    whole = np.stack([codes >> (bits * i) & (2**bits - 1) for i in range(8 // bits)], axis=-1).reshape(
        *codes.shape[:-1], -1
    )
    each = whole.shape[-1] // steps.shape[-1]
    wide = whole * np.repeat(steps.astype(np.float64), each, -1) + np.repeat(lowest.astype(np.float64), each, -1)
    return wide.astype(np.float32).astype(dtype).astype(np.float64)


def draw(case: Case) -> tuple[list[np.ndarray], Held, np.ndarray, np.ndarray]:
    """New queries, keys and values; the cache before them; positions and start."""
    rng = np.random.default_rng(0)
    b, h, d, g, r = case.rows, case.groups, case.size, case.group_size, case.residual
    start = np.asarray(case.start[:b], np.int32)
    count = -(-case.positions // (2 * g)) * 2 * g
    fresh = [rng.normal(size=(b, n, d)).astype(case.dtype) for n in (h * case.shared, h, h)]
    rings = [rng.normal(size=(b, h, r, d)).astype(case.dtype) for _ in range(2)]
    slabs = []
    for shape, bits in (((b, h, d, count), case.key_bits), ((b, h, count, d), case.value_bits)):
        few = (*shape[:3], max(shape[3] // g, 1))
        codes = packed(rng.integers(0, 2**bits, shape).astype(np.uint8), bits)
        slabs += [codes, rng.uniform(0.1, 0.3, few).astype(case.dtype), rng.normal(-1, 0.5, few).astype(case.dtype)]
    return fresh, Held(*rings, *slabs, np.int32(case.length)), (case.length - start).astype(np.int32), start


def factors_of(case: Case, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    angles = positions[:, None] * 10000.0 ** -np.linspace(0, 1, case.size // 2)
    return (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)) if case.rotates else None


def turned(x: np.ndarray, factors: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """x [B, heads, D] rotated in float32 and rounded once."""
    if factors is None:
        return x
    cos, sin = (f[:, None] for f in factors)
    low, high = np.split(x.astype(np.float32), 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def wanted(case: Case, fresh: list[np.ndarray], held: Held, positions: np.ndarray) -> tuple[np.ndarray, Held]:
    """The step in float64; what becomes codes in float32, exactly."""
    factors, r = factors_of(case, positions), case.residual
    queries, new_keys, new_values = turned(fresh[0], factors), turned(fresh[1], factors), fresh[2]
    new = Held(*(np.array(each) for each in held))
    mixed, settings = np.zeros(queries.shape), case.settings
    for b, h in np.ndindex(case.rows, case.groups):
        p = positions[b]
        if p < 0:
            continue
        if p >= r:
            codes = encoded(new.values[b, h, p % r][None], case.value_bits, case.group_size, case.dtype)
            for slab, each in zip((new.value_codes, new.value_steps, new.value_lowest), codes, strict=True):
                slab[b, h, p - r] = each[0]
        new.keys[b, h, p % r], new.values[b, h, p % r] = new_keys[b, h], new_values[b, h]
        slabs = new.key_codes[b, h], new.key_steps[b, h], new.key_lowest[b, h]
        keys = decoded(*slabs, case.key_bits, case.dtype).T
        if (p + 1) % r == 0:
            codes = encoded(new.keys[b, h].T, case.key_bits, case.group_size, case.dtype)
            for slab, each in zip(slabs, codes, strict=True):
                few = each.shape[-1]
                slab[:, p // r * few : (p // r + 1) * few] = each
        slabs = new.value_codes[b, h], new.value_steps[b, h], new.value_lowest[b, h]
        values = decoded(*slabs, case.value_bits, case.dtype)
        keys, values = (np.concatenate([x, np.zeros((r, case.size))])[: p + 1] for x in (keys, values))
        for ring, x, first in ((new.keys, keys, p - p % r), (new.values, values, max(p - r + 1, 0))):
            x[first:] = ring[b, h, np.arange(first, p + 1) % r].astype(np.float64)
        first = 0 if settings.window is None else max(p - settings.window + 1, 0)
        for head in range(h * case.shared, (h + 1) * case.shared):
            scores = keys[first:] @ queries[b, head].astype(np.float64)
            scores *= case.size**-0.5 if settings.scale is None else settings.scale
            if settings.softcap is not None:
                scores = settings.softcap * np.tanh(scores / settings.softcap)
            weights = np.exp(scores - scores.max())
            mixed[b, head] = weights @ values[first:] / weights.sum()
    return mixed, new._replace(length=np.int32(case.length + 1))
