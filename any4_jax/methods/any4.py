"""any4 (arXiv 2507.04610): each row of a weight matrix learns its own table of 4, 8 or 16 values."""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from any4_jax import clustering, formats, scaling, weights
from any4_jax.methods.base import Result
from any4_jax.methods.clipping import clipped_scales
from any4_jax.methods.fields import Fields
from any4_jax.methods.gradient import train_tables
from any4_jax.methods.integer_tables import reaching, stored
from any4_jax.methods.units import put_back
from any4_jax.refit import Fit, refit
from any4_jax.schema import Count, Index, NotNegative, Positive
from any4_jax.statistics import Gathered, Moments, Sample, Statistic

Solver = Literal["exact", "lloyd", "gradient"]
Init = Literal["kmeans++", "random", "int", "nf4", "quantile"]
SampleWeight = Literal["auto", "second_moment", "mean_abs", "abs_mean"]

_BINS = 1 << 14
"""A table for a whole matrix is learned from this many bins of equal count: means and weights of sorted neighbours."""

_CHUNK_ROWS, _CHUNK_ROWS_ON_GPU = 64, 1024
"""Rows worked on at a time: a few float32 temporaries of each. A GPU takes more, to fill hundreds of blocks of threads.
The same for all matrices: with another XLA may order sums differently, and a row's bits must not depend on others."""


@dataclasses.dataclass(frozen=True)
class Any4(Fields):
    """Learned tables.

    A row is scaled group by group (scaling.py), its scaled weights u are clustered in one dimension, and the cluster
    centres become the row's table. The clustering minimises sum_k h_k s_k^p (u_k - table[code_k])^2, where h comes
    from the activations and s is the group scale; with h = E[x^2] and p = 2 this is the layer's output error, taken
    as if the inputs were uncorrelated. Then table, scales and offsets are refitted to that error (any4_jax.refit).

    Attributes:
      bits: 4, 3 or 2.
      group_size: G; larger than K means the whole row; None means no scaling at all (the table holds weights).
      symmetric: scale by max|w|, without an offset.
      per_row: True for a table for each row, False for one for the matrix.
      solver: "exact" (optimal), "lloyd" (k-means as in the paper) or "gradient". With "gradient", after the clustering
        and the refit (if on), Adam trains each row's table on the layer's output for a sample of tokens (gradient.py),
        or without statistics on the error of the weights themselves.
      init: where Lloyd's iteration starts; None means k-means++. "gradient" starts from one step of Lloyd's from there,
        or with None from the exact solution. The exact solver has no start.
      sample_weight: h: "second_moment" is E[x^2], "mean_abs" E|x|, "abs_mean" |E x|, None is 1; "auto" is
        "second_moment" with statistics and None without.
      scale_weighting: p, the power of the group scale in the weight of a sample.
      max_iter: the most steps of Lloyd's iteration and of the gradient, and the most rounds of the refit.
      sample_tokens: the number of tokens in the gradient's sample (statistics.Sample).
      tol: Lloyd's iteration stops at this squared shift, relative to the row's variance.
      seed: for the random starts; every row draws the same numbers.
      keep_outliers: put the table's ends on the row's smallest and largest scaled weight, also in the refit.
      bias_pow: cluster sign(u)|u|^bias_pow about the middle of the table, and transform back.
      refit: alternate between least-squares updates of table, scales and offsets, in their stored dtypes, and choosing
        the codes again, until the gain is small. A table shared by all rows stays as it is. Without scaling there is
        nothing to alternate. A row's table is refitted in float32 first where it is to be stored as integers.
      scale_search: how many rounds of the refit begin with a search for each group's scale; 0 for none.
      sequential: gather statistics from the model as quantized so far.
      scale_dtype: in which scales and offsets are stored.
      table_dtype: in which tables are stored. Those of "int8" hold integers from -127 to 127, and group scales are so
        much smaller; they take half the bytes of bfloat16, and only `Tune` and `tune` train them. "auto" is "int8", or
        "bfloat16" without scales (group_size=None) or with those of float16, whose range is short.
    """

    name: ClassVar[str] = "any4"
    bits: Literal[2, 3, 4] = 4
    group_size: Count | None = 128
    symmetric: bool = False
    per_row: bool = True
    solver: Solver = "exact"
    init: Init | None = None
    sample_weight: SampleWeight | None = "auto"
    scale_weighting: Literal[0, 1, 2] = 2
    max_iter: Index = 300
    sample_tokens: Count = 512
    tol: NotNegative = 1e-4
    seed: Index = 0
    keep_outliers: bool = False
    bias_pow: Positive = 1.0
    refit: bool = True
    scale_search: Index = 2
    sequential: bool = False
    scale_dtype: scaling.StoredDtype = "bfloat16"
    table_dtype: Literal["auto", scaling.TableDtype] = "auto"

    @classmethod
    def paper(cls, **fields) -> "Any4":
        """The published recipe: Lloyd's iteration from k-means++, samples weighted by |mean x| times the group scale,
        statistics of the model as quantized so far, tables of bfloat16, no refit. `fields` override it."""
        published = cls(
            solver="lloyd",
            init="kmeans++",
            sample_weight="abs_mean",
            scale_weighting=1,
            refit=False,
            scale_search=0,
            sequential=True,
            table_dtype="bfloat16",
        )
        return dataclasses.replace(published, **fields)

    def check(self, gathered: bool) -> None:
        if self.solver == "exact" and self.init is not None:
            raise ValueError(
                f"got init={self.init!r} with solver='exact', which has no start; pass init=None or solver='lloyd'"
            )
        if self.init == "nf4" and self.bits != 4:
            raise ValueError(f"got init='nf4' with bits={self.bits}, nf4 has 16 levels; pass bits=4 or another init")
        if self.solver == "gradient" and not self.per_row:
            raise ValueError(
                "got solver='gradient' with per_row=False, it trains a table for each row; pass per_row=True or "
                "another solver"
            )
        if self.table_dtype == "int8" and self.group_size is None:
            raise ValueError(
                "got table_dtype='int8' with group_size=None, which stores no scale for integers; pass a group_size "
                "(one above K for a scale a row) or a floating table_dtype"
            )
        if self.sample_weight not in (None, "auto") and not gathered:
            raise ValueError(
                f"got sample_weight={self.sample_weight!r} without statistics of the layer's input; pass stats "
                "(any4_jax.calibrate gathers them) or sample_weight='auto'"
            )

    @property
    def needs(self) -> tuple[Statistic, ...]:
        moments: tuple[Statistic, ...] = (Moments(),) if self.sample_weight is not None else ()
        return (*moments, Sample(self.sample_tokens)) if self.solver == "gradient" else moments

    def resolved_weight(self, gathered: bool) -> str | None:
        """`sample_weight`, with "auto" replaced by what it means with (`gathered`) or without statistics."""
        if self.sample_weight != "auto":
            return self.sample_weight
        return "second_moment" if gathered else None

    @property
    def stored_table_dtype(self) -> scaling.TableDtype:
        """`table_dtype`, with "auto" replaced by what it means."""
        if self.table_dtype != "auto":
            return self.table_dtype
        return "bfloat16" if self.group_size is None or self.scale_dtype == "float16" else "int8"

    def format(self) -> formats.Format:
        """A learned table and the rule that scales groups onto it."""
        if self.group_size is None:
            return formats.learned(self.bits, "none")
        return formats.learned(self.bits, "symmetric" if self.symmetric else "asymmetric")

    def apply(self, w: jax.Array, gathered: Gathered | None) -> Result:
        k = w.shape[1]
        importance = self._importance(gathered, k)
        group_size = k if self.group_size is None else min(self.group_size, k)
        # The solvers square weights, and rows that share a table must share a unit.
        sized = self.stored_table_dtype if self.group_size is None else self.scale_dtype
        unit = scaling.unit(w, jnp.dtype(sized), axis=1 if self.per_row else None)
        even = w / unit
        table = None if self.per_row else self._matrix_table(even, importance, group_size)
        drawn = Sample(self.sample_tokens)
        sample = gathered[drawn].x if gathered is not None and drawn in self.needs else None
        leaf = self._map_rows(lambda rows: self._encode(rows, importance, sample, group_size, table), even)
        leaf = put_back(leaf, w, unit, self.format().rule)
        return Result(leaf, {"sample_weight": str(self.resolved_weight(gathered is not None))})

    def _map_rows(self, f, w: jax.Array) -> weights.QuantizedTensor:
        """f over chunks of rows. Copies of the last row pad the last chunk, and are cut off afterwards."""
        n, k = w.shape
        size = _CHUNK_ROWS_ON_GPU if jax.default_backend() == "gpu" else _CHUNK_ROWS
        chunks = -(-n // size)
        padded = jnp.pad(w, ((0, chunks * size - n), (0, 0)), mode="edge").reshape(chunks, size, k)
        stacked = jax.lax.map(f, padded)
        rows = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], stacked)
        return rows if self.per_row else dataclasses.replace(rows, lut=stacked.lut[0])

    def _importance(self, gathered: Gathered | None, k: int) -> jax.Array:
        weighting = self.resolved_weight(gathered is not None)
        if weighting is None or gathered is None:
            return jnp.ones(k, jnp.float32)
        moments = gathered[Moments()]
        if weighting == "second_moment":
            return moments.second_moment
        return moments.mean_abs if weighting == "mean_abs" else jnp.abs(moments.mean)

    def _scaled(self, w, importance, group_size):
        """(u, sample weights, scales, offsets) of some rows."""
        scales, offsets = self._first_scales(w, group_size)
        u = scaling.normalize(w, scales, offsets, group_size)
        by_group = scaling.expand(scaling.scale_values(scales), group_size, w.shape[1])
        return u, importance * by_group**self.scale_weighting, scales, offsets

    def _first_scales(self, w, group_size) -> scaling.GroupScales:
        """The scales that the groups' extremes give: what tables are learned for, and the refit starts from."""
        fmt = self.format()
        return scaling.group_scales(w, group_size, rule=fmt.rule, bits=fmt.bits, dtype=jnp.dtype(self.scale_dtype))

    def scale_groups(self, w: jax.Array, importance: jax.Array, lut: jax.Array) -> scaling.GroupScales:
        """Scales and offsets [N, ceil(K/G)] of weights [N, K] for tables that stay as they are."""
        group_size = w.shape[1] if self.group_size is None else min(self.group_size, w.shape[1])

        def first(w: jax.Array) -> scaling.GroupScales:
            made = self._first_scales(w, group_size)
            if self.stored_table_dtype != "int8":
                return made
            # What integers stood for isn't kept with them: here the largest is as large as the row's scaled weights.
            # The searches that follow narrow that, by as much as the weights reach beyond what stands for them.
            reach = jnp.abs(scaling.normalize(w, *made, group_size)).max(axis=1, keepdims=True)
            return made._replace(scales=reaching(Fit(lut, *made), reach).scales)

        if self.refit and self.group_size is not None:
            searches, rounds, kept = self.scale_search, self.max_iter, slice(0)
            start = Fit(lut, *first(w))
            found = refit(w, importance, start, group_size, searches=searches, max_rounds=rounds, entries=kept)
            return scaling.GroupScales(found.scales, found.offsets)
        if self.stored_table_dtype == "int8":
            return clipped_scales(first, w, importance, lut, group_size=group_size, uniform=False)
        return first(w)

    def _encode(self, w, importance, sample, group_size, table) -> weights.QuantizedTensor:
        u, sample_weight, scales, offsets = self._scaled(w, importance, group_size)
        if table is None:
            table = self._tables(u, sample_weight, (u.min(axis=1), u.max(axis=1)))
        inner = slice(1, -1) if self.keep_outliers else slice(None)
        lut, scales, offsets = self._fitted(
            *(w, importance, Fit(table, scales, offsets), group_size), entries=inner if self.per_row else slice(0)
        )
        if self.solver == "gradient":
            lut = train_tables(
                *(w, lut, scales, offsets),
                group_size=group_size,
                importance=importance,
                sample=sample,
                steps=self.max_iter,
                entries=inner,
            )
        return weights.encode(w, lut, scales, offsets, bits=self.bits, group_size=group_size)

    def _fitted(self, w: jax.Array, importance: jax.Array, start: Fit, group_size: int, entries: slice) -> Fit:
        """What is stored of a start whose table is float32; `entries` are those that a refit may change."""
        dtype = jnp.dtype(self.stored_table_dtype)
        if not self.refit or self.group_size is None:
            return stored(start, dtype)
        limits = functools.partial(refit, group_size=group_size, max_rounds=self.max_iter, entries=entries)
        improve = functools.partial(limits, w, importance)
        if self.stored_table_dtype == "int8" and self.per_row:
            # Integers move in steps, and are soon stuck. An exact table leads further, and they go on from there.
            exact = improve(start, searches=self.scale_search)
            return improve(stored(exact, dtype), searches=0)
        return improve(stored(start, dtype), searches=self.scale_search)

    def _matrix_table(self, w, importance, group_size) -> jax.Array:
        u, sample_weight, _, _ = self._scaled(w, importance, group_size)
        ends = u.min()[None], u.max()[None]
        return self._tables(*_binned(u.reshape(-1), sample_weight.reshape(-1)), ends)

    def _tables(self, u: jax.Array, sample_weight: jax.Array, ends: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Tables float32 [R, 2**bits] for rows u [R, K], ascending; ends [R] are what keep_outliers keeps."""
        middle = -0.5 if self.group_size is not None and not self.symmetric else 0.0
        bent = _power(u - middle, self.bias_pow)
        exact = self.solver == "exact" or (self.solver == "gradient" and self.init is None)
        table = clustering.kmeans_1d(
            bent,
            2**self.bits,
            sample_weight=sample_weight,
            solver="exact" if exact else "lloyd",
            init=self.init,
            max_iter=1 if self.solver == "gradient" else self.max_iter,
            tol=self.tol,
            seed=self.seed,
        ).centroids
        table = _power(table, 1.0 / self.bias_pow) + middle
        if self.keep_outliers:
            table = table.at[:, 0].set(ends[0]).at[:, -1].set(ends[1])
        return table


def _power(u: jax.Array, power: float) -> jax.Array:
    return u if power == 1.0 else jnp.sign(u) * jnp.abs(u) ** power


def _binned(u: jax.Array, sample_weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One row of at most _BINS weighted values that stands for u [K] under its sample weights."""
    # Equal values are ordered by weight, so that the order of the rows changes no bit of the sums.
    u, sample_weight = jax.lax.sort((u, sample_weight), num_keys=2)
    if u.size <= _BINS:
        return u[None], sample_weight[None]
    per_bin = -(-u.size // _BINS)
    short = -u.size % per_bin
    values = jnp.pad(u, (0, short)).reshape(-1, per_bin)
    mass = jnp.pad(sample_weight, (0, short)).reshape(-1, per_bin)
    total = mass.sum(axis=1)
    mean = (values * mass).sum(axis=1) / jnp.where(total == 0, 1.0, total)
    return jnp.where(total == 0, values[:, 0], mean)[None], total[None]
