"""`calibrate`: one entry for every kind of model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from any4_jax import surgery
from any4_jax.calibration.batches import token_batches
from any4_jax.calibration.blocks import has_blocks, walk_blocks
from any4_jax.calibration.forward import run_hf, run_linen, run_nnx
from any4_jax.methods import Method
from any4_jax.models.hf_flax import is_hf_flax
from any4_jax.statistics import Statistics
from any4_jax.surgery import Progress, Rules
from any4_jax.surgery.linen_modules import is_pair


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
      model: any4_jax.models.Llama (or another model with `embed_tokens`, `layers`, `sites` and `block`, walked block
        by block), a Hugging Face Flax model, any NNX module, or a pair (Linen module, variables), run as a whole.
      data: for models of text, a text, a list of texts, token ids [B, T], or an iterable of ragged token lists or of
        [B, T] arrays. Sequences longer than `seqlen` (or the model's context) are cut into pieces; shorter ones are
        padded, and padding is not counted. For other modules, an iterable of batches: each an array, a tuple of
        arguments, or a dict of arguments by name; Hugging Face models take such dicts too.
      method: what the layers will be quantized with; needed by `sequential`, and by methods that learn from a sample of
        tokens (`Any4(solver="gradient")`), which is then gathered too.
      rules: as for `quantize_model`; used by `sequential`, and for the samples that their methods need.
      sequential: take each layer's statistics from the model whose earlier layers are quantized already, as the
        published any4 does; for models with blocks. None is the method's own choice (`Any4.paper()` says True).
      batch_size: sequences in a batch.
      seqlen: longest sequence.
      progress: called with (done, total, what) after each block, or each batch.

    Returns:
      {path: Statistics} for every linear layer, and for the embedding of a model whose head it is.

    Raises:
      ValueError: no text or tokens; text for a model without a tokenizer; sequential=True without a method, or for a
        model without blocks; Dense layers under nn.scan.
      TypeError: a model of none of these kinds.
    """
    if sequential is None:
        sequential = method is not None and method.sequential
    if sequential and method is None:
        raise ValueError("got sequential=True without a method, it quantizes as it goes; pass the method to be used")
    if batch_size < 1 or seqlen < 1:
        raise ValueError(f"got batch_size={batch_size} and seqlen={seqlen}, both must be at least 1; pass larger ones")
    samples = max((m.samples for m in (method, *(m for _, m in rules or ())) if m is not None), default=0)
    if has_blocks(model):
        chosen = surgery.resolve(surgery.linears(model), method, rules) if sequential else {}
        return walk_blocks(model, token_batches(model, data, batch_size, seqlen), chosen, samples, progress)
    if sequential:
        raise ValueError(
            f"got sequential calibration of a {type(model).__name__}, only models with blocks can be walked so; pass "
            "sequential=False"
        )
    if is_hf_flax(model):
        if isinstance(data, Sequence) and data and isinstance(data[0], Mapping):
            return run_hf(model, data, samples, progress)
        pieces = token_batches(model, data, batch_size, seqlen)
        named = [{"input_ids": t, "attention_mask": mask.astype(np.int32)} for t, mask in pieces]
        return run_hf(model, named, samples, progress)
    run = run_nnx if isinstance(model, nnx.Module) else run_linen if is_pair(model) else None
    if run is None:
        raise TypeError(
            f"got a {type(model).__name__}, calibrate runs NNX modules, Hugging Face Flax models and pairs (Linen "
            "module, variables); gather statistics of others with any4_jax.statistics.from_activations"
        )
    batches = [data] if hasattr(data, "shape") else list(data)
    if not batches:
        raise ValueError("got no calibration batches, need at least one; pass a list of the model's inputs")
    return run(model, batches, samples, progress)
