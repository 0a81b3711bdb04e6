"""How large a quantized model will be, and where the bits of one go."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax import statistics
from any4_jax.cli.output import megabytes
from any4_jax.methods import quantize
from any4_jax.methods.base import AnyMethod, scope_of
from any4_jax.models import Decoder
from any4_jax.surgery import Rules, container_of, resolve
from any4_jax.weights import Sparse, parts

_WORDS = {"codes": "codes", "lut": "tables", "scales": "scales", "offsets": "offsets"}


def expected(model: Decoder, method: AnyMethod | None, rules: Rules) -> str:
    """One line on what a model's linears will take, computed from their shapes before anything is quantized."""
    matrices = container_of(model).matrices(model, None, ())
    chosen: dict[str, Any] = resolve(
        matrices, method, rules, {path for path, matrix in matrices.items() if matrix.by_name}
    )
    weights = sum(math.prod(matrices[path].shape) for path in chosen)
    before = sum(matrices[path].array.nbytes for path in chosen)
    line = f"to quantize: {len(chosen)} layers, {weights / 1e6:.3g} million weights, {megabytes(before)} MB"
    sizes = [_nbytes(matrices[path].shape, one) for path, one in chosen.items()]
    known = [size for size in sizes if size is not None]
    if weights and len(known) == len(sizes):
        line += f" -> {megabytes(sum(known))} MB ({8 * sum(known) / weights:.2f} bits per weight)"
    return f"{line}; the time is told as it goes"


def where_the_bits_go(operators: Iterable[Any]) -> str:
    """One line with the bits per weight that codes, tables, scales and so on take, of quantized layers together."""
    parts: dict[str, int] = {}
    weights, widths = 0, set()
    for operator in operators:
        weights += math.prod(operator.shape)
        for path, array in jax.tree_util.tree_flatten_with_path(operator)[0]:
            names = [str(getattr(key, "name", "")) for key in path]
            part = next((_WORDS[name] for name in names if name in _WORDS), names[-1])
            parts[part] = parts.get(part, 0) + array.nbytes
            if part == "tables" and array.shape[-2] > 1:
                widths.add(operator.shape[-1])
    shown = ", ".join(f"{part} {8 * size / weights:.3f}" for part, size in parts.items())
    if widths:
        span = " to ".join(str(width) for width in sorted({min(widths), max(widths)}))
        shown += f" (each row has a table, shared by its {span} weights)"
    return f"bits per weight: {shown}"


@functools.cache
def _nbytes(shape: tuple[int, ...], method: Any) -> int | None:
    """The bytes of a matrix as this method stores it; None if the method tells of no single matrix."""
    if scope_of(method) != "matrix":
        return None
    matrix = jax.ShapeDtypeStruct(shape[-2:], jnp.float32)
    seen = jax.eval_shape(lambda: statistics.empty(shape[-1], method.needs))
    try:
        stored = jax.eval_shape(lambda w, seen: quantize(w, method, seen), matrix, seen)
    except Exception:  # this is an estimate, which stops no work
        return None
    if any(isinstance(part, Sparse) for part in parts(stored)):
        return None  # how many entries will be found isn't known
    return stored.nbytes * math.prod(shape[:-2])
