"""Low-bit formats: how many bits a code has, which levels its table holds, and how a group is scaled onto them.

Every format is a table. Formats differ only in where the levels come from (`levels`, or learned from the weights) and
in how a group of weights is scaled onto the table (`rule`, see `scaling.group_scales`).
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

ScaleRule = Literal["asymmetric", "integer_zero", "symmetric", "absmax", "e8m0_round", "e8m0_ocp", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A table of `2**bits` levels and the rule that scales a group of weights onto it.

    Attributes:
      bits: width of a code.
      levels: the table, ascending; None where it is learned from the weights.
      rule: how the scale (and offset) of a group is found.

    Raises:
      ValueError: there are not 2**bits levels, or they don't ascend.
    """

    bits: int
    levels: tuple[float, ...] | None
    rule: ScaleRule

    def __post_init__(self):
        if self.levels is not None and len(self.levels) != 2**self.bits:
            raise ValueError(
                f"got {len(self.levels)} levels for {self.bits} bits, need {2**self.bits}; "
                "repeat a level to fill the table"
            )
        if self.levels is not None and list(self.levels) != sorted(self.levels):
            raise ValueError(f"levels must ascend, got {self.levels}; sort them")

    @property
    def uniform(self) -> bool:
        """Whether the levels are an arithmetic ramp, so that integer arithmetic on codes is exact."""
        return self.levels is not None and len({b - a for a, b in zip(self.levels, self.levels[1:], strict=False)}) == 1


def ramp(bits: int) -> tuple[float, ...]:
    """The levels of a signed integer, -2^(bits-1) .. 2^(bits-1) - 1."""
    half = 2 ** (bits - 1)
    return tuple(float(v) for v in range(-half, half))


def _mirrored(magnitudes: tuple[float, ...]) -> tuple[float, ...]:
    """Sign-magnitude tables hold zero twice; both copies stay, so that the table has a power-of-two length."""
    return tuple(-m for m in reversed(magnitudes)) + magnitudes


NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of N(0, 1) scaled to [-1, 1] with an exact zero (QLoRA, arXiv 2305.14314, appendix E)."""

FP4_LEVELS = _mirrored((0.0, 0.0625 / 12, 2 / 12, 3 / 12, 4 / 12, 6 / 12, 8 / 12, 1.0))
"""The fp4 table of bitsandbytes, scaled to [-1, 1]."""

E2M1_LEVELS = _mirrored((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
"""The element type of MXFP4 (OCP Microscaling Formats v1.0, section 5.3.3)."""


@functools.lru_cache
def af4_levels(block_size: int) -> tuple[float, ...]:
    """The AF4 table for blocks of `block_size` weights (arXiv 2306.06965).

    It minimises E|X - q(X)| where X = Z / max|Z| over a block of independent Z ~ N(0, 1): every free level is the
    median of its cell. As in the paper, the two halves are solved separately, with -1 and 1 fixed and a cell border at
    zero, and zero is then added as the sixteenth level. This reproduces the paper's table for blocks of 64. (The added
    zero takes half a cell from each neighbour, which the optimisation does not account for: for blocks of 64,
    E|X - q(X)| is 0.0293, and NF4's is 0.0284.)

    Raises:
      ValueError: block_size is below 2: every weight of such a block is +-1.
    """
    if block_size < 2:
        raise ValueError(
            f"got block_size={block_size}, AF4 needs blocks of at least 2 weights; use a larger group_size"
        )
    grid, cdf = _block_scaled_normal_cdf(block_size)
    negative = _median_levels(np.linspace(-1.0, 0.0, 8)[:-1], (-1.0, 0.0), 0, grid, cdf)
    positive = _median_levels(np.linspace(0.0, 1.0, 9)[1:], (0.0, 1.0), -1, grid, cdf)
    return (*map(float, negative), 0.0, *map(float, positive))


def _median_levels(levels, ends, held, grid, cdf) -> np.ndarray:
    """Lloyd's iteration for the absolute error on the interval `ends`, with the level of index `held` fixed."""
    pinned = levels[held]
    for _ in range(2000):
        edges = np.concatenate([[ends[0]], (levels[1:] + levels[:-1]) / 2, [ends[1]]])
        mass = np.interp(edges, grid, cdf)
        medians = np.interp((mass[1:] + mass[:-1]) / 2, cdf, grid)
        medians[held] = pinned
        if np.abs(medians - levels).max() < 1e-12:
            break
        levels = medians
    return levels


def _block_scaled_normal_cdf(block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """CDF on [-1, 1] of one weight over its block's absmax, given that it is not the absmax itself.

    Given max|Z| = m, the others are normals truncated to [-m, m]; m is distributed as the maximum of half-normals.
    """
    phi = np.vectorize(lambda t: 0.5 * (1.0 + math.erf(t / math.sqrt(2.0))))
    # Gauss-Legendre on [0, 8]: 100 nodes are accurate to 1e-9 for blocks of 2 to 16384 weights.
    nodes, mass = np.polynomial.legendre.leggauss(100)
    m = 4.0 * (nodes + 1.0)
    inside = 2.0 * phi(m) - 1.0
    density = mass * inside ** (block_size - 1) * np.exp(-(m**2) / 2.0)
    density /= density.sum()
    x = np.linspace(-1.0, 1.0, 4001)
    cdf = ((phi(x[:, None] * m) - phi(-m)) / inside * density).sum(axis=1)
    return x, cdf


@functools.lru_cache
def float_levels(exponent: int, mantissa: int) -> tuple[float, ...]:
    """The table of sign, `exponent` and `mantissa` bits without infinities and NaN (LLM-FP4, arXiv 2310.16836, eq. 1).

    For the exponent field p and the mantissa m in units of the last place, at bias 0:

        m 2^(1 - M) for p = 0, else (2^M + m) 2^(p - M)

    A bias b divides all by 2^b. With one exponent bit the levels are a ramp that has its zero twice: E1M2 is that of
    symmetric integers of 4 bits, in steps of one half.
    """
    fields = ((p, m) for p in range(2**exponent) for m in range(2**mantissa))
    return _mirrored(tuple(((p > 0) * 2**mantissa + m) * 2.0 ** (max(p, 1) - mantissa) for p, m in fields))


def float_formats(bits: int) -> tuple[tuple[int, int], ...]:
    """The exponent and mantissa bits of the formats of `float_levels` that have `bits` bits: five at most, since more
    than 5 exponent bits have no use. For 4 bits E1M2, E2M1, E3M0; for 8 bits E1M6 to E5M2."""
    return tuple((exponent, bits - 1 - exponent) for exponent in range(1, min(bits - 1, 5) + 1))


def round_to_float(values: jax.Array, exponent: jax.Array | int, mantissa: jax.Array | int) -> jax.Array:
    """float32 values at the nearest of `float_levels`, by arithmetic; halfway ones take the even multiple of the step.

    `exponent` and `mantissa` are int32 and may be traced; they broadcast with the values.
    """
    exponent, mantissa = jnp.asarray(exponent, jnp.int32), jnp.asarray(mantissa, jnp.int32)
    largest = (2.0 - exact_power(-mantissa)) * exact_power((1 << exponent) - 1)
    values = jnp.clip(values.astype(jnp.float32), -largest, largest)
    field = jnp.maximum((jax.lax.bitcast_convert_type(jnp.abs(values), jnp.int32) >> 23) - 127, 1)
    return jnp.round(values * exact_power(mantissa - field)) * exact_power(field - mantissa)


def exact_power(exponent: jax.Array | int) -> jax.Array:
    """2^exponent for int32 exponents from -126 to 127, exactly."""
    return jax.lax.bitcast_convert_type((jnp.asarray(exponent, jnp.int32) + 127) << 23, jnp.float32)


def integer(bits: int, *, rule: ScaleRule = "asymmetric") -> Format:
    """Signed integers of 2, 3, 4, 5, 6 or 8 bits, scaled by `rule`."""
    return Format(bits=bits, levels=ramp(bits), rule=rule)


NF4 = Format(bits=4, levels=NF4_LEVELS, rule="absmax")
FP4 = Format(bits=4, levels=FP4_LEVELS, rule="absmax")


def af4(block_size: int) -> Format:
    """AF4 for groups of `block_size` weights; its levels depend on that size."""
    return Format(bits=4, levels=af4_levels(block_size), rule="absmax")


def mx4(scale: Literal["round", "ocp"]) -> Format:
    """MXFP4: e2m1 elements under a power-of-two scale, chosen by rounding the largest magnitude or by the OCP floor."""
    return Format(bits=4, levels=E2M1_LEVELS, rule="e8m0_round" if scale == "round" else "e8m0_ocp")


def learned(bits: int, rule: ScaleRule) -> Format:
    """any4, any3, any2: the table is learned from the weights."""
    return Format(bits=bits, levels=None, rule=rule)


def nearest(values: jax.Array, table: jax.Array, *, uniform: bool = False) -> jax.Array:
    """Codes of the nearest table entries.

    Args:
      values: [..., N, K], any float dtype.
      table: [..., N or 1, 2**bits], ascending.
      uniform: the table is an arithmetic ramp; codes are then found by rounding (half to even) instead of search.

    Returns:
      uint8 [..., N, K]. Without `uniform`, a value midway between two levels takes the one farther from zero, as in
      the MX specification's reference quantizer.
    """
    table = table.astype(jnp.float32)
    values = values.astype(jnp.float32)
    entries = table.shape[-1]
    if uniform:
        first, step = table[..., :1], table[..., 1:2] - table[..., :1]
        return jnp.clip(jnp.round((values - first) / step), 0, entries - 1).astype(jnp.uint8)
    middles = (table[..., 1:] + table[..., :-1]) / 2
    if entries > _COMPARED:
        return _by_halving(values, middles, entries)
    codes = jnp.zeros(values.shape, jnp.uint8)
    for i in range(entries - 1):
        codes += _is_beyond(values, middles[..., i : i + 1]).astype(jnp.uint8)
    return codes


_COMPARED = 16
"""Tables of more entries are searched by halving: a program with a comparison for each of 255 takes minutes to
compile."""


def _by_halving(values: jax.Array, middles: jax.Array, entries: int) -> jax.Array:
    """uint8 codes of values [..., N, K] among middles [..., N or 1, entries - 1]; `entries` is a power of two."""
    rows = jnp.broadcast_to(middles, (*values.shape[:-1], entries - 1))
    codes = jnp.zeros(values.shape, jnp.int32)
    step = entries // 2
    while step:
        middle = jnp.take_along_axis(rows, codes + (step - 1), axis=-1, mode="promise_in_bounds")
        codes += step * _is_beyond(values, middle).astype(jnp.int32)
        step //= 2
    return codes.astype(jnp.uint8)


def _is_beyond(values: jax.Array, middle: jax.Array) -> jax.Array:
    return jnp.where(middle > 0, values >= middle, values > middle)
