"""The search of LLM-FP4 (arXiv 2310.16836): which floats of a few bits, and which biases, suit weights and inputs.

Floats of E exponent and M mantissa bits with a real-valued bias b are the levels of `formats.float_levels` over 2^b.
Here they are kept within [-1, 1], as table / 2^(2^E), and a scale 2^(2^E - b) takes the place of the bias.

Letters: N rows of all matrices that read one input, K inputs, T tokens, F formats, C candidates.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from any4_jax import formats, scaling
from any4_jax.formats import exact_power

_REACH = 6.0
"""The bias that the search multiplies lies from here to one less, below zero: it ends at 2^-6 of the largest
magnitude."""
MOST_SHIFT = 7
"""The largest shift of an input, so that what is multiplied by 2^7 stays in the range of float16."""
_EVEN = 1e-4
"""By how much a logarithm may miss an integer and count as it. What is clipped then is less than what float16 drops."""


class Floats(NamedTuple):
    """Formats of one width: exponent and mantissa bits, int32 [F]."""

    exponent: jax.Array
    mantissa: jax.Array

    def of(self, index: jax.Array) -> "Floats":
        """Formats by index, of any shape."""
        return Floats(self.exponent[index], self.mantissa[index])

    @property
    def tops(self) -> jax.Array:
        """The largest level over 2^(2^E), float32."""
        return 1 - 0.5 * exact_power(-self.mantissa)

    def rounded(self, u: jax.Array) -> jax.Array:
        """The nearest levels within [-1, 1] of values, elementwise. It computes what a look-up in `table` gives but
        for halfway values, which are as good."""
        octaves = 1 << self.exponent
        return formats.round_to_float(u * exact_power(octaves), self.exponent, self.mantissa) * exact_power(-octaves)


def floats(bits: int, exponent: int | None) -> Floats:
    """The formats of a width; only the one with `exponent` bits for it if that is given."""
    found = [pair for pair in formats.float_formats(bits) if exponent in (None, pair[0])]
    return Floats(*(jnp.asarray(column, jnp.int32) for column in zip(*found, strict=True)))


def tables(bits: int, exponent: int | None) -> jax.Array:
    """The tables of `floats`, within [-1, 1]: float32 [F, 2**bits]."""
    found = [pair for pair in formats.float_formats(bits) if exponent in (None, pair[0])]
    return jnp.asarray(
        [[level * 2.0 ** -(2**e) for level in formats.float_levels(e, m)] for e, m in found], jnp.float32
    )


class Coded(NamedTuple):
    """How weights are rounded: a format for each row, its index int32 [N], and its scale, float32 [N]; 0 for zeros."""

    format: jax.Array
    scales: jax.Array


class Inputs(NamedTuple):
    """How inputs are rounded: x_k to 2^-shift_k times a level times the scale.

    Attributes:
      format: int32 [], its index.
      scale: float32 [].
      shifts: int32 [K], each input's exponent bias beyond the least.
    """

    format: jax.Array
    scale: jax.Array
    shifts: jax.Array


class Problem(NamedTuple):
    """What is searched for one input and all matrices that read it.

    Attributes:
      w: float32 [N, K], each row over a power of two of its own.
      shares: float32 [N], what a row's squared error counts: the square of these powers over the squared outputs of its
        matrix, so that all matrices count alike.
      matrix: int32 [N], which matrix each row is of.
      matrices: how many there are (static).
      x: float32 [T, K], a sample of the inputs; None weighs all inputs alike.
      counts: float32 [T], for how many tokens each of the sample stands; None without one.
      y: float32 [T, N], what the float weights make of it.
      largest: float32 [K], the largest magnitude of each input over all tokens; None where inputs aren't rounded.
      weights, inputs: the formats to choose among.
      multipliers: float32 [C], of the bias; 1 is the first.
      shifted: whether each input has a bias of its own (static).
      nearest: whether that bias is rounded to the nearest integer, and not so that no input is clipped (static).
      dtype: in which the scales of weights are stored (static).
    """

    w: jax.Array
    shares: jax.Array
    matrix: jax.Array
    matrices: int
    x: jax.Array | None
    counts: jax.Array | None
    y: jax.Array | None
    largest: jax.Array | None
    weights: Floats
    inputs: Floats
    multipliers: jax.Array
    shifted: bool
    nearest: bool
    dtype: Any

    def decoded(self, coded: Coded) -> jax.Array:
        """The weights as stored, float32 [N, K]."""
        return _decoded(self.w, coded.scales, Floats(*(part[:, None] for part in self.weights.of(coded.format))))

    def rounded(self, inputs: Inputs | None) -> jax.Array | None:
        """The sample of inputs as the product sees it, float32 [T, K]."""
        if self.x is None or inputs is None:
            return self.x
        return _shifted(self.x, inputs.scale, inputs.shifts, self.inputs.of(inputs.format))

    def errors(self, w: jax.Array, x: jax.Array | None) -> jax.Array:
        """The squared errors of each row's outputs, as shares of the squared outputs of its matrix, float32 [N], for
        weights w and inputs x in place of the problem's; those of the weights themselves without inputs."""
        if x is None or self.y is None:
            return jnp.square(self.w - w).sum(axis=1) * self.shares
        return energies(self.y - outputs(x, w), self.counts) * self.shares

    def of_matrices(self, errors: jax.Array) -> jax.Array:
        """Sums over each matrix's rows: [..., N] to [..., matrices]."""
        return _of_matrices(errors, self.matrix, self.matrices)


def energies(y: jax.Array, counts: jax.Array | None) -> jax.Array:
    """Sums of squares over tokens, each of which stands for `counts`, float32 [T]: y [T, N] -> [N]."""
    squares = jnp.square(y)
    return (squares if counts is None else counts[:, None] * squares).sum(axis=0)


def shares_of(w: jax.Array, energy: jax.Array | None, units: jax.Array, matrix: jax.Array, count: int) -> jax.Array:
    """`Problem.shares` for rows over units, float32 [N, 1], whose outputs have an energy, float32 [N]; of the weights
    themselves without one."""
    sizes = jnp.square((units / units.max())[:, 0])
    energy = jnp.square(w).sum(axis=1) if energy is None else energy
    whole = _of_matrices(energy * sizes, matrix, count)
    return sizes / _above_zero(whole)[matrix]


def _of_matrices(values: jax.Array, matrix: jax.Array, count: int) -> jax.Array:
    return jnp.stack([jnp.where(matrix == i, values, 0.0).sum(axis=-1) for i in range(count)], axis=-1)


def from_extremes(problem: Problem, weights: int, inputs: int) -> tuple[Coded, Inputs | None]:
    """Formats of given indices whose largest level is the largest magnitude: no search."""
    index = jnp.full(problem.w.shape[0], weights, jnp.int32)
    scales = scaling.rounded(_row_extremes(problem.w) / problem.weights.of(index).tops, problem.dtype)
    coded = Coded(index, scales.astype(jnp.float32))
    if problem.largest is None:
        return coded, None
    chosen = jnp.asarray(inputs, jnp.int32)
    scale = _above_zero(problem.largest.max()) / problem.inputs.of(chosen).tops
    return coded, Inputs(chosen, scale, _shifts(problem, scale, problem.inputs.of(chosen)))


def search_weights(problem: Problem, inputs: Inputs | None) -> Coded:
    """The scale of each row and the format of each matrix that give the least squared error of the outputs, for inputs
    rounded as they are now."""
    x, extremes = problem.rounded(inputs), _row_extremes(problem.w)

    def of_format(one: Floats) -> tuple[jax.Array, jax.Array]:
        def step(best, multiplier):
            scales = scaling.rounded(_candidate(extremes, one, multiplier), problem.dtype).astype(jnp.float32)
            return _better(best, problem.errors(_decoded(problem.w, scales, one), x), scales), None

        return jax.lax.scan(step, _worst(extremes), problem.multipliers)[0]

    errors, scales = jax.lax.map(of_format, problem.weights)
    index = jnp.argmin(problem.of_matrices(errors), axis=0).astype(jnp.int32)[problem.matrix]
    return Coded(index, jnp.take_along_axis(scales, index[None], axis=0)[0])


def search_inputs(problem: Problem, coded: Coded) -> Inputs | None:
    """The format, scale and shifts of the inputs that give the least squared error of the outputs, for weights rounded
    as they are now."""
    if problem.largest is None or problem.x is None:
        return None
    w, x, extreme = problem.decoded(coded), problem.x, _above_zero(problem.largest.max())

    def of_format(one: Floats) -> tuple[jax.Array, jax.Array]:
        def step(best, multiplier):
            scale = _candidate(extreme, one, multiplier)
            rounded = _shifted(x, scale, _shifts(problem, scale, one), one)
            return _better(best, problem.errors(w, rounded).sum(), scale), None

        return jax.lax.scan(step, _worst(extreme), problem.multipliers)[0]

    errors, scales = jax.lax.map(of_format, problem.inputs)
    index = jnp.argmin(errors).astype(jnp.int32)
    return Inputs(index, scales[index], _shifts(problem, scales[index], problem.inputs.of(index)))


def outputs(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [T, K] by weights [N, K]: float32 [T, N]."""
    return jnp.matmul(x, w.T, precision=jax.lax.Precision.HIGHEST)


def _decoded(w: jax.Array, scales: jax.Array, one: Floats) -> jax.Array:
    return one.rounded(w / _above_zero(scales)[:, None]) * scales[:, None]


def _shifted(x: jax.Array, scale: jax.Array, shifts: jax.Array, one: Floats) -> jax.Array:
    return one.rounded(x * exact_power(shifts) / scale) * scale * exact_power(-shifts)


def _shifts(problem: Problem, scale: jax.Array, one: Floats) -> jax.Array:
    """How much finer than the common one each input's scale may be: int32 [K] from 0 to 2^E - 1."""
    assert problem.largest is not None
    if not problem.shifted:
        return jnp.zeros(problem.largest.shape, jnp.int32)
    most = jnp.minimum((1 << one.exponent) - 1, MOST_SHIFT).astype(jnp.float32)
    own = -jnp.log2(problem.largest / one.tops)  # infinite for an input that is always zero
    common = -jnp.log2(scale)
    finer = jnp.round(own) - jnp.round(common) if problem.nearest else jnp.floor(own - common + _EVEN)
    return jnp.clip(finer, 0, most).astype(jnp.int32)


def _candidate(extreme: jax.Array, one: Floats, multiplier: jax.Array) -> jax.Array:
    """The scale for a multiple of the bias at which `extreme` is the largest level.

    What is multiplied is the bias modulo 1, below zero, so that the search reaches equally far for numbers of all
    sizes.
    """
    scale = extreme / one.tops
    bias = -jnp.log2(_above_zero(scale))
    return scale * jnp.exp2((1 - multiplier) * (bias - jnp.floor(bias) - _REACH))


def _better(best: tuple[jax.Array, jax.Array], error: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.minimum(best[0], error), jnp.where(error < best[0], scale, best[1])


def _worst(like: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.full_like(like, jnp.inf), like


def _row_extremes(w: jax.Array) -> jax.Array:
    return jnp.abs(w).max(axis=1)


def _above_zero(values: jax.Array) -> jax.Array:
    return jnp.where(values > 0, values, 1.0)
