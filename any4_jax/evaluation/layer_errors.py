"""Where the errors of a quantized model start and how they grow: its layers beside those of another model.

Letters: B rows, T tokens, E hidden size, K and N inputs and outputs of a linear, V vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from any4_jax.evaluation.windows import Progress
from any4_jax.models.base import Decoder, Site
from any4_jax.models.experts import call_expert
from any4_jax.models.fold import module_at
from any4_jax.walk.batches import token_batches
from any4_jax.walk.calibrate import Data
from any4_jax.walk.capture import EmptyCaches, embed, positions_of

_WHOLE = ""
"""The path of a block in itself."""


@dataclasses.dataclass(frozen=True)
class Deviation:
    """Values b of a model beside the values a of the reference, by their sums over all tokens and channels.

    Attributes:
      count: how many values.
      signal, other, noise, cross: the sums of a^2, b^2, (a - b)^2 and a b.
    """

    count: float = 0.0
    signal: float = 0.0
    other: float = 0.0
    noise: float = 0.0
    cross: float = 0.0

    def __add__(self, more: "Deviation") -> "Deviation":
        return Deviation(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(more), strict=True)))

    @property
    def mse(self) -> float:
        """The mean of (a - b)^2; NaN of no values."""
        return self.noise / self.count if self.count else math.nan

    @property
    def cosine(self) -> float:
        """The cosine of the angle between a and b as vectors of all values; NaN if one is zero."""
        lengths = math.sqrt(self.signal) * math.sqrt(self.other)
        return self.cross / lengths if lengths else math.nan

    @property
    def sqnr(self) -> float:
        """The signal-to-noise ratio 10 log10(sum a^2 / sum (a - b)^2) in decibels; infinite where a = b."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


@dataclasses.dataclass(frozen=True)
class LayerError:
    """The outputs of a linear, or of a whole block.

    Attributes:
      path: of the linear or block in the decoder.
      total: with all errors of the layers before it.
      own: where its block reads what the reference's block reads: with the errors of this block alone.
    """

    path: str
    total: Deviation
    own: Deviation


@dataclasses.dataclass(frozen=True)
class LayerErrors:
    """What `layer_errors` measured.

    Attributes:
      linears: in the order in which they run, the head at last. Tokens that reach other experts in the two models are
        left out of the errors of these experts.
      blocks: the outputs of the blocks: the sums that each adds to, and hands on.
      embedding: what enters the first block.
      kl: the mean KL(reference || model) of the predictions, in nats per token.
      top1: the share of tokens after which both models find the same token likeliest, 0 to 1.
      tokens: how many tokens were read.
    """

    linears: tuple[LayerError, ...]
    blocks: tuple[LayerError, ...]
    embedding: Deviation
    kl: float
    top1: float
    tokens: int

    @property
    def first(self) -> str | None:
        """The path of the first linear whose output differs, or "embedding" if that does; None if nothing does."""
        differing = (each.path for each in self.linears if each.total.noise)
        return "embedding" if self.embedding.noise else next(differing, None)

    @property
    def worst(self) -> LayerError:
        """The block that adds most: whose own SQNR is the lowest."""
        return min(self.blocks, key=lambda each: each.own.sqnr)


def layer_errors(
    reference: Decoder,
    model: Decoder,
    data: Data,
    *,
    batch_size: int = 1,
    seqlen: int = 2048,
    progress: Progress | None = None,
) -> LayerErrors:
    """Runs two decoders side by side, block by block, and compares what each of their linears gives.

    Args:
      reference: the float model.
      model: another form of it, such as a quantized one.
      data: a text, a list of texts, or token ids, as in `calibrate`; encoded by the reference's tokenizer.
      batch_size: sequences that run at once.
      seqlen: the longest sequence, in tokens.
      progress: called with (blocks done, blocks in total).

    Raises:
      ValueError: the two have different blocks, linears or shapes, or the data is refused as by `calibrate`.
    """
    count = len(reference.blocks)
    if len(model.blocks) != count or any(reference.sites(i) != model.sites(i) for i in range(count)):
        raise ValueError(
            f"got models of {count} and {len(model.blocks)} blocks, and both need the same blocks of the same linears; "
            "pass two forms of one model"
        )
    batches = token_batches(reference, data, batch_size, seqlen)
    masks = [jnp.asarray(mask) for _, mask in batches]
    states = [(embed(reference, tokens), embed(model, tokens)) for tokens, _ in batches]
    both = (reference, model)
    sizes = [(decoder.config.vocab_size, x.shape[-1]) for decoder, x in zip(both, states[0], strict=True)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"got models of {sizes[0][0]} tokens and {sizes[0][1]} channels and of {sizes[1][0]} and {sizes[1][1]}, "
            "and both need the same; pass two forms of one model"
        )
    embedding = _sum(_sums(*pair, mask) for pair, mask in zip(states, masks, strict=True))
    caches, linears, blocks = (EmptyCaches(reference), EmptyCaches(model)), list[LayerError](), list[LayerError]()
    for index in range(count):
        sites, path = reference.sites(index), reference.block_path(index)
        split = [nnx.split(decoder.blocks[index]) for decoder in both]
        programs = tuple((type(d).block, graphdef) for d, (graphdef, _) in zip(both, split, strict=True))
        weights, found = tuple(state for _, state in split), []
        for number, (state, mask) in enumerate(zip(states, masks, strict=True)):
            empty = tuple(each.of(index)(*mask.shape) for each in caches)
            states[number], sums = _side_by_side(programs, sites, weights, state, empty, mask)
            found.append(sums)
        for name in (name for site in sites for name in site.linears):
            linears.append(LayerError(f"{path}.{name}", *_both(each[name] for each in found)))
        blocks.append(LayerError(path, *_both(each[_WHOLE] for each in found)))
        if progress is not None:
            progress(index + 1, count)
    head = [_heads(reference, model, *state, mask) for state, mask in zip(states, masks, strict=True)]
    kl, top1 = np.sum([np.asarray(each, np.float64) for _, each in head], axis=0)
    linears.append(LayerError(reference.head_site.linears[0], *_both(each for each, _ in head)))
    tokens = int(sum(mask.sum() for mask in masks))
    kl, top1 = (float(total) / tokens for total in (kl, top1))
    return LayerErrors(tuple(linears), tuple(blocks), embedding, kl, top1, tokens)


@functools.partial(jax.jit, static_argnames=("programs", "sites"))
def _side_by_side(programs: Any, sites: tuple[Site, ...], weights: Any, x: Any, caches: Any, mask: jax.Array) -> Any:
    """Runs the same block of both models.

    Args:
      programs: of each model, the function of its blocks and the graphdef of this one.
      sites: of the block.
      weights: of each model, the state of this block.
      x: what enters the block in each model, [B, T, E].
      caches: empty ones, one for each model.
      mask: bool [B, T].

    Returns:
      The outputs of the blocks; and for each linear by its path in the block, and for the block at _WHOLE, the `_sums`
      of its outputs, and those where both blocks read the reference's x.
    """

    def run(which: int, x: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        (block, graphdef), state, seen = programs[which], weights[which], dict[str, Any]()

        def tap(site: str, value: jax.Array, routed: jax.Array | None = None) -> None:
            seen[site] = value, routed

        y, _ = block(graphdef, state, x, caches[which], positions_of(x), tap)
        module = nnx.merge(graphdef, state)
        return y, {path: (module_at(module, path), *seen[site.name]) for site in sites for path in site.linears}

    (ya, at_a), (yb, at_b), (y_own, at_own) = run(0, x[0]), run(1, x[1]), run(1, x[0])
    sums = {path: (_compared(at_a[path], at_b[path], mask), _compared(at_a[path], at_own[path], mask)) for path in at_a}
    return (ya, yb), sums | {_WHOLE: (_sums(ya, yb, mask), _sums(ya, y_own, mask))}


def _compared(a: tuple[Any, Any, Any], b: tuple[Any, Any, Any], mask: jax.Array) -> jax.Array:
    """The `_sums` of the outputs of two linears: each with its input [B, T, K], and where it is a stack of experts the
    tokens that reach each, bool [X, B, T], and maybe an input of each, [X, B, T, K]."""
    (module_a, x_a, routed_a), (module_b, x_b, routed_b) = a, b
    if routed_a is None or routed_b is None:
        return _sums(module_a(x_a), module_b(x_b), mask)

    def one(expert: jax.Array) -> jax.Array:
        inputs = (x[expert] if x.ndim == routed_a.ndim + 1 else x for x in (x_a, x_b))
        ya, yb = (call_expert((module,), expert, x)[0] for module, x in zip((module_a, module_b), inputs, strict=True))
        return _sums(ya, yb, mask & routed_a[expert] & routed_b[expert])

    return jax.lax.map(one, jnp.arange(routed_a.shape[0], dtype=jnp.int32)).sum(axis=0)


@jax.jit
def _sums(a: jax.Array, b: jax.Array, mask: jax.Array) -> jax.Array:
    """The fields of a `Deviation` of a and b [B, T, N] at the tokens of the mask [B, T], by row: float32 [B, 5]."""
    a, b = (jnp.where(mask[..., None], each.astype(jnp.float32), 0) for each in (a, b))
    values = (jnp.square(a), jnp.square(b), jnp.square(a - b), a * b)
    count = mask.sum(axis=1).astype(jnp.float32) * a.shape[-1]
    return jnp.stack([count, *(each.sum(axis=(1, 2)) for each in values)], axis=1)


@jax.jit
def _heads(reference, model, a, b, mask):
    """The `_sums` of the logits, as of the blocks; and the sums over tokens of the KL and of the agreement."""
    logits, others, own = reference.head(a), model.head(b), model.head(a)
    p, q = (jax.nn.log_softmax(each, axis=-1) for each in (logits, others))
    # What the reference rules out adds nothing, though its log is infinite.
    kl = jnp.where(p == -jnp.inf, 0.0, jnp.exp(p) * (p - q)).sum(axis=-1)
    agree = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
    totals = jnp.where(mask, jnp.maximum(kl, 0.0), 0).sum(), (mask & agree).sum()
    return (_sums(logits, others, mask), _sums(logits, own, mask)), totals


def _both(sums: Iterable[tuple[Any, Any]]) -> tuple[Deviation, Deviation]:
    total, own = zip(*sums, strict=True)
    return _sum(total), _sum(own)


def _sum(sums: Iterable[Any]) -> Deviation:
    return sum((Deviation(*np.asarray(each, np.float64).sum(axis=0).tolist()) for each in sums), Deviation())
