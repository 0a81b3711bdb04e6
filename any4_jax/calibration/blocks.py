"""Statistics gathered block by block.

One driver walks the decoder: the inputs of a block are held for all batches, the block is run on each, its taps
reduce what they see to `Statistics`, and its outputs are the next block's inputs. So a model's activations are
held for one layer boundary at a time, and all blocks of one shape share one compiled program.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from any4_jax import statistics, surgery
from any4_jax.calibration.batches import Batch
from any4_jax.methods import Method
from any4_jax.models.base import Decoder
from any4_jax.statistics import Statistics
from any4_jax.surgery import Progress


def has_blocks(model: Any) -> bool:
    """Whether a model can be walked block by block."""
    return isinstance(model, Decoder)


def walk_blocks(
    model: Any, batches: list[Batch], chosen: Mapping[str, Method], samples: int, progress: Progress | None
) -> dict[str, Statistics]:
    """The block driver. Layers in `chosen` are quantized (in a copy of their block) as their statistics come in; these
    hold a sample of `samples` tokens."""
    gathered: dict[str, Statistics] = {}
    hidden = [_embed(model, tokens) for tokens, _ in batches]
    for index, layer in enumerate(model.blocks):
        prefix, sites = f"{model.block_path(index)}.", model.sites(index)
        methods = {path: m for path, m in chosen.items() if path.startswith(prefix)}
        outputs, seen = _run(model, sites, layer, hidden, batches, samples)
        for site in sites:
            gathered |= {prefix + linear: seen[site.name] for linear in site.linears}
            mine = [path for path in (prefix + linear for linear in site.linears) if path in methods]
            if mine:
                layer = _quantize_site(layer, prefix, mine, methods, gathered)
                outputs, seen = _run(model, sites, layer, hidden, batches, samples)
        hidden = outputs
        if progress is not None:
            progress(index + 1, len(model.blocks), prefix.rstrip("."))
    (head,) = model.head_site.linears
    if isinstance(surgery.holders(model)[head], nnx.Linear | nnx.Embed):
        stats = statistics.empty(hidden[0].shape[-1], samples)
        for x, (_, mask) in zip(hidden, batches, strict=True):
            stats = _head_statistics(model, x, mask, stats)
        gathered[head] = stats
    return gathered


def _quantize_site(layer, prefix, paths, methods, gathered) -> nnx.Module:
    layer = surgery.copy_module(layer)
    here = {prefix + path: linear for path, linear in surgery.linears(layer).items()}
    for path in paths:
        new = surgery.quantize_linear(here[path], methods[path], gathered[path], path)
        surgery.replace_module(layer, path.removeprefix(prefix), new)
    return layer


def _run(model, sites, layer, hidden, batches, samples) -> tuple[list[jax.Array], dict[str, Statistics]]:
    """A block's outputs for all batches, and the statistics of its sites."""
    graphdef, state = nnx.split(layer)
    here: dict[tuple, Any] = dict(nnx.iter_modules(layer))
    first = {site.name: here[tuple(site.linears[0].split("."))] for site in sites}
    seen = {name: statistics.empty(linear.in_features, samples) for name, linear in first.items()}
    outputs = []
    for x, (_, mask) in zip(hidden, batches, strict=True):
        y, seen = _block_statistics(type(model).block, graphdef, state, x, _empty_cache(model, x), mask, seen)
        outputs.append(y)
    return outputs, seen


def _empty_cache(model, x: jax.Array):
    """One layer's cache for x [B, T, E], as host zeros: nothing is compiled for it."""
    shapes = jax.eval_shape(lambda: model.init_cache(x.shape[0], x.shape[1])[0])
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _block_statistics(block, graphdef, state, x, cache, mask, seen):
    seen = dict(seen)

    def tap(site: str, value: jax.Array, routed: jax.Array | None = None) -> None:
        if site in seen:
            seen[site] = statistics.update(seen[site], value, mask)

    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    y, _ = block(graphdef, state, x, cache, positions, tap)
    return y, seen


@jax.jit
def _head_statistics(model, x, mask, stats):
    return statistics.update(stats, model.head_input(x), mask)


@jax.jit
def _embed(model, tokens):
    return model.embed(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape))
