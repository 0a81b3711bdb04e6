"""The gated MLP of decoders. Letters: B rows, T tokens, E hidden size."""

from collections.abc import Callable

import jax
from flax import nnx

from any4_jax.models.base import Site, Tap, no_tap
from any4_jax.models.config import LlamaConfig
from any4_jax.models.layers import Layers
from any4_jax.nn.nnx import call_each


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)) (arXiv:2002.05202, eq. 6: SwiGLU with silu, GEGLU with gelu)."""

    def __init__(
        self, config: LlamaConfig, layers: Layers, activation: Callable[[jax.Array], jax.Array] = jax.nn.silu
    ) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = activation
        self.gate_proj = layers.linear(hidden, inner, bias=bias)
        self.up_proj = layers.linear(hidden, inner, bias=bias)
        self.down_proj = layers.linear(inner, hidden, bias=bias)

    def sites(self, path: str, after: str) -> tuple[Site, ...]:
        """The sites of this MLP at `path` in a block; `after` is the path of the norm before it."""
        gate, up, down = (f"{path}.{name}_proj" for name in ("gate", "up", "down"))
        return Site("mlp_in", (gate, up), after), Site("mlp_out", (down,), up)

    def __call__(self, x: jax.Array, tap: Tap = no_tap) -> jax.Array:
        """x [B, T, E] -> [B, T, E]."""
        tap("mlp_in", x)
        gate, up = call_each((self.gate_proj, self.up_proj), x)
        inner = self.activation(gate) * up
        tap("mlp_out", inner)
        return self.down_proj(inner)
