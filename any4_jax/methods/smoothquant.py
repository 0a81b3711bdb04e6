"""SmoothQuant (arXiv 2211.10438): inputs and weights of few bits, once the inputs' outliers are moved into the weights.

Letters: N outputs, K inputs of a site, S tokens of a sample.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp

from any4_jax import weights
from any4_jax.methods.base import Method, Order, SiteResult, SiteWeights
from any4_jax.methods.fields import Fields
from any4_jax.methods.rtn import Int
from any4_jax.product.quantized_input import quantize_input
from any4_jax.schema import Count, Index, Share
from any4_jax.statistics import AbsMax, Gathered, Moments, Sample, Statistic
from any4_jax.weights import QuantizeInput, dense_product

WHOLE_ROW = 2**30
"""A group size above every K: one scale for a row of weights."""

_FLOOR = 1e-5
"""The share of the largest channel that a smaller one counts as, so that no factor is zero or infinite."""


Size = Literal["max", "rms"]


def factors(inputs: jax.Array, columns: jax.Array, alpha: Any) -> jax.Array:
    """The factor of each channel, s = inputs^alpha / columns^(1 - alpha) (eq. 4): float32 [K].

    The input is divided by s, and the weights are multiplied by it. Channels are floored at 1e-5 of the largest one;
    published code floors them at 1e-5.

    Args:
      inputs: how large each channel is over the tokens, float32 [K]; max|x| in the paper.
      columns: how large its weights are, over all rows of all matrices that read it, float32 [K]; max|w| in the paper.
      alpha: from 0 to 1, may be traced: how much of the inputs' range is moved into the weights.
    """
    inputs, columns = (_floored(largest) for largest in (inputs, columns))
    return inputs**alpha / columns ** (1 - alpha)


def _floored(largest: jax.Array) -> jax.Array:
    top = largest.max()
    return jnp.where(top > 0, jnp.maximum(largest, _FLOOR * top), 1.0)


_STATISTICS: dict[Size, Statistic] = {"max": AbsMax(), "rms": Moments()}


def _inputs(gathered: Gathered, size: Size) -> jax.Array:
    """The size of each input channel, float32 [K]."""
    if size == "max":
        return gathered[AbsMax()]
    return jnp.sqrt(gathered[Moments()].second_moment)


def _columns(matrices: list[jax.Array], size: Size) -> jax.Array:
    """The size of each channel's weights in all matrices [N, K] together, float32 [K]."""
    every = jnp.abs(jnp.concatenate(matrices))
    largest = every.max(axis=0)
    if size == "max":
        return largest
    # Relative to the largest one, whose square float32 may not hold.
    unit = jnp.where(largest > 0, largest, 1.0)
    return jnp.sqrt(jnp.square(every / unit).mean(axis=0)) * unit


@dataclasses.dataclass(frozen=True)
class SmoothQuant(Fields):
    """Weights by another method and inputs as integers, after a factor for each input channel evens out both.

    The factor moves into the norm or linear before a site, where it costs nothing, or stays a `ScaleInput`. Published
    code smooths what follows a norm (q, k, v; gate, up) and leaves o_proj and down_proj; here all sites are smoothed.
    A rule gives the published choice: rules=[("(o|down)_proj", SmoothQuant(alpha=None))].

    Attributes:
      inner: what quantizes the smoothed weights: any method of one matrix. With integers (`Int`) the products are
        those of integers, and on a CPU with tables of int8 too; other tables multiply the rounded inputs as floats.
      alpha: how much of the inputs' range is moved into the weights, from 0 to 1; None moves nothing, and only rounds
        the inputs.
      size: what the factors even out, of inputs and weights: the largest magnitude of a channel, as published (with
        alpha=0.5), or its root mean square, which the outliers of single tokens change less.
      search: how many values of alpha to try at each site, evenly spaced from 0 to 1, each with both sizes, on the
        error of its outputs; the best takes the place of `alpha` and `size`. 0 tries none.
      input_bits: width of an input, 2 to 8.
      per: what of the inputs shares a scale: with "token", each row of x has the scale that it needs; with "group",
        each 32 inputs of a row; with "tensor", all have the one that the calibration data needed, and what is larger is
        clipped. That one depends on the largest inputs, and size="max" with alpha=0.75 suits it better.
      symmetric: round inputs without a zero point; "tensor" needs that, and so do the kernels for "group".
      sample_tokens: S, the tokens on which `search` measures the error.
      order: of a sequential inner method. With "at_once" its statistics are of the blocks before as quantized, so that
        factors can be folded into the linears of the same block. With "by_site" they are of the sites before too, and
        only factors before which there is a norm are folded.
    """

    name: ClassVar[str] = "smoothquant"
    scope: ClassVar[Literal["site"]] = "site"
    inner: Method = Int(bits=8, symmetric=True, group_size=WHOLE_ROW)
    alpha: Share | None = 0.4
    size: Size = "rms"
    search: Index = 0
    input_bits: Literal[2, 3, 4, 5, 6, 7, 8] = 8
    per: Literal["token", "group", "tensor"] = "token"
    symmetric: bool = False
    sample_tokens: Count = 512
    order: Order = "at_once"

    @property
    def sequential(self) -> bool:
        return self.inner.sequential

    @property
    def needs(self) -> tuple[Statistic, ...]:
        found: list[Statistic] = [] if self.alpha is None else [_STATISTICS[size] for size in self._sizes]
        found += [AbsMax()] if self.per == "tensor" else []
        found += [Sample(self.sample_tokens)] if self.search else []
        return tuple(dict.fromkeys((*found, *self.inner.needs)))

    @property
    def _sizes(self) -> tuple[Size, ...]:
        return get_args(Size) if self.search else (self.size,)

    def check(self, gathered: bool) -> None:
        if (self.alpha is not None or self.per == "tensor") and not gathered:
            raise ValueError(
                f"got no statistics, smoothquant with alpha={self.alpha} and per={self.per!r} needs the size of each "
                "layer's inputs; pass data, or alpha=None with per='token'"
            )
        if self.search == 1:
            raise ValueError("got search=1, at least 2 values of alpha are compared; pass that one as alpha")
        if self.search and self.alpha is None:
            raise ValueError(
                f"got search={self.search} with alpha=None, which smooths nothing; pass search=0, or any alpha"
            )
        if self.per == "tensor" and not self.symmetric:
            raise ValueError(
                "got symmetric=False with per='tensor', whose scale is that of the largest |x|; pass symmetric=True or "
                "per='token'"
            )
        self.inner.check(gathered)

    def apply(self, site: SiteWeights, gathered: Gathered | None) -> SiteResult:
        if self.alpha is None:
            return SiteResult(self._quantized(site.weights, None, gathered, {}))
        assert gathered is not None  # `check` refuses to go on without
        matrices = list(site.weights.values())
        inputs = jnp.stack([_inputs(gathered, size) for size in self._sizes])
        columns = jnp.stack([_columns(matrices, size) for size in self._sizes])

        def scale(size: Any, alpha: Any) -> jax.Array:
            found = factors(inputs[size], columns[size], alpha)
            return site.shared(found) if site.foldable else found

        size: Any = 0
        alpha: Any = self.alpha
        notes: dict[str, Any] = {}
        if self.search:
            alphas = jnp.linspace(0.0, 1.0, self.search, dtype=jnp.float32)
            tried = jnp.repeat(jnp.arange(len(inputs), dtype=jnp.int32), len(alphas)), jnp.tile(alphas, len(inputs))
            errors = jax.lax.map(lambda each: self._error(site.weights, scale(*each), gathered), tried)
            best = jnp.argmin(errors)
            size, alpha = (each[best] for each in tried)
            notes = {"alpha": alpha, "rms": size, "output_error": errors[best]}
        s = scale(size, alpha)
        return SiteResult(self._quantized(site.weights, s, gathered, notes), 1 / s)

    def _quantized(
        self, matrices: Mapping[str, jax.Array], s: jax.Array | None, gathered: Gathered | None, notes: dict[str, Any]
    ) -> dict[str, Any]:
        """The results for matrices times s [K], or as they are, behind rounded inputs."""
        if s is not None and gathered is not None:
            gathered = gathered.scaled(1 / s)
        largest = gathered[AbsMax()].max() if self.per == "tensor" and gathered is not None else None
        made = {}
        for path, w in matrices.items():
            result = self.inner.apply(w if s is None else w * s, gathered)
            rounding = QuantizeInput(result.operator, None, self.input_bits, self.symmetric, self.per, largest)
            made[path] = dataclasses.replace(result, operator=rounding, notes={**result.notes, **notes})
        return made

    def _error(self, matrices: Mapping[str, jax.Array], s: jax.Array, gathered: Gathered) -> jax.Array:
        """The error of the site's outputs with the factors s, relative to the energy of each token, as the norms that
        follow see it: the mean over the sample, float32 []. A few tokens have inputs a thousand times as large."""
        x = gathered[Sample(self.sample_tokens)].x
        made = self._quantized(matrices, s, gathered, {})
        rounded = quantize_input(x / s, next(iter(made.values())).operator)
        error = energy = jnp.zeros(len(x), jnp.float32)
        for path, w in matrices.items():
            y = dense_product(x, w)
            off = dense_product(rounded, weights.dequantize(made[path].operator)) - y
            error, energy = error + jnp.square(off).sum(axis=1), energy + jnp.square(y).sum(axis=1)
        # Places of the sample that no token took hold zeros.
        return jnp.where(energy > 0, error / energy, 0.0).sum() / jnp.maximum((energy > 0).sum(dtype=jnp.float32), 1.0)
