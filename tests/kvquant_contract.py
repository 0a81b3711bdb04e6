"""The contract of the CUDA kernel of a KVQuant cache's step: cases, and what they give in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from any4_jax.kv_cache import PLAIN, AttentionSettings
from cuda_ffi.kvquant_attention import CHUNK, Coded, Held


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """B rows, Hkv groups of `shared` heads, D channels; of each token O `slots`, the first N `sinks` and the R `recent`
    exact; the new token's slot is `length`. Angles have an `amplitude` unless it is 0."""

    rows: int = 1
    groups: int = 2
    shared: int = 4
    size: int = 128
    bits: int = 4
    slots: int = 4
    sinks: int = 1
    recent: int = 128
    room: int = 512
    length: int = 400
    start: tuple[int, ...] = (0, 7, 131)
    settings: AttentionSettings = PLAIN
    dtype: Any = jnp.bfloat16
    amplitude: float = 1.0


def table() -> list[Case]:
    """Around one case every width, size, number of heads, outliers and exact tokens, length and setting."""
    cases = [
        Case(bits=b, size=d, rows=3, dtype=t) for b in (4, 3, 2) for d in (64, 128) for t in (jnp.bfloat16, jnp.float16)
    ]
    cases += [Case(shared=g) for g in (1, 3, 8, 11)]
    cases += [Case(slots=n, sinks=s, recent=r) for n in (0, 12, 48) for s in (0, 5) for r in (0, 16, 100)]
    cases += [Case(groups=1, slots=6, size=64)]
    cases += [Case(length=n, recent=48, sinks=20) for n in (0, 15, 16, 19, 47, 48, 63, 64, 67, 68, 128, 511, 559, 600)]
    cases += [Case(room=200, recent=0, length=199, rows=3), Case(room=8, recent=8, length=15)]
    cases += [Case(room=8400, length=8500, rows=r) for r in (1, 3)]
    cases += [Case(room=2568, length=2600, rows=r, groups=g, start=(5,) * r) for r, g in ((8, 8), (40, 8))]
    settings = [{"window": 1}, {"window": 130}, {"window": 300}, {"softcap": 2.0}, {"scale": 1.0, "softcap": 5.0}]
    cases += [Case(settings=AttentionSettings(**each), rows=3) for each in settings]
    return [*cases, Case(amplitude=0.0), Case(amplitude=1.3), Case(start=(400,)), Case(start=(401,))]


def unpacked(plane: np.ndarray, width: int) -> np.ndarray:
    parts = [plane >> (width * i) & (2**width - 1) for i in range(8 // width)]
    return np.stack(parts, axis=-1).reshape(*plane.shape[:-1], -1)


def draw(case: Case) -> tuple[np.ndarray, Held, np.ndarray]:
    """Queries [B, H, D], the cache that holds the new tokens, and their positions."""
    rng = np.random.default_rng(0)
    b, h, d, channels = case.rows, case.groups, case.size, case.groups * case.size
    widths = (2, 1) if case.bits == 3 else (case.bits,)

    def floats(*shape: int, spread: float = 1.0) -> np.ndarray:
        return rng.normal(0, spread, shape).astype(case.dtype)

    def coded(ranges: np.ndarray | None) -> Coded:
        planes = tuple(rng.integers(0, 256, (b, h, case.room, d * w // 8)).astype(np.uint8) for w in widths)
        places = rng.random((b, 1, case.room, channels)).argsort(axis=-1)[..., : case.slots]
        kind = np.uint8 if channels <= 256 else np.uint16
        return Coded(planes, floats(b, 1, case.room, case.slots, spread=3), places.astype(kind), ranges)

    ranges = np.stack([rng.uniform(0.5, 1.5, (b, 1, case.room)), rng.normal(0, 0.3, (b, 1, case.room))], axis=-1)
    levels = [np.sort(rng.uniform(-1, 1, 2**case.bits)).astype(np.float32) for _ in range(2)]
    scales, offsets = rng.uniform(0.5, 1.5, (h, d)).astype(np.float32), rng.normal(0, 0.5, (h, d)).astype(np.float32)
    exact = [floats(b, h, n, d) for n in (case.sinks, case.sinks, case.recent, case.recent)]
    held = Held(coded(None), coded(ranges.astype(case.dtype)), levels[0], scales, offsets, levels[1], *exact)
    positions = (case.length - np.asarray(case.start[:b])).astype(np.int32)
    return floats(b, h * case.shared, d), held, positions


def factors_of(case: Case, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """float32 [N, D/2] each."""
    if not case.amplitude:
        return None
    angles = positions[:, None] * 10000.0 ** -np.linspace(0, 1, case.size // 2)
    return (case.amplitude * np.cos(angles)).astype(np.float32), (case.amplitude * np.sin(angles)).astype(np.float32)


def near_and_far(case: Case) -> tuple[Any, Any]:
    turns = -(-(case.room + case.recent) // CHUNK)
    return factors_of(case, np.arange(CHUNK)), factors_of(case, np.arange(turns) * CHUNK)


def rotated(x: np.ndarray, factors: tuple[np.ndarray, np.ndarray], back: bool = False) -> np.ndarray:
    """x [N, D] by factors [N, D/2], in float64."""
    cos, sin = factors[0].astype(np.float64), factors[1].astype(np.float64) * (-1 if back else 1)
    low, high = np.split(x.astype(np.float64), 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def numbers(case: Case, coded: Coded, levels: np.ndarray, b: int, h: int, scales: Any, offsets: Any) -> np.ndarray:
    """Float64 [P, D] of a row's head, rounded as the kernel rounds."""
    codes = unpacked(coded.planes[0][b, h], 2 if case.bits == 3 else case.bits)
    if case.bits == 3:
        codes = codes | unpacked(coded.planes[1][b, h], 1) << 2
    level, scale, offset = (np.asarray(x).astype(case.dtype).astype(np.float64) for x in (levels, scales, offsets))
    found = (level[codes] * scale + offset).astype(np.float32).astype(case.dtype).astype(np.float64)
    channels = coded.channels[b, 0].astype(int)
    tokens, slots = np.nonzero(channels // case.size == h)
    found[tokens, channels[tokens, slots] % case.size] = coded.outliers[b, 0, tokens, slots].astype(np.float64)
    return found


def wanted(case: Case, queries: np.ndarray, held: Held, positions: np.ndarray) -> np.ndarray:
    mixed, settings = np.zeros(queries.shape), case.settings
    for b, h in np.ndindex(case.rows, case.groups):
        p = min(positions[b], case.room + case.recent - 1)
        if p < 0:
            continue
        ranges = held.values.ranges[b, 0]
        keys = numbers(case, held.keys, held.key_levels, b, h, held.scales[h], held.offsets[h])
        values = numbers(case, held.values, held.value_levels, b, h, ranges[:, :1], ranges[:, 1:])
        newest = np.arange(max(p - case.recent + 1, 0), p + 1)
        for x, first, ring in ((0, held.first_keys, held.recent_keys), (1, held.first_values, held.recent_values)):
            whole = np.zeros((p + 1, case.size))
            kept = (keys, values)[x][: p + 1]
            whole[: len(kept)] = kept
            if case.recent:
                whole[newest] = ring[b, h, newest % case.recent].astype(np.float64)
            count = min(case.sinks, p + 1)
            whole[:count] = first[b, h, :count].astype(np.float64)
            keys, values = (whole, values) if x == 0 else (keys, whole)
        first = 0 if settings.window is None else max(p - settings.window + 1, 0)
        tokens = np.arange(p + 1)
        near, far = factors_of(case, tokens % CHUNK), factors_of(case, tokens // CHUNK * CHUNK)
        if near is not None:
            keys = rotated(keys, near).astype(np.float32).astype(case.dtype).astype(np.float64)
        for head in range(h * case.shared, (h + 1) * case.shared):
            query = np.broadcast_to(queries[b, head].astype(np.float64), keys.shape)
            if far is not None:
                query = rotated(query, far, back=True) / case.amplitude
            scores = (query * keys).sum(axis=-1)[first:]
            scores *= case.size**-0.5 if settings.scale is None else settings.scale
            if settings.softcap is not None:
                scores = settings.softcap * np.tanh(scores / settings.softcap)
            weights = np.exp(scores - scores.max())
            mixed[b, head] = weights @ values[first:] / weights.sum()
    return mixed
