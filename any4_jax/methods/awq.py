"""AWQ (arXiv 2306.00978): inputs that are large on average have their weights scaled up before they are quantized."""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from any4_jax import scaling, weights
from any4_jax.methods.base import Method, Order, SiteResult, SiteWeights, scope_of
from any4_jax.methods.clipping import STEPS, clipped_weights
from any4_jax.methods.fields import Fields, takes
from any4_jax.methods.rtn import Int
from any4_jax.schema import Count
from any4_jax.statistics import Gathered, Moments, Sample, Statistic
from any4_jax.weights.operator import parts

Clips = Annotated[int, Field(ge=0, le=STEPS)]

_LEAST = 1e-4
"""The least factor of an input before the factors are normalised, as in the published code."""


@dataclasses.dataclass(frozen=True)
class AWQ(Fields):
    """Activation-aware scaling: each matrix W of a site is quantized as Q(W s), and its input is multiplied by 1 / s.

    The factors are s = m^ratio / sqrt(max m^ratio * min m^ratio) with m = E|x|. The ratio is that of the grid for which
    the site's outputs are closest, for a sample of its inputs: the least sum over its matrices of
    |(Q(W s) - W s) x / s|^2 / |W x|^2. Then each group of weights is clipped to the share of its largest magnitude that
    leaves the least error of the group's own part of the output. The inner method gets W s, clipped, and the statistics
    of x / s; it sees the scale once, and the result is its own.

    1 / s is folded into the norm or linear before the site. Query heads that read one key/value head have its channels
    in common, and so have a common factor for each. What can't be folded is kept in a `ScaleInput`. The notes tell the
    ratio, the relative error of each matrix's output without scales and clipping and with them, and what holds the
    scale.

    Attributes:
      inner: any method of one matrix.
      search: the method for which the ratio and the clipping are searched; None means the inner one. Another, quicker
        one will do for one that learns. The clipping is searched for it with the bits and the group size of the inner
        method's codes, since the fewer levels there are the more has to be clipped; for the inner one if it can't have
        them. For the search the matrices of a site are one, row under row.
      ratios: R, for the ratios 0, 1/R, ... (R - 1)/R; 1 for no scaling.
      clips: shares of the largest magnitude that are tried: 1, 0.95, 0.9 and so on; 0 or 1 for no clipping.
      shared: give the repeats of a channel (query heads) their mean E|x|, where their factor can be folded then. Else
        a `ScaleInput` keeps a factor of its own for each.
      sample_tokens: how many tokens the errors are measured on.
      sequential: gather statistics from the model as quantized so far.
      order: with "at_once" that is the blocks before, so that factors can be folded into the linears of the same block.
        With "by_site" it is the sites before too, and only factors before which there is a norm are folded.
    """

    name: ClassVar[str] = "awq"
    scope: ClassVar[Literal["site"]] = "site"
    inner: Method = Int()
    search: Method | None = None
    ratios: Count = 20
    clips: Clips = 10
    shared: bool = True
    sample_tokens: Count = 512
    sequential: bool = True
    order: Order = "at_once"

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return (Moments(), Sample(self.sample_tokens), *self.inner.needs, *self._searched.needs)

    @property
    def _searched(self) -> Method:
        return self.inner if self.search is None else self.search

    def check(self, gathered: bool) -> None:
        if not gathered:
            raise ValueError("got no statistics, awq needs a sample of each site's input; pass data")
        for field, method in (("inner", self.inner), ("search", self._searched)):
            if scope_of(method) != "matrix":
                raise ValueError(
                    f"got {field}={method.name}, which quantizes the matrices of a {scope_of(method)} together, and "
                    "awq scales one matrix at a time; pass a method of one matrix"
                )
            method.check(gathered)

    def apply(self, site: SiteWeights, gathered: Gathered | None) -> SiteResult:
        """See `SiteMethod.apply`."""
        assert gathered is not None  # `check` refuses to go on without
        x = gathered[Sample(self.sample_tokens)].x
        size = gathered[Moments()].mean_abs
        if self.shared and site.foldable:
            size = site.shared(size)
        outputs = _Outputs.of(site, x)
        ratio, plain = self._best_ratio(outputs, size, gathered)
        factor = factors(size, ratio)
        scaled = gathered.scaled(1 / factor)
        target = outputs.w * factor
        if self.clips > 1:
            judge = self._judge(target, scaled)
            target = clipped_weights(
                lambda w: weights.dequantize(judge.apply(w, scaled).operator),
                target,
                x / factor,
                group_size=_codes_of(judge, target, scaled)["group_size"],
                steps=self.clips,
            )
        results = {}
        for path, w in outputs.split(target).items():
            made = self.inner.apply(w, scaled)
            error = outputs.error(path, weights.dequantize(made.operator) / factor)
            notes = {**made.notes, "ratio": ratio, "error_before": plain[path], "error": error}
            results[path] = dataclasses.replace(made, notes=notes)
        return SiteResult(results, 1 / factor)

    def _best_ratio(
        self, outputs: "_Outputs", size: jax.Array, gathered: Gathered
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The ratio, float32 [], and the relative error of each matrix without a scale."""

        def errors(ratio: jax.Array) -> dict[str, jax.Array]:
            factor = factors(size, ratio)
            made = self._searched.apply(outputs.w * factor, gathered.scaled(1 / factor))
            return outputs.errors(weights.dequantize(made.operator) / factor)

        def attempt(step: jax.Array, best: Any) -> Any:
            least, chosen, plain = best
            ratio = step.astype(jnp.float32) / self.ratios
            found = errors(ratio)
            total = sum(found.values())
            plain = jax.tree.map(lambda old, new: jnp.where(step == 0, new, old), plain, found)
            return jnp.where(total < least, total, least), jnp.where(total < least, ratio, chosen), plain

        zero = jnp.float32(0)
        start = jnp.float32(jnp.inf), zero, dict.fromkeys(outputs.rows, zero)
        _, ratio, plain = jax.lax.fori_loop(0, self.ratios, attempt, start)
        return ratio, plain

    def _judge(self, w: jax.Array, gathered: Gathered) -> Method:
        """The method for which the clipping is searched: `search` with the codes of the inner method."""
        wanted = _codes_of(self.inner, w, gathered)
        judge: Any = self._searched
        fits = {name: value for name, value in wanted.items() if takes(type(judge), name, value)}
        if self.search is not None and fits:
            judge = dataclasses.replace(judge, **fits)
        return judge if _codes_of(judge, w, gathered) == wanted else self.inner


def _codes_of(method: Method, w: jax.Array, gathered: Gathered) -> dict[str, Any]:
    """The bits and the group size of what a method makes of weights [N, K]; without codes None and the whole row."""
    made = jax.eval_shape(lambda w, seen: method.apply(w, seen).operator, w, gathered)
    coded: Any = next((part for part in parts(made) if hasattr(part, "group_size")), None)
    return (
        {"bits": None, "group_size": w.shape[1]}
        if coded is None
        else {"bits": coded.bits, "group_size": coded.group_size}
    )


def factors(size: jax.Array, ratio: jax.Array) -> jax.Array:
    """What the weights of each input are multiplied by: s of `AWQ` for E|x|, float32 [K]."""
    power = jnp.maximum(size**ratio, _LEAST)
    return power / jnp.sqrt(power.max() * power.min())


@dataclasses.dataclass(frozen=True)
class _Outputs:
    """The matrices of a site, row under row, and their outputs for a sample.

    Attributes:
      w: float32 [N, K].
      x: float32 [S, K].
      rows: the first row of each matrix and the one after its last, by path.
    """

    w: jax.Array
    x: jax.Array
    rows: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, site: SiteWeights, x: jax.Array) -> "_Outputs":
        rows, end = {}, 0
        for path, w in site.weights.items():
            rows[path] = end, end + w.shape[0]
            end += w.shape[0]
        return cls(jnp.concatenate([*site.weights.values()]), x, rows)

    def split(self, w: jax.Array) -> dict[str, jax.Array]:
        """The rows of w [N, ...] by matrix."""
        return {path: w[first:last] for path, (first, last) in self.rows.items()}

    def errors(self, found: jax.Array) -> dict[str, jax.Array]:
        """For each matrix |(W^ - W) x|^2 / |W x|^2 over the sample, for all of them W^ = found [N, K]."""
        return {path: self.error(path, w) for path, w in self.split(found).items()}

    def error(self, path: str, found: jax.Array) -> jax.Array:
        """The same for one matrix."""
        w = self.split(self.w)[path]
        # Weights whose scales are exponents come as they are, and their squares leave float32 before they do.
        unit = scaling.unit(w, jnp.float32, axis=None)

        def energy(w: jax.Array) -> jax.Array:
            return jnp.square(jnp.matmul(w / unit, self.x.T, precision=jax.lax.Precision.HIGHEST)).sum()

        whole = energy(w)
        return jnp.where(whole > 0, energy(found - w) / jnp.where(whole > 0, whole, 1.0), 0.0)
