"""Which kernel each layer of a model runs on, and why."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax import product
from any4_jax.kv_cache import CacheFactory
from any4_jax.methods.base import SCALED
from any4_jax.models import Decoder
from any4_jax.product.explain import DENSE, check_rows, explain_on, explained_platform
from any4_jax.surgery.cached import explain_attention
from any4_jax.surgery.containers import container_of, recipe_of
from any4_jax.surgery.coverage import coverage

_NUMBER = re.compile(r"\b\d+\b")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which kernel each layer of a model uses; as a str, the text of `explain`.

    Attributes:
      platform: for which the kernels were chosen.
      head: what holds for all layers, in words.
      layers: by a text that tells of each backend, the layers of which it is true: path with shape, and their number.
      attention: a text for each kind of attention over the cache, if the model has one.
    """

    platform: str
    head: str
    layers: Mapping[str, Mapping[str, int]]
    attention: Sequence[str]

    def __str__(self) -> str:
        paragraphs = []
        for text, places in self.layers.items():
            lines = [f"{where}  {count} layer{'s' if count > 1 else ''}" for where, count in places.items()]
            paragraphs.append("\n".join([*lines, *(f"    {line}" for line in text.splitlines())]))
        return "\n\n".join([self.head, *paragraphs, *self.attention])


def explain(
    x: Any, w: Any = None, platform: str | None = None, *, rows: int = 1, cache: CacheFactory | None = None
) -> str:
    """Which kernel each layer uses: for each backend, whether it takes the product on `platform`, or why it can't.

    Of a decoder with caches it says so of the attention over them, too.

    Args:
      x: with `w`, an array or ShapeDtypeStruct [..., K]; without `w`, any model that `quantize_model` takes.
      w: an operator [N, K]; None explains every dense layer of the model `x`. Layers with the same text whose paths
        differ only in numbers share a paragraph.
      platform: "cpu", "cuda", "rocm" or "tpu"; None for that of the device that the operands or the model's
        quantized weights are committed to, else of this process's default device.
      rows: M, the rows of each layer's input, if a model is given; 1 is decoding. Each is a token of a text of its own.
      cache: the factory of a decoder's caches; None for those it has without being asked, as in `generate`.

    Returns:
      Text to print. Of a layer whose input a method scales, it says what holds the scale: the layer before, into which
      it was folded, or the layer itself.

    Raises:
      ValueError, TypeError: as `matmul` does, or `platform` is none of these, `rows` is no count, or there is no dense
        layer in the model, or `cache` is given for what has none.
    """
    if w is None:
        return str(explained(x, platform, rows=rows, cache=cache))
    if cache is not None:
        raise ValueError(_no_cache(x))
    return product.explain(x, w, platform)


def explained(x: Any, platform: str | None = None, *, rows: int = 1, cache: CacheFactory | None = None) -> Explanation:
    """What `explain` says of a model, in parts; the arguments and errors are the same."""
    if cache is not None and not isinstance(x, Decoder):
        raise ValueError(_no_cache(x))
    check_rows(rows)
    container, dtype = container_of(x), _dtype(x)
    operators, matrices = container.operators(x), container.matrices(x, None, ())
    if not operators and not matrices:
        raise ValueError(
            f"got a {type(x).__name__} without dense layers, need a model that quantize_model takes; pass one, or an "
            "input with an operator"
        )
    # Once for the whole model: the first matrix of a stack is only a shape below, and tells of no device.
    where = explained_platform(platform, operators)
    groups: dict[str, dict[str, int]] = {}

    def tell(path: str, shape: tuple[int, ...], text: str) -> None:
        where = f"{_NUMBER.sub('*', path)}  [{' x '.join(map(str, shape))}]"
        places = groups.setdefault(text, {})
        places[where] = places.get(where, 0) + 1

    recipe = recipe_of(x)
    scaled = {path: dict(notes).get(SCALED) for path, _, notes in (recipe.linears if recipe else ())}
    for path, operator in operators.items():
        shape = tuple(operator.shape)
        # A stack runs one matrix at a time.
        one = operator if len(shape) == 2 else jax.eval_shape(_first(len(shape) - 2), operator)
        text = explain_on(where, jax.ShapeDtypeStruct((rows, shape[-1]), dtype), one)
        tell(path, shape, f"{text}\nscale of the inputs: {scaled[path]}" if scaled.get(path) else text)
    for path, matrix in matrices.items():
        if matrix.by_name:
            continue
        tell(path, matrix.shape, DENSE)

    if not groups:
        raise ValueError(f"found no linear layers in a {type(x).__name__}; pass a model, or an input and a weight")
    head = f"platform {where}, inputs {jnp.dtype(dtype).name} [{rows}, K]"
    whole = coverage(x)
    head += f"\n{whole}" if whole.done else ""
    return Explanation(where, head, groups, explain_attention(x, cache, rows, where) if isinstance(x, Decoder) else ())


def _no_cache(x: Any) -> str:
    return f"got a cache for a {type(x).__name__}, need a Decoder, which has caches; leave the cache out"


def _first(axes: int):
    return lambda tree: jax.tree.map(lambda leaf: leaf[(0,) * axes], tree)


def _dtype(model: Any) -> Any:
    """The dtype of a model's activations; float32 if the model doesn't say."""
    return getattr(model, "dtype", None) or jnp.float32
