"""Attention whose two products are of rounded operands: an option of SmoothQuant, as a cache."""

import dataclasses
from typing import Literal, Self

import jax
from jax.typing import DTypeLike

from any4_jax.kv_cache.attention import attention
from any4_jax.kv_cache.base import Rope, rotated
from any4_jax.kv_cache.dense import DenseCache
from any4_jax.kv_cache.plain import appended
from any4_jax.kv_cache.settings import PLAIN, AttentionSettings
from any4_jax.product.quantized_input import quantize_input
from any4_jax.pytree import register_dataclass
from any4_jax.weights import QuantizeInput


@register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rounded(DenseCache):
    """The plain cache with rounded keys and values, which rounded queries and weights multiply.

    Attributes:
        rounding: how they are rounded (static).
    """

    rounding: "RoundedAttention" = dataclasses.field(metadata=dict(static=True))

    def append(self, keys: jax.Array, values: jax.Array, positions: jax.Array, rope: Rope | None) -> Self:
        """See `DenseCache.append`."""
        new = self.rounding.rounded(rotated(keys, positions, rope)), self.rounding.rounded(values)
        return self._holding(*appended(self.keys, self.values, *new, self.length), self.length + keys.shape[1])

    def attend(
        self, queries: jax.Array, positions: jax.Array, rope: Rope | None, settings: AttentionSettings = PLAIN
    ) -> jax.Array:
        """See `DenseCache.attend`."""
        queries, bits = self.rounding.rounded(rotated(queries, positions, rope)), self.rounding.bits
        return attention(queries, self.keys, self.values, positions, self.start, settings, weight_bits=bits)


@dataclasses.dataclass(frozen=True)
class RoundedAttention:
    """A cache factory: attention rounds queries, keys, values and its weights to a few bits.

        model.init_cache(1, 512, cache=RoundedAttention(8)), generate(model, ..., cache=RoundedAttention(8))

    The vector of each head and token has a scale of its own: queries and keys after their rotation, and values; the
    weights of each query have one too. Published code (that of the figures "W8A8" with attention's products) scales
    values by channel over the whole sequence instead, so that tokens to come change the values of earlier ones. This
    one is causal: what a token sees depends on no later one, and decoding equals the whole forward pass.

    It tells what the rounding costs. Rounded values are stored in the model's dtype and multiplied as floats, so it
    saves neither memory nor time. Like every cache it is no part of the model or its checkpoint.

    Attributes:
        bits: of each number, 2 to 8.
        symmetric: round queries, keys and values without a zero point; weights, which are positive, have none.
    """

    bits: Literal[2, 3, 4, 5, 6, 7, 8] = 8
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise ValueError(f"bits is {self.bits}, and 2 to 8 is needed; leave the cache out to round nothing")

    def create(
        self, block: int, batch: int, length: int, heads: int, head_dim: int, start: jax.Array, dtype: DTypeLike
    ) -> _Rounded:
        """An empty cache, the same for every block."""
        empty = DenseCache.create(block, batch, length, heads, head_dim, start, dtype)
        return _Rounded(empty.keys, empty.values, empty.length, empty.start, self)

    def rounded(self, x: jax.Array) -> jax.Array:
        """x [..., D] with each vector of D rounded, in its dtype."""
        rounding = QuantizeInput(None, None, self.bits, self.symmetric, "token")
        return quantize_input(x.reshape(-1, x.shape[-1]), rounding).reshape(x.shape)
