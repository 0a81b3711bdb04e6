"""What FPQ has searched, in a file of JSON: formats, biases and shifts by layer. Quantizing from it needs neither data
nor a search, and gives the same bytes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from any4_jax.methods import FPQ
from any4_jax.methods.float_search import MOST_SHIFT
from any4_jax.methods.searched import Searched
from any4_jax.models.base import Decoder
from any4_jax.regular_file import read_regular
from any4_jax.schema import Count, Schema, check, read_json
from any4_jax.statistics import Gathered
from any4_jax.surgery import quantized_leaves, recipe_of
from any4_jax.walk.contents import few
from any4_jax.walk.records import site_units
from any4_jax.weights import QuantizedTensor, QuantizeInput, ScaleInput
from any4_jax.whole_file import write_whole

_KIND: Literal["fpq search results"] = "fpq search results"
_LEAST_POWER, _MOST_POWER = -149, 128
"""The powers of two that float32 holds: from the first, and below the second."""
_ADVICE = "save the results again, or search anew"
Bits = Literal[4, 8]
Exponent = Annotated[int, Field(ge=1, le=5)]
Shift = Annotated[int, Field(ge=0, le=MOST_SHIFT)]


class _Inputs(Schema):
    """How a layer's inputs are rounded; `shifts` are of each input, or empty where all have one bias."""

    bits: Bits
    exponent_bits: Exponent
    bias: float
    shifts: tuple[Shift, ...]


class _Layer(Schema):
    """How a layer is rounded: K, the bias of each row (None for a row of zeros), its inputs, and which layers were
    searched together with it: by their paths in the block ("" for a layer by itself), those in the model."""

    k: Count
    bits: Bits
    exponent_bits: Exponent
    biases: tuple[float | None, ...]
    inputs: _Inputs | None
    together: dict[str, str]


class _File(Schema):
    kind: Literal["fpq search results"]
    layers: dict[str, _Layer]


def save_search_results(model: Any, file: str | os.PathLike[str]) -> None:
    """Writes what FPQ has found for the layers of a model that `quantize_model` returned.

    Raises:
      ValueError: FPQ has quantized none of them, or one of them is a stack of matrices.
      OSError: the file can't be written.
    """
    recipe = recipe_of(model)
    methods = {path: method for path, method, _ in (recipe.linears if recipe else ()) if isinstance(method, FPQ)}
    if not methods:
        raise ValueError("got a model of which fpq has quantized no layer, need one; quantize it with methods.FPQ")
    together, leaves = _together(model, methods), quantized_leaves(model)
    notes = {path: dict(notes) for path, _, notes in recipe.linears}  # type: ignore[union-attr]
    layers = {path: _described(path, leaves[path], notes[path], together[path]) for path in methods}
    content = _File(kind=_KIND, layers=layers).model_dump_json(indent=None)
    write_whole(file, content + "\n")


def load_search_results(file: str | os.PathLike[str]) -> dict[str, Gathered]:
    """What `save_search_results` wrote, by path, for `quantize_model(model, FPQ(given=True, ...), stats=...)`. The
    method's other fields, and the rules, are those of the search.

    Raises:
      ValueError: the file holds something else.
      OSError: it can't be read.
    """
    content = read_json(read_regular(Path(file)), str(file), _ADVICE)
    layers = check(_File, content, str(file), _ADVICE).layers
    for path, layer in layers.items():
        fault = _fault(path, layer, layers)
        if fault is not None:
            raise ValueError(f"{file}: {fault}; {_ADVICE}")
    return {path: Gathered({Searched(): _found(path, layers)}, layer.k) for path, layer in layers.items()}


def _fault(path: str, layer: _Layer, layers: Mapping[str, _Layer]) -> str | None:
    """Why no search has found what is told of a layer, by itself and beside the others; None if one may have."""
    absent = sorted({other for other in layer.together.values() if other not in layers})
    if absent:
        return f"it lacks {few(absent)}, which was searched together with {path}"
    if path not in layer.together.values():
        return f"{path} is not among what it was searched together with, and itself is needed there"
    for other in map(layers.__getitem__, layer.together.values()):
        if (other.k, other.inputs, other.together) != (layer.k, layer.inputs, layer.together):
            return f"{path} and what was searched together with it differ in k, inputs or together, and need the same"
    if layer.inputs is not None and len(layer.inputs.shifts) not in (0, layer.k):
        return f"{path} has {len(layer.inputs.shifts)} shifts, and one for each of k={layer.k} inputs is needed"
    inputs = [] if layer.inputs is None else [(layer.inputs.bias, layer.inputs.exponent_bits)]
    for bias, exponent in [(bias, layer.exponent_bits) for bias in layer.biases] + inputs:
        if bias is not None and not _LEAST_POWER <= 2**exponent - bias < _MOST_POWER:
            return f"{path} has a bias of {bias}, whose scale is beyond float32, and one within is needed"
    return None


def _together(model: Any, methods: Mapping[str, FPQ]) -> dict[str, dict[str, str]]:
    """What each layer was searched together with, see `_Layer`."""
    found = {path: {"": path} for path in methods}
    for index in range(len(model.blocks)) if isinstance(model, Decoder) else ():
        prefix = f"{model.block_path(index)}."
        mine = {path.removeprefix(prefix): method for path, method in methods.items() if path.startswith(prefix)}
        for site in model.sites(index):
            for paths in site_units(site, mine).values():
                shared = {path: f"{prefix}{path}" for path in paths}
                found |= dict.fromkeys(shared.values(), shared)
    return found


def _described(path: str, operator: Any, notes: Mapping[str, Any], together: dict[str, str]) -> _Layer:
    if len(operator.shape) != 2:
        raise ValueError(
            f"{path} is a stack of matrices, and results are kept of single ones; leave it out by a rule, or keep the "
            "quantized model"
        )
    rounding = shifts = None
    while not isinstance(operator, QuantizedTensor):
        if isinstance(operator, QuantizeInput):
            rounding = operator
        elif isinstance(operator, ScaleInput) and rounding is not None:
            shifts = operator.scale
        operator = operator.inner
    inputs = None
    if rounding is not None and rounding.scale is not None:
        exponent = notes["input_exponent_bits"]
        (bias,) = _biases(rounding.scale[None], exponent)
        own = () if shifts is None else tuple(int(shift) for shift in -np.log2(np.asarray(shifts, np.float64)))
        inputs = _Inputs(bits=_width(rounding), exponent_bits=exponent, bias=bias, shifts=own)
    exponent = notes["exponent_bits"]
    return _Layer(
        k=operator.shape[1],
        bits=_width(operator),
        exponent_bits=exponent,
        biases=tuple(_biases(operator.scales[:, 0], exponent)),
        inputs=inputs,
        together=together,
    )


def _width(operator: QuantizedTensor | QuantizeInput) -> Bits:
    return 8 if operator.bits == 8 else 4


def _biases(scales: jax.Array, exponent: int) -> list[Any]:
    """The biases of scales, in float64, from which the scales come back exactly."""
    return [2**exponent - float(np.log2(scale)) if scale else None for scale in np.asarray(scales, np.float64)]


def _scales(biases: Any, exponent: int) -> np.ndarray:
    return np.asarray([0.0 if bias is None else 2.0 ** (2**exponent - bias) for bias in biases], np.float32)


def _found(path: str, layers: Mapping[str, _Layer]) -> dict[str, Any]:
    """The accumulator of `Searched` for one layer."""
    layer = layers[path]
    found: dict[str, Any] = {
        "weights": {
            name: {
                "bits": jnp.int32(layers[other].bits),
                "exponent": jnp.int32(layers[other].exponent_bits),
                "scales": jnp.asarray(_scales(layers[other].biases, layers[other].exponent_bits)),
            }
            for name, other in layer.together.items()
        }
    }
    if layer.inputs is not None:
        shifts = layer.inputs.shifts or (0,) * layer.k
        found["inputs"] = {
            "bits": jnp.int32(layer.inputs.bits),
            "exponent": jnp.int32(layer.inputs.exponent_bits),
            "scale": jnp.asarray(_scales([layer.inputs.bias], layer.inputs.exponent_bits)[0]),
            "shifts": jnp.asarray(shifts, jnp.int32),
        }
    return found
