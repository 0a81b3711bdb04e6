"""What a walk runs: the embedding, a block with taps at its sites, and the input of the head; with empty caches.

Each is jitted with a module's structure static, so that all blocks of one structure share a program.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax import statistics
from any4_jax.models.base import Decoder
from any4_jax.statistics import Gathered


def positions_of(x: jax.Array) -> jax.Array:
    """Positions int32 [B, T] of tokens [B, T] or activations [B, T, E] that have no padding on the left."""
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])


@jax.jit
def embed(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    """Tokens int32 [B, T] -> what enters the first block, [B, T, E]."""
    return decoder.embed(tokens, positions_of(tokens))


@functools.partial(jax.jit, static_argnames=("block", "graphdef", "outputs", "float_graphdef"))
def run_block(
    block: Any,
    graphdef: Any,
    state: Any,
    x: jax.Array,
    cache: Any,
    mask: jax.Array,
    seen: Mapping[str, Gathered],
    outputs: bool,
    float_graphdef: Any = None,
    float_state: Any = None,
    x_float: jax.Array | None = None,
) -> tuple[jax.Array | None, dict[str, Gathered]]:
    """Runs a block on a batch.

    Args:
      block: `Decoder.block` of the model.
      graphdef, state: `nnx.split` of the block.
      x: [B, T, E].
      cache: an empty one for B rows and T slots.
      mask: bool [B, T], False for tokens that don't count.
      seen: the statistics so far, by the name of each site to watch.
      outputs: whether to return the output; if not, XLA drops what comes after the last site of `seen`.
      float_graphdef, float_state, x_float: `nnx.split` of the float block and what enters it in the float model, for
        statistics of pairs; None where that is the same block and the same x.

    Returns:
      (the output [B, T, E] or None, the statistics with this batch's tokens added).
    """
    new, beside = dict(seen), dict[str, jax.Array]()
    if x_float is not None:

        def keep(site: str, value: jax.Array, routed: jax.Array | None = None) -> None:
            del routed  # tokens count for the expert that they reach in the quantized model
            beside[site] = value

        block(float_graphdef, float_state, x_float, cache, positions_of(x), keep)

    def tap(site: str, value: jax.Array, routed: jax.Array | None = None) -> None:
        if site not in new:
            return
        gathered = new[site]
        if gathered.stack and routed is None:
            routed = jnp.ones((*gathered.stack, *value.shape[:-1]), bool)
        new[site] = statistics.update(gathered, value, mask, routed if gathered.stack else None, beside.get(site))

    y, _ = block(graphdef, state, x, cache, positions_of(x), tap)
    return (y if outputs else None), new


@jax.jit
def gather_head(
    decoder: Decoder, x: jax.Array, mask: jax.Array, seen: Gathered, x_float: jax.Array | None = None
) -> Gathered:
    """The statistics of the head's input with more tokens: outputs x [B, T, E] of the last block, those of the float
    model's, or None where statistics of pairs are of x alone; mask bool [B, T]."""
    beside = None if x_float is None else decoder.head_input(x_float)
    return statistics.update(seen, decoder.head_input(x), mask, None, beside)


class EmptyCaches:
    """Empty caches for batches of each shape, in numpy arrays, so that nothing is compiled for them."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._shapes: dict[tuple[int, int], list[Any]] = {}

    def of(self, index: int) -> Callable[[int, int], Any]:
        """(B, T) -> an empty cache of one block, for B rows and T slots."""

        def cache(batch: int, length: int) -> Any:
            shape = batch, length
            if shape not in self._shapes:
                self._shapes[shape] = jax.eval_shape(lambda: self._decoder.init_cache(*shape))
            return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._shapes[shape][index])

        return cache
