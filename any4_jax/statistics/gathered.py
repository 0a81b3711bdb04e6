"""The protocol of a statistic, and the set of them that is gathered at one input.

Letters: T tokens, K input features, E experts.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.statistics.moments import AbsMax, Moments


@runtime_checkable
class Statistic(Protocol):
    """Something that is gathered from the activations that enter a linear.

    It is a frozen, hashable dataclass whose fields are settings. Its accumulator is a pytree of arrays with fixed
    shapes, so it doesn't grow with the number of tokens.
    """

    def empty(self, k: int) -> Any:
        """The accumulator of no tokens, for K = `k` features, in numpy arrays, so that nothing is compiled for it."""
        ...

    def update(self, accumulator: Any, x: jax.Array, mask: jax.Array) -> Any:
        """The accumulator with more tokens: x float32 [T, K] and mask bool [T], False where a token doesn't count.

        The rows of x that don't count are zeros. It runs under jit, and for experts inside `jax.lax.map`.
        """
        ...

    def merge(self, a: Any, b: Any) -> Any:
        """The accumulator of the tokens of both, which are different tokens. It runs under vmap for experts."""
        ...

    def scaled(self, accumulator: Any, factor: jax.Array) -> Any:
        """The accumulator of the same tokens with every x multiplied by factor [K], which is positive."""
        ...

    # Those that can tell add `possible(accumulator) -> bool []`: whether any activations give it. It looks at signs;
    # NaN and infinity are found without it.
    #
    # Those that no activations give say where they come from, for messages, by `source: ClassVar[str]`.
    #
    # Those that compare x with the float model's activations say so by `paired: ClassVar[bool] = True`. Their `update`
    # has one argument more, x_float float32 [T, K], which is left out where that is x itself.


def is_paired(statistic: Statistic) -> bool:
    """Whether a statistic is of the float model's activations too."""
    return getattr(statistic, "paired", False)


@jax.tree_util.register_pytree_with_keys_class
class Gathered(Mapping[Statistic, Any]):
    """The statistics of one input: a pytree that maps each `Statistic` to its accumulator.

    Linears that read the same input share one. `gathered[Moments()].second_moment` is E[x^2].

    Attributes:
      k: K, the number of input features.
      stack: the leading axes of the accumulators: (E,) where each expert has its own, else ().
    """

    def __init__(self, accumulators: Mapping[Statistic, Any], k: int, stack: tuple[int, ...] = ()) -> None:
        self._accumulators = dict(accumulators)
        self.k = k
        self.stack = stack

    def __getitem__(self, statistic: Statistic) -> Any:
        return self._accumulators[statistic]

    def __iter__(self) -> Iterator[Statistic]:
        return iter(self._accumulators)

    def __len__(self) -> int:
        return len(self._accumulators)

    def __repr__(self) -> str:
        return f"Gathered({', '.join(map(repr, self))}; K = {self.k})"

    def scaled(self, factor: jax.Array) -> "Gathered":
        """The statistics of the input multiplied by factor [K], which is positive.

        A method that scales the input of a site hands these to the method that quantizes the scaled weights.
        """

        def one(statistic: Statistic, accumulator: Any) -> Any:
            scaled = jax.vmap(statistic.scaled, (0, None)) if self.stack else statistic.scaled
            return scaled(accumulator, factor)

        return Gathered({s: one(s, accumulator) for s, accumulator in self.items()}, self.k, self.stack)

    def possible(self) -> jax.Array:
        """Whether any activations give such statistics, bool []: no count, magnitude or second moment is negative."""
        told = [s.possible(a) for s, a in self.items() if hasattr(s, "possible")]
        return jnp.stack([jnp.array(True), *told]).all()

    def of_expert(self, index: int) -> "Gathered":
        """The statistics of one expert."""
        accumulators = {s: jax.tree.map(lambda leaf: leaf[index], a) for s, a in self.items()}
        return Gathered(accumulators, self.k, self.stack[1:])

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        keyed = [(jax.tree_util.DictKey(repr(s)), a) for s, a in self._accumulators.items()]
        return keyed, (tuple(self._accumulators), self.k, self.stack)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Iterable[Any]) -> "Gathered":
        statistics, k, stack = static
        return cls(dict(zip(statistics, children, strict=True)), k, stack)


DEFAULT: tuple[Statistic, ...] = (Moments(), AbsMax())
"""What is gathered where no method says what it needs."""


def empty(k: int, statistics: Iterable[Statistic], experts: int | None = None) -> Gathered:
    """Statistics of no tokens.

    Args:
      k: K.
      statistics: what to gather; equal ones are gathered once.
      experts: E, where each expert has its own statistics; else None.
    """
    accumulators = {statistic: statistic.empty(k) for statistic in statistics}
    if experts is None:
        return Gathered(accumulators, k)
    return Gathered({s: _stacked(a, experts) for s, a in accumulators.items()}, k, (experts,))


def _stacked(accumulator: Any, experts: int) -> Any:
    return jax.tree.map(lambda leaf: np.broadcast_to(leaf, (experts, *np.shape(leaf))), accumulator)


def update(
    gathered: Gathered,
    x: jax.Array,
    mask: jax.Array | None = None,
    routed: jax.Array | None = None,
    x_float: jax.Array | None = None,
) -> Gathered:
    """The statistics with more tokens.

    Args:
      x: [..., K], any float dtype; reduced in float32. If each expert has an input of its own, [E, ..., K].
      mask: bool [...], False for tokens that don't count (padding); None counts all.
      routed: bool [E, ...], which tokens reached which expert, for statistics per expert; else None.
      x_float: what the float model has in place of x, of the same shape; None where that is x itself.

    Raises:
      ValueError: x ends in another K, x_float has another shape, or `routed` is missing for statistics per expert or
        given for others.
    """
    if x.shape[-1] != gathered.k:
        raise ValueError(f"got inputs of shape {x.shape} for statistics of K={gathered.k}; gather them at one input")
    if x_float is not None and x_float.shape != x.shape:
        raise ValueError(f"got x of shape {x.shape} and x_float of shape {x_float.shape}, need the same; pass both")
    wanted = () if routed is None else routed.shape[:1]
    if wanted != gathered.stack:
        raise ValueError(
            f"got tokens routed to {wanted} experts for statistics of {gathered.stack}; make both for the same experts"
        )
    apart = routed is not None and x.shape[:-1] == routed.shape
    pair: tuple[jax.Array, ...] = (x,) if x_float is None else (x, x_float)
    pair = tuple(each.astype(jnp.float32).reshape(*wanted * apart, -1, gathered.k) for each in pair)
    keep = jnp.ones(pair[0].shape[-2], bool) if mask is None else mask.reshape(-1)

    def one(accumulators: dict[Statistic, Any], pair: tuple[jax.Array, ...], keep: jax.Array) -> dict[Statistic, Any]:
        rows, *floats = (jnp.where(keep[:, None], each, 0.0) for each in pair)
        more: dict[bool, Any] = {False: (), True: floats}
        return {
            statistic: statistic.update(a, rows, keep, *more[is_paired(statistic)])
            for statistic, a in accumulators.items()
        }

    if routed is None:
        return Gathered(one(dict(gathered), pair, keep), gathered.k)

    statistics, accumulators = tuple(gathered), tuple(gathered.values())

    def of_expert(accumulators: tuple[Any, ...], reached: jax.Array, own: Any) -> tuple[Any, ...]:
        return tuple(one(dict(zip(statistics, accumulators, strict=True)), own or pair, keep & reached).values())

    # One expert after the other: under vmap, each would hold a copy of all tokens.
    routes = routed.reshape(routed.shape[0], -1)
    new = jax.lax.map(lambda both: of_expert(*both), (accumulators, routes, pair if apart else None))
    return Gathered(dict(zip(statistics, new, strict=True)), gathered.k, gathered.stack)


def merge(a: Gathered, b: Gathered) -> Gathered:
    """The statistics of the tokens of both; those that only one of them holds are left out.

    Raises:
      ValueError: they have different K or different experts.
    """
    if (a.k, a.stack) != (b.k, b.stack):
        raise ValueError(f"got statistics of K={a.k}, {a.stack} and K={b.k}, {b.stack}; merge those of one input")
    shared = [statistic for statistic in a if statistic in b]
    merged = {s: (jax.vmap(s.merge) if a.stack else s.merge)(a[s], b[s]) for s in shared}
    return Gathered(merged, a.k, a.stack)


def from_activations(
    x: jax.Array, mask: jax.Array | None = None, statistics: Iterable[Statistic] | None = None
) -> Gathered:
    """Statistics of given activations.

    Args:
      x: [..., K], any float dtype.
      mask: see `update`.
      statistics: what to gather; None means `statistics.DEFAULT`, moments and the largest magnitude.
    """
    return update(empty(x.shape[-1], DEFAULT if statistics is None else statistics), x, mask)
