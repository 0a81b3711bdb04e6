"""`calibrate`: statistics of the input of every linear, for every kind of model."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from any4_jax import statistics
from any4_jax.methods import AnyMethod
from any4_jax.methods.checks import refuse_faults
from any4_jax.methods.matrices import Progress
from any4_jax.models.base import Decoder
from any4_jax.models.hf_flax import is_hf_flax
from any4_jax.statistics import Gathered, Statistic
from any4_jax.surgery import Rules, declarations, nnx_modules, pairs, resolve
from any4_jax.surgery.linen_modules import is_pair
from any4_jax.walk.batches import token_batches
from any4_jax.walk.contents import is_finite, refuse_nonfinite
from any4_jax.walk.driver import Plan, walk
from any4_jax.walk.forward import run_hf, run_linen, run_nnx

Data = str | Sequence[str] | np.ndarray | jax.Array | Iterable


def calibrate(
    model: Any,
    data: Data,
    method: AnyMethod | None = None,
    *,
    rules: Rules | None = None,
    sequential: bool | None = None,
    also: Sequence[Statistic] = (),
    batch_size: int = 8,
    seqlen: int = 2048,
    progress: Progress | None = None,
) -> dict[str, Gathered]:
    """Statistics of the input of every linear: the walk of `quantize_model`, without its results.

    `quantize_model(model, method, data=...)` gathers its own statistics, one block at a time. Call `calibrate` for
    statistics that serve several methods, or to look at them; `statistics.save` keeps them in a file.

    Args:
      model: a decoder of any4_jax.models, which is walked block by block; or a Hugging Face Flax model, any NNX module,
        or a pair (Linen module, variables), which run as a whole.
      data: for models of text, a text, a list of texts, token ids [B, T], or an iterable of ragged token lists or of
        [B, T] arrays. Sequences longer than `seqlen` (or the model's context) are cut into pieces; shorter ones are
        padded, and padding is not counted. For other modules, an iterable of batches: each an array, a tuple of
        arguments, or a dict of arguments by name, "method" among them; Hugging Face models take such dicts too.
      method: how the linears will be quantized. The statistics that it needs are gathered besides
        `statistics.DEFAULT`; a sequential one quantizes a copy of the model on the way.
      rules: as in `quantize_model`.
      sequential: for decoders, whether each linear's statistics come from the model whose earlier linears are already
        quantized. None leaves it to the method (`Any4.paper()` says True).
      also: statistics to gather besides, such as `statistics.Hessian()`.
      batch_size: sequences in a batch.
      seqlen: the longest sequence, in tokens.
      progress: called with (done, total, what) after each block, or each batch.

    Returns:
      {path: Gathered} for every linear, and for the embedding if it is also the decoder's head. Matrices of a stack
      (experts, layers under a scan) have statistics of their own, see `Gathered.stack`.

    Raises:
      ValueError: there is no text or token; the data is text and the model has no tokenizer; `sequential` is True
        without a method, or for a model without blocks; the model or its activations hold NaN or infinite values.
      TypeError: the model or the data is none of these.
    """
    methods = [m for m in (method, *(m for _, m in pairs(rules))) if m is not None]
    if sequential is None:
        sequential = any(m.sequential for m in methods)
    if sequential and not methods:
        raise ValueError("got sequential=True without a method, it quantizes as it goes; pass the method to be used")
    refuse_nonfinite(model)
    needs = tuple(dict.fromkeys((*statistics.DEFAULT, *also, *(one for m in methods for one in m.needs))))
    if isinstance(model, Decoder):
        found = nnx_modules.matrices(model)
        by_name = {path for path, matrix in found.items() if matrix.by_name}
        assigned = resolve(found, method, rules, by_name) if sequential else {}
        plan = Plan(assigned, token_batches(model, data, batch_size, seqlen), watch=needs, sequential=sequential)
        if progress is not None:
            plan = dataclasses.replace(plan, on_block=_counting(model, progress))
        return _finite(walk(model, plan).gathered)
    if sequential:
        raise ValueError(
            f"got sequential calibration of a {type(model).__name__}, only decoders of any4_jax.models are walked "
            "block by block; pass sequential=False to calibrate, and what it returns as stats to quantize_model"
        )
    if is_hf_flax(model):
        if isinstance(data, Sequence) and data and isinstance(data[0], Mapping):
            return _finite(run_hf(model, data, needs, progress, declarations(rules)))
        pieces = token_batches(model, data, batch_size, seqlen)
        named = [{"input_ids": t, "attention_mask": mask.astype(np.int32)} for t, mask in pieces]
        return _finite(run_hf(model, named, needs, progress, declarations(rules)))
    run = run_nnx if isinstance(model, nnx.Module) else run_linen if is_pair(model) else None
    if run is None:
        raise TypeError(
            f"got a {type(model).__name__}, calibrate runs NNX modules, Hugging Face Flax models and pairs (Linen "
            "module, variables); gather statistics of others with any4_jax.statistics.from_activations"
        )
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise TypeError(
            f"got calibration data of type {type(data).__name__} for a {type(model).__name__}, which runs on batches "
            "of its own inputs; pass a list of these"
        )
    batches = [data] if hasattr(data, "shape") else list(data)
    if not batches:
        raise ValueError("got no calibration batches, need at least one; pass a list of the model's inputs")
    return _finite(run(model, batches, needs, progress, declarations(rules)))


def _finite(found: dict[str, Gathered]) -> dict[str, Gathered]:
    """The statistics, of which none is NaN or infinite.

    Raises:
      ValueError: one is; the message names the first linear.
    """
    # Linears of one site share their statistics.
    known: dict[int, bool] = {}
    for path, gathered in found.items():
        if id(gathered) not in known:
            known[id(gathered)] = is_finite(gathered)
        if not known[id(gathered)]:
            refuse_faults({"statistics": False}, path)
    return found


def _counting(decoder: Decoder, progress: Progress) -> Callable[[str], None]:
    total, done = len(decoder.blocks), itertools.count(1)
    return lambda path: progress(next(done), total, path)
