"""The base of every decoder-only language model in this library: blocks between an embedding and a head.

Letters: B rows, T tokens, E hidden size (the embedding), V vocabulary, K inputs of a linear, X experts.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from any4_jax.kv_cache import Cache, CacheFactory, DefaultCache, DenseCache
from any4_jax.models.program import Program

PRECISION = "highest"
"""The precision of float32 products. A GPU's default, TF32, keeps 10 bits, and logits are then off by 1e-3 of their
scale. It doesn't affect products in bfloat16 and float16."""


class Tap(Protocol):
    """A function that a block calls with the input of each of its sites; under jit the inputs are traced.

    A block may tap under names that no `Site` has; a tap ignores the names that it doesn't know.
    """

    def __call__(self, name: str, x: jax.Array, routed: jax.Array | None = None, /) -> None:
        """See the class.

        Args:
            name: of the site.
            x: the input [B, T, K], or [X, B, T, K] if each expert has its own.
            routed: bool [X, B, T], the tokens that reach each expert, if the site's linears are stacks of experts.
        """
        ...


def no_tap(name: str, x: jax.Array, routed: jax.Array | None = None, /) -> None:
    """The tap that does nothing."""


@dataclasses.dataclass(frozen=True)
class Site:
    """Linears that read the same input.

    The output channels of the layer `after` are the site's input channels, so a factor per channel can move from one
    to the other (see `any4_jax.models.fold`). They come in runs of `width` channels, and the input repeats each run
    `repeat` times: in grouped-query attention, the channels of a key/value head reach the output projection once for
    each of its query heads.

    Attributes:
        name: what taps are called with.
        linears: paths within the block; for the head, within the decoder.
        after: path of the norm or linear that produces the input and whose output nothing else reads; None if there is
            no such layer.
        repeat: how many times the input has each run of `after`'s channels.
        width: channels in a run.
    """

    name: str
    linears: tuple[str, ...]
    after: str | None
    repeat: int = 1
    width: int = 1


class DecoderConfig(Protocol):
    """The fields of a model's config that other files read; configs are frozen, hashable dataclasses."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...


class Decoder(nnx.Module):
    """A decoder-only language model: int32 tokens [B, T] -> float32 logits [B, T, V].

    The class of a family says how tokens are embedded, what its blocks are and what the head does; the caches, the
    loop over the blocks and `__call__` are shared. Its `__init__` takes the arguments of this one, and `rngs`. Linears
    are `nnx.Linear` with kernels [in, out], embeddings are `nnx.Embed`; surgery may replace either by any module that
    is called in the same way.

    Attributes:
        config: the config of its family; static.
        dtype: of activations, and of the cache unless another is asked for.
        tokenizer: a hashable tokenizer, or None; static.
        recipe: how it was quantized (any4_jax.surgery.Recipe), or None; static.
        cache: the cache to use where no other is asked for (kv_cache.DefaultCache), or None for the plain one; static.
        layers: the blocks, a list of modules. Blocks of one structure share one compiled program.
    """

    layers: Any

    def __init__(self, config: Any, *, dtype: DTypeLike = jnp.float32) -> None:
        """Sets the attributes that all families have, except `layers`."""
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.tokenizer: Any = None
        self.recipe: Any = None
        self.cache: DefaultCache | None = None

    @property
    def blocks(self) -> Sequence[nnx.Module]:
        """The blocks, from first to last. A family that keeps them elsewhere overrides this and `block_path`."""
        return self.layers

    def block_path(self, index: int) -> str:
        """The dotted path of a block, such as "layers.3"."""
        return f"layers.{index}"

    @abc.abstractmethod
    def sites(self, index: int) -> tuple[Site, ...]:
        """The sites of a block, in the order in which they run."""

    @property
    @abc.abstractmethod
    def head_site(self) -> Site:
        """The head's linear, or the embedding that serves as one; its name is "head_in"."""

    @abc.abstractmethod
    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """The input of the first block: tokens and positions int32 [B, T] -> [B, T, E].

        Positions of padding are negative; the output there must be finite.
        """

    @staticmethod
    def block(
        graphdef: Any, state: Any, x: jax.Array, cache: Cache, positions: jax.Array, tap: Tap | None = None
    ) -> tuple[jax.Array, Cache]:
        """Runs a block as a pure function of `nnx.split(block)`; under jit the graphdef is static.

        Args:
            graphdef, state: of the block.
            x: [B, T, E].
            cache: of this block.
            positions: int32 [B, T].
            tap: called with the input of each of the block's sites.

        Returns:
            The output [B, T, E], and the cache with these tokens added.
        """
        return nnx.merge(graphdef, state)(x, cache, positions, tap)

    @abc.abstractmethod
    def head_input(self, x: jax.Array) -> jax.Array:
        """The input of the head: the last block's output [B, T, E] -> [B, T, E]. Most families normalize it."""

    @abc.abstractmethod
    def head(self, x: jax.Array) -> jax.Array:
        """The last block's output [B, T, E] -> float32 logits [B, T, V]; `head_input` is its first step."""

    def init_cache(
        self,
        batch: int,
        length: int,
        *,
        start: jax.Array | None = None,
        dtype: DTypeLike | None = None,
        cache: CacheFactory = DenseCache,
    ) -> list[Cache]:
        """An empty cache for each block. Each has a `start` of its own, so that a program may be given all to keep.

        Args:
            batch: B.
            length: the number of slots.
            start: int32 [B], the first slot of each row that holds no padding; None means no padding.
            dtype: of keys and values; None means the model's.
            cache: creates the caches.
        """
        start = jnp.zeros((batch,), jnp.int32) if start is None else start
        dtype = self.dtype if dtype is None else dtype
        heads, size = self.config.num_key_value_heads, self.config.head_dim
        count = len(self.blocks)
        return [cache.create(i, batch, length, heads, size, jnp.array(start), dtype) for i in range(count)]

    def decode(self, tokens: jax.Array, caches: list[Cache], positions: jax.Array) -> tuple[jax.Array, list[Cache]]:
        """Runs all blocks, inside jit: tokens and positions int32 [B, T] -> ([B, T, E], the new caches).

        It doesn't apply `head`, which a caller may want for the last token only.
        """
        run = _jitted(type(self).block)
        x, grown = self.embed(tokens, positions), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = run(*nnx.split(block), x, cache, positions)
            grown.append(cache)
        return x, grown

    def __call__(self, tokens: jax.Array | np.ndarray) -> jax.Array:
        """Integer tokens [B, T], rows without padding -> float32 logits [B, T, V]; compiled once for each shape.

        Raises:
            TypeError: tokens are not integers.
            ValueError: tokens are not [B, T] with T > 0, or one is outside of the vocabulary.
        """
        tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"tokens are {tokens.dtype}, and integer token ids are needed; encode the text first")
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens have shape {tokens.shape}, and [batch, length > 0] is needed; add a batch axis")
        if not isinstance(tokens, jax.core.Tracer) and tokens.size:
            # In numpy, where nothing is compiled.
            low, high = np.min(np.asarray(tokens)), np.max(np.asarray(tokens))
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"token ids are in {low}..{high}, and the vocabulary is 0..{self.config.vocab_size - 1}; use the "
                    "model's own tokenizer"
                )
        return _logits(*Program.of(self), tokens)


@functools.cache
def _jitted(block: Callable[..., tuple[jax.Array, Cache]]) -> Callable[..., tuple[jax.Array, Cache]]:
    """The jitted block of a family: inside a larger jit it is traced once for all blocks of one structure."""
    return jax.jit(block, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _logits(program: Program, leaves: list[jax.Array], tokens: jax.Array) -> jax.Array:
    model = program.model(leaves)
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    x, _ = model.decode(tokens, model.init_cache(batch, length), positions)
    return model.head(x)
