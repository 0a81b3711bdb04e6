"""Statistics of the activations that enter each linear layer, gathered block by block.

One driver walks the decoder: the inputs of a block are held for all batches, the block is run on each, its taps
reduce what they see to `Statistics`, and its outputs are the next block's inputs. So a model's activations are
held for one layer boundary at a time, and all blocks of one shape share one compiled program.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from any4_jax import statistics, surgery
from any4_jax.methods import Method
from any4_jax.statistics import Statistics
from any4_jax.surgery import Progress, Rules

Batch = tuple[np.ndarray, np.ndarray]
"""Tokens int32 [B, T] and a mask bool [B, T] that is False on padding."""


def calibrate(
    model: Any,
    data: str | Sequence[str] | np.ndarray | jax.Array | Iterable,
    method: Method | None = None,
    *,
    rules: Rules | None = None,
    sequential: bool | None = None,
    batch_size: int = 8,
    seqlen: int = 2048,
    progress: Progress | None = None,
) -> dict[str, Statistics]:
    """Statistics of the input of every linear layer.

    Args:
      model: a model with `embed_tokens`, `layers`, `sites` and `block`, such as any4_jax.models.Llama.
      data: a text, a list of texts, token ids [B, T], or an iterable of ragged token lists or of [B, T] arrays.
        Sequences longer than `seqlen` (or the model's context) are cut into pieces; shorter ones are padded, and
        padding is not counted.
      method: what the layers will be quantized with; needed by `sequential`.
      rules: as for `quantize_model`; used by `sequential`.
      sequential: take each layer's statistics from the model whose earlier layers are quantized already, as the
        published any4 does. None is the method's own choice (`Any4.paper()` says True).
      batch_size: sequences in a batch.
      seqlen: longest sequence.
      progress: called with (done, total, path) after each block.

    Returns:
      {path: Statistics} for every linear layer, the head included where it is one.

    Raises:
      ValueError: no text or tokens; text for a model without a tokenizer; sequential=True without a method.
      TypeError: the model has no blocks to walk.
    """
    if not all(hasattr(model, name) for name in ("embed_tokens", "layers", "sites", "block")):
        raise TypeError(
            f"got a {type(model).__name__}, calibrate walks models with embed_tokens, layers, sites and block; "
            "gather the statistics of other models with any4_jax.statistics.from_activations"
        )
    if sequential is None:
        sequential = method is not None and method.sequential
    if sequential and method is None:
        raise ValueError("got sequential=True without a method, it quantizes as it goes; pass the method to be used")
    if batch_size < 1 or seqlen < 1:
        raise ValueError(f"got batch_size={batch_size} and seqlen={seqlen}, both must be at least 1; pass larger ones")
    batches = _batches(model, data, batch_size, seqlen)
    chosen = surgery.resolve(surgery.linears(model), method, rules) if sequential else {}
    return _walk(model, batches, chosen, progress)


def _walk(model, batches: list[Batch], chosen: Mapping[str, Method], progress) -> dict[str, Statistics]:
    """The block driver. Layers in `chosen` are quantized (in a copy of their block) as their statistics come in."""
    gathered: dict[str, Statistics] = {}
    hidden = [_embed(*nnx.split(model.embed_tokens), tokens) for tokens, _ in batches]
    for index, layer in enumerate(model.layers):
        prefix = f"layers.{index}."
        methods = {path: m for path, m in chosen.items() if path.startswith(prefix)}
        outputs, seen = _run(model, layer, hidden, batches)
        for site in model.sites:
            gathered |= {prefix + linear: seen[site.name] for linear in site.linears}
            mine = [path for path in (prefix + linear for linear in site.linears) if path in methods]
            if mine:
                layer = _quantize_site(layer, prefix, mine, methods, gathered)
                outputs, seen = _run(model, layer, hidden, batches)
        hidden = outputs
        if progress is not None:
            progress(index + 1, len(model.layers), prefix.rstrip("."))
    if isinstance(getattr(model, "lm_head", None), nnx.Linear):
        stats = statistics.empty(hidden[0].shape[-1])
        for x, (_, mask) in zip(hidden, batches, strict=True):
            stats = _head_statistics(*nnx.split(model.norm), x, mask, stats)
        gathered["lm_head"] = stats
    return gathered


def _quantize_site(layer, prefix, paths, methods, gathered) -> nnx.Module:
    layer = surgery.copy_module(layer)
    here = {prefix + path: linear for path, linear in surgery.linears(layer).items()}
    for path in paths:
        new = surgery.quantize_layer(here[path], methods[path], gathered[path], path)
        surgery.replace_module(layer, path.removeprefix(prefix), new)
    return layer


def _run(model, layer, hidden, batches) -> tuple[list[jax.Array], dict[str, Statistics]]:
    """A block's outputs for all batches, and the statistics of its sites."""
    graphdef, state = nnx.split(layer)
    here: dict[tuple, Any] = dict(nnx.iter_modules(layer))
    seen = {site.name: statistics.empty(here[tuple(site.linears[0].split("."))].in_features) for site in model.sites}
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

    def tap(site: str, value: jax.Array) -> None:
        seen[site] = statistics.update(seen[site], value, mask)

    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    y, _ = block(graphdef, state, x, cache, positions, tap)
    return y, seen


@functools.partial(jax.jit, static_argnums=0)
def _head_statistics(graphdef, state, x, mask, stats):
    return statistics.update(stats, nnx.merge(graphdef, state)(x), mask)


@functools.partial(jax.jit, static_argnums=0)
def _embed(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


def _batches(model, data, batch_size: int, seqlen: int) -> list[Batch]:
    """Pieces of at most `seqlen` tokens, padded on the right to the longest of their batch and masked there."""
    seqlen = min(seqlen, model.config.max_position_embeddings)
    pieces = [row[i : i + seqlen] for row in _sequences(model, data) for i in range(0, len(row), seqlen)]
    if not pieces:
        raise ValueError("got no calibration text or tokens, need at least one token; pass some text")
    pieces.sort(key=len)
    batches = []
    for i in range(0, len(pieces), batch_size):
        rows = pieces[i : i + batch_size]
        tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for j, row in enumerate(rows):
            tokens[j, : len(row)] = row
            mask[j, : len(row)] = True
        batches.append((tokens, mask))
    return batches


def _sequences(model, data) -> list[np.ndarray]:
    """Token sequences of any of the forms that `calibrate` takes."""
    rows: list[np.ndarray] = []
    for item in [data] if isinstance(data, str) else data:
        if isinstance(item, str):
            # Encoding "" would give a lone beginning-of-text token, and statistics of nothing.
            if not item.strip():
                continue
            if model.tokenizer is None:
                raise ValueError("got text for a model without a tokenizer; pass token ids")
            rows.append(np.asarray(model.tokenizer.encode(item), np.int32))
            continue
        array = np.asarray(item)
        if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (1, 2):
            raise ValueError(
                f"got calibration data of dtype {array.dtype} and shape {array.shape}; pass texts, lists of token ids, "
                "or [B, T] arrays of them"
            )
        rows += list(np.atleast_2d(array).astype(np.int32))
    top = max((int(row.max(initial=0)) for row in rows), default=0)
    low = min((int(row.min(initial=0)) for row in rows), default=0)
    if top >= model.config.vocab_size or low < 0:
        raise ValueError(
            f"got token ids from {low} to {top}, the vocabulary has {model.config.vocab_size}; use its tokenizer"
        )
    return rows
