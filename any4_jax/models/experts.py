"""Mixtures of experts: a router sends each token to a few of X MLPs (arXiv:2101.03961, arXiv:2401.04088).

Letters: B rows, T tokens, E hidden size, F inner size of an expert, X experts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from any4_jax.models.base import Site, Tap, no_tap
from any4_jax.models.layers import Layers
from any4_jax.nn.nnx import Any4Linear
from any4_jax.product import matmul_each
from any4_jax.weights import take


class Experts(nnx.Module):
    """X gated MLPs; each linear is a stack of X matrices."""

    def __init__(self, count: int, hidden: int, inner: int, layers: Layers) -> None:
        """`count` is X, `hidden` E, `inner` F."""
        self.gate_proj = layers.linears(count, hidden, inner)
        self.up_proj = layers.linears(count, hidden, inner)
        self.down_proj = layers.linears(count, inner, hidden)

    def inner(self, expert: jax.Array, x: jax.Array) -> jax.Array:
        """What enters `down_proj` of one expert: x [..., E] -> [..., F]."""
        gate, up = call_expert((self.gate_proj, self.up_proj), expert, x)
        return jax.nn.silu(gate) * up

    def outer(self, expert: jax.Array, inner: jax.Array) -> jax.Array:
        """`down_proj` of one expert: [..., F] -> [..., E]."""
        (y,) = call_expert((self.down_proj,), expert, inner)
        return y


def call_expert(linears: tuple[Any, ...], expert: jax.Array, x: jax.Array) -> list[jax.Array]:
    """The products of x [..., K] with one matrix of each stack; codes of other experts are not read.

    Args:
        linears: stacks that read the same input, float or quantized.
        expert: int32 scalar.
        x: [..., K].
    """
    if all(isinstance(linear, Any4Linear) for linear in linears):
        return list(matmul_each(x, [take(linear.weight, expert) for linear in linears]))
    return [
        matmul_each(x, [take(linear.weight, expert)])[0]
        if isinstance(linear, Any4Linear)
        else x @ linear.kernel[...][expert].astype(x.dtype)
        for linear in linears
    ]


class MoE(nnx.Module):
    """A router and its experts, in place of an MLP.

    Attributes:
        router: a linear E -> X.
        experts: see `Experts`.
        top: how many experts a token reaches.
        normalized: whether their weights sum to 1; else they keep their share in the softmax over all experts.
    """

    def __init__(self, hidden: int, inner: int, count: int, layers: Layers, *, top: int, normalized: bool) -> None:
        """`hidden` is E, `inner` F, `count` X."""
        self.top, self.normalized, self.count = top, normalized, count
        self.router = layers.linear(hidden, count)
        self.experts = Experts(count, hidden, inner, layers)

    def sites(self, path: str, after: str) -> tuple[Site, ...]:
        """The sites of this layer at `path` in a block.

        The router and the experts read one input in two sites, because statistics of experts are per expert. So a
        factor can't move to the norm `after`, which both read.
        """
        gate, up, down = (f"{path}.experts.{name}_proj" for name in ("gate", "up", "down"))
        return (
            Site("router_in", (f"{path}.router",), None),
            Site("experts_in", (gate, up), None),
            Site("experts_out", (down,), None),
        )

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, T, E] -> the experts of each token int32 [B, T, top], and their weights [B, T, top] in x's dtype."""
        shares = jax.nn.softmax(self.router(x).astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(shares, self.top)
        if self.normalized:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return chosen, weights.astype(x.dtype)

    def __call__(self, x: jax.Array, tap: Tap = no_tap) -> jax.Array:
        """x [B, T, E] -> [B, T, E].

        If there are fewer choices than experts, as in a decode step, only the chosen experts run, one choice after the
        other. Else each expert runs over all tokens, whose weight is 0 where they don't reach it.
        """
        tap("router_in", x)
        chosen, weights = self.route(x)
        if tap is no_tap and chosen.size < self.count:
            return self._by_choice(x, chosen, weights)
        experts = jnp.arange(self.count, dtype=jnp.int32)
        reached = chosen[None] == experts[:, None, None, None]
        share = jnp.where(reached, weights[None], 0).sum(axis=-1)
        if tap is no_tap:
            return self._by_expert(x, share)
        tap("experts_in", x, reached.any(axis=-1))
        inner = jax.lax.map(lambda expert: self.experts.inner(expert, x), experts)
        tap("experts_out", inner, reached.any(axis=-1))
        outer = jax.lax.map(lambda both: self.experts.outer(*both), (experts, inner))
        return (outer * share[..., None]).sum(axis=0)

    def _by_choice(self, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        rows = jnp.repeat(x.reshape(-1, x.shape[-1]), self.top, axis=0)

        def one(choice: tuple[jax.Array, jax.Array]) -> jax.Array:
            expert, row = choice
            return self.experts.outer(expert, self.experts.inner(expert, row[None]))[0]

        outer = jax.lax.map(one, (chosen.reshape(-1), rows)) * weights.reshape(-1, 1)
        return outer.reshape(*x.shape[:2], self.top, -1).sum(axis=2)

    def _by_expert(self, x: jax.Array, share: jax.Array) -> jax.Array:
        def add(total: jax.Array, both: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            expert, own = both
            return total + self.experts.outer(expert, self.experts.inner(expert, x)) * own[..., None], None

        total, _ = jax.lax.scan(add, jnp.zeros_like(x), (jnp.arange(self.count, dtype=jnp.int32), share))
        return total
