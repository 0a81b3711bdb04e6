"""`calibrate_cache`: what a cache learns from the keys and values of a model, block by block."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from any4_jax.kv_cache import PLAIN, AttentionSettings, CacheFactory, CacheSample, DenseCache, Rope
from any4_jax.methods.matrices import Progress
from any4_jax.models.base import Decoder
from any4_jax.pytree import register_dataclass
from any4_jax.statistics import Sample, SampledTokens
from any4_jax.walk.batches import Batch, token_batches
from any4_jax.walk.calibrate import Data
from any4_jax.walk.capture import embed, positions_of
from any4_jax.walk.contents import is_finite, refuse_nonfinite

Factory = TypeVar("Factory", bound=CacheFactory)


def calibrate_cache(
    model: Any,
    cache: Factory,
    data: Data,
    *,
    tokens: int = 4096,
    batch_size: int = 1,
    seqlen: int = 2048,
    progress: Progress | None = None,
) -> Factory:
    """The cache with what it learns from the keys and values of a model; `kv_cache.KVQuant` needs it.

        cache = a4.calibrate_cache(model, a4.kv_cache.KVQuant(bits=3), text)
        a4.generate(model, prompt, cache=cache)
        a4.save(path, model, cache=cache)

    The model runs block by block, forwards, and backwards where the cache weights errors by the squared gradient of
    the loss (Fisher information). In memory are the activations between the blocks, those of one block, and the sample.

    Args:
      model: a decoder of any4_jax.models. The float one shows what is lost; one that is quantized can be taken as well.
      cache: has a method `calibrated`, which takes a list of `kv_cache.CacheSample`, one for each block. Its attribute
        `weighted` says whether these need weights, and `sinks` how many tokens at the beginning of a sequence, which
        it keeps exact, don't count.
      data: as in `calibrate`: a text, texts, or token ids.
      tokens: how many are sampled; all if there are fewer.
      batch_size: sequences in a batch.
      seqlen: the longest sequence, in tokens.
      progress: called with (done, total, what) after each block of each batch.

    Raises:
      ValueError: there is no text or token, or none that counts; the data is text and the model has no tokenizer; the
        model or its keys, values or gradients hold NaN or infinite values.
      TypeError: the model is no Decoder, or the cache learns nothing.
    """
    if not isinstance(model, Decoder):
        raise TypeError(f"got a {type(model).__name__}, and a Decoder is needed, which has caches; load one")
    learn = getattr(cache, "calibrated", None)
    if learn is None:
        name = getattr(cache, "__name__", type(cache).__name__)
        raise TypeError(f"got a {name}, which learns nothing from data; use it as it is")
    refuse_nonfinite(model)
    weighted, sinks = bool(getattr(cache, "weighted", False)), int(getattr(cache, "sinks", 0))
    width = model.config.num_key_value_heads * model.config.head_dim
    statistic = Sample(tokens)
    samples = [statistic.empty(width * (4 if weighted else 2)) for _ in model.blocks]
    batches = token_batches(model, data, batch_size, seqlen)
    total = len(batches) * len(samples)
    for index, batch in enumerate(batches):
        step = _counting(progress, index * len(samples), total)
        samples = _with_batch(model, batch, sinks, weighted, statistic, samples, step)
    heads = model.config.num_key_value_heads
    every = [_sample(each, heads, weighted, tokens) for each in samples]
    if not is_finite(every):
        raise ValueError("the model's keys, values or their gradients hold NaN or infinite values; check its weights")
    calibrated: Factory = learn(every)
    return calibrated


def _counting(progress: Progress | None, before: int, total: int) -> Callable[[int], None]:
    return (lambda done: None) if progress is None else lambda done: progress(before + done, total, "block")


def _sample(sampled: SampledTokens, heads: int, weighted: bool, tokens: int) -> CacheSample:
    """The tokens that were seen."""
    count = min(int(sampled.count), tokens)
    if count == 0:
        raise ValueError("got no calibration token that counts, since the first ones stay exact; pass a longer text")
    parts = jnp.split(sampled.x[:count], 4 if weighted else 2, axis=1)
    return CacheSample(*(x.reshape(count, heads, -1) for x in parts))


def _with_batch(
    model: Decoder,
    batch: Batch,
    sinks: int,
    weighted: bool,
    statistic: Sample,
    samples: list[Any],
    step: Callable[[int], None],
) -> list[Any]:
    """The samples of all blocks with a batch's tokens."""
    rows, mask = batch
    caches = model.init_cache(*rows.shape, cache=_Watch)
    kept = jnp.asarray(mask) & (jnp.arange(rows.shape[1], dtype=jnp.int32) >= sinks)[None]
    split, program = [nnx.split(block) for block in model.blocks], type(model).block
    x, hidden, new = embed(model, rows), [], list(samples)
    for i, (parts, cache) in enumerate(zip(split, caches, strict=True)):
        hidden.append(x)
        if weighted:
            x = _forward(program, *parts, x, cache)[0]
        else:
            x, seen = _forward(program, *parts, x, cache)
            new[i] = _added(statistic, new[i], seen, kept)
            step(i + 1)
    if weighted:
        slope = _slope(model, x, rows, jnp.asarray(mask))
        for count, i in enumerate(reversed(range(len(split))), 1):
            slope, seen = _backward(program, *split[i], hidden.pop(), caches[i], slope)
            new[i] = _added(statistic, new[i], seen, kept)
            step(count)
    return new


@functools.partial(jax.jit, static_argnums=0)
def _added(statistic: Sample, sampled: Any, seen: tuple[jax.Array, ...], kept: jax.Array) -> Any:
    x = jnp.concatenate([each.reshape(kept.size, -1).astype(jnp.float32) for each in seen], axis=1)
    return statistic.update(sampled, jnp.where(kept.reshape(-1, 1), x, 0.0), kept.reshape(-1))


@functools.partial(jax.jit, static_argnames=("block", "graphdef"))
def _forward(block: Any, graphdef: Any, state: Any, x: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    """The output [B, T, E] of a block, and its keys and values [B, T, Hkv, D]."""
    y, cache = block(graphdef, state, x, cache, positions_of(x))
    return y, (cache.keys, cache.values)


@functools.partial(jax.jit, static_argnames=("block", "graphdef"))
def _backward(
    block: Any, graphdef: Any, state: Any, x: jax.Array, cache: Any, slope: jax.Array
) -> tuple[jax.Array, Any]:
    """The gradient [B, T, E] at a block's input from that at its output; keys, values, and their squared gradients."""

    def run(x: jax.Array, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, Any]:
        y, grown = block(graphdef, state, x, dataclasses.replace(cache, keys=keys, values=values), positions_of(x))
        return y, (grown.keys, grown.values)

    _, back, seen = jax.vjp(run, x, cache.keys, cache.values, has_aux=True)
    before, *slopes = back(slope.astype(x.dtype))
    return before, (*seen, *(jnp.square(each.astype(jnp.float32)) for each in slopes))


@jax.jit
def _slope(model: Decoder, x: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """The gradient of the sum of the tokens' losses at the head's input [B, T, E]; mask bool [B, T]."""

    def loss(x: jax.Array) -> jax.Array:
        logs = jax.nn.log_softmax(model.head(x)[:, :-1])
        found = jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.where(mask[:, 1:], found, 0.0).sum()

    return jax.grad(loss)(x)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class _Watch:
    """A plain cache that shows its keys and values, and adds to them what it holds before, zeros: their gradient is
    that of the keys and values.

    Attributes:
        dense: the cache.
        keys, values: [B, S, Hkv, D], keys before their rotation.
    """

    dense: DenseCache
    keys: jax.Array
    values: jax.Array

    @classmethod
    def create(
        cls, block: int, batch: int, length: int, heads: int, head_dim: int, start: jax.Array, dtype: Any
    ) -> Self:
        dense = DenseCache.create(block, batch, length, heads, head_dim, start, dtype)
        return cls(dense, *(jnp.zeros((batch, length, heads, head_dim), dtype) for _ in range(2)))

    def append(self, keys: jax.Array, values: jax.Array, positions: jax.Array, rope: Rope | None) -> Self:
        keys, values = keys + self.keys, values + self.values
        return type(self)(self.dense.append(keys, values, positions, rope), keys, values)

    def attend(
        self, queries: jax.Array, positions: jax.Array, rope: Rope | None, settings: AttentionSettings = PLAIN
    ) -> jax.Array:
        return self.dense.attend(queries, positions, rope, settings)
