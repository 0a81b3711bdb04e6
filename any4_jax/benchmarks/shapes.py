"""Models of well-known shapes with random weights, created on the device: speed doesn't depend on the values."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from any4_jax.benchmarks.timing import tree_bytes
from any4_jax.methods import NF4, Any4, Int, Method, quantize
from any4_jax.models.config import LlamaConfig, RopeScaling
from any4_jax.models.families import family_of_config
from any4_jax.models.llama import Llama
from any4_jax.packing import PLANES, padding, plane_bytes
from any4_jax.surgery import Recipe, nnx_modules
from any4_jax.weights import QuantizedTensor

_SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
_LLAMA_31_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    rope_scaling=_SCALING,
)
_LLAMA_32_1B = dataclasses.replace(
    _LLAMA_31_8B,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    head_dim=64,
    rope_scaling=dataclasses.replace(_SCALING, factor=32.0),
    tie_word_embeddings=True,
)
_LLAMA_31_70B = dataclasses.replace(
    _LLAMA_31_8B, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
)
_TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    max_position_embeddings=1024,
)
CONFIGS = {
    "llama-3.2-1b": _LLAMA_32_1B,
    "llama-3.1-8b": _LLAMA_31_8B,
    "llama-3.1-70b": _LLAMA_31_70B,
    "tiny-llama": _TINY,
}
METHODS: dict[str, Method | None] = {
    "bfloat16": None,
    "any4": Any4(),
    "any4-bfloat16": Any4(table_dtype="bfloat16"),
    "any3": Any4(bits=3),
    "nf4": NF4(),
    "int4": Int(bits=4),
    "int8": Int(bits=8),
}
"""What the linears of a random model are stored in; None is the float kind. Groups have 128 weights. Learned tables are
integers of 8 bits, those of "any4-bfloat16" bfloat16."""


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6, 7, 8))
def random_leaf(
    seed: int,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    levels: tuple[float, ...] | None = None,
    offsets: bool = True,
    uniform: bool = False,
    integers: bool = False,
) -> QuantizedTensor:
    """A weight [N, K] with random codes, and scales, offsets and tables in bfloat16.

    Args:
      seed: of the random numbers.
      n, k: N and K.
      bits, group_size, uniform: see `QuantizedTensor`.
      levels: the table of all rows; None gives each row a random one.
      offsets: whether there are offsets.
      integers: whether random tables are int8.
    """
    keys = jax.random.split(jax.random.key(seed), 4)
    groups = (n, -(-k // group_size))
    codes = tuple(jax.random.bits(keys[0], (n, plane_bytes(k, width)), jnp.uint8) for width in PLANES[bits])
    if levels is None and integers:
        lut, largest = jnp.sort(jax.random.randint(keys[1], (n, 2**bits), -127, 128, jnp.int8)), 127.0
    elif levels is None:
        lut, largest = jnp.sort(jax.random.normal(keys[1], (n, 2**bits), jnp.bfloat16)), 1.0
    else:
        lut, largest = jnp.asarray([levels], jnp.bfloat16), max(map(abs, levels))
    return QuantizedTensor(
        codes=codes if len(codes) > 1 else codes[0],
        lut=lut,
        scales=jax.random.uniform(keys[2], groups, jnp.bfloat16, 0.5, 1.5) * (k**-0.5 / largest),
        offsets=jax.random.normal(keys[3], groups, jnp.bfloat16) * k**-0.5 if offsets else None,
        bits=bits,
        group_size=group_size,
        padding=padding(k, bits),
        uniform=uniform,
    )


def random_model(shape: str, method: Method | None = None, head: Method | None = None) -> Llama:
    """A bfloat16 model with random weights. No float weights are made for linears with few bits.

    Args:
      shape: a key of `CONFIGS`.
      method: what the blocks' linears are stored as; None for bfloat16.
      head: what the head is stored as, likewise. If it is tied to the embedding, tokens are looked up in it too.
    """
    return _model(shape, method, head, random_weight, random_array)


def model_bytes(shape: str, method: Method | None = None, head: Method | None = None) -> int:
    """The bytes of the arrays of such a `random_model`, which isn't created."""
    return tree_bytes(nnx.state(_model(shape, method, head, lambda seed, *of: _form(*of), _no_array)))


def _model(
    shape: str,
    method: Method | None,
    head: Method | None,
    weight: Callable[..., Any],
    array: Callable[..., Any],
) -> Llama:
    """A model whose linears with few bits are `weight(seed, n, k, method)`, and other arrays `array(seed, shape,
    dtype)`."""
    config = CONFIGS[shape]
    model = family_of_config(config).abstract(config, jnp.bfloat16)
    methods = dict.fromkeys(model.head_site.linears, head)
    for i in range(len(model.blocks)):
        methods |= {f"{model.block_path(i)}.{path}": method for site in model.sites(i) for path in site.linears}
    done = {}
    linears: list[tuple[str, Any, tuple[tuple[str, str], ...]]] = []
    for seed, (path, matrix) in enumerate(nnx_modules.matrices(model).items()):
        own = methods.get(path)
        if own is not None:
            done[path] = weight(seed, *matrix.shape, own)
            linears.append((path, own, ()))
    replaced: Any = nnx_modules.replace(model, done, Recipe((), tuple(linears)) if linears else None)
    graphdef, state = nnx.split(replaced)
    leaves, structure = jax.tree.flatten(state)
    filled = [
        array(seed, leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
        for seed, leaf in enumerate(leaves)
    ]
    made: Llama = nnx.merge(graphdef, jax.tree.unflatten(structure, filled))
    return made


@functools.cache
def _form(n: int, k: int, method: Any) -> Any:
    """The operator that the method makes of a weight [N, K], with a jax.ShapeDtypeStruct for each array."""
    return jax.eval_shape(lambda w: method.apply(w, None).operator, jax.ShapeDtypeStruct((n, k), jnp.float32))


@functools.cache
def _table(k: int, method: Any) -> tuple[float, ...]:
    """The table of a method whose matrices all share it."""
    w = jax.random.normal(jax.random.key(0), (8, k))
    return tuple(quantize(w, method).lut[0].tolist())


def random_weight(seed: int, n: int, k: int, method: Any) -> QuantizedTensor:
    """A weight [N, K] of the form that the method gives, with random codes."""
    form = _form(n, k, method)
    levels = None if form.lut.shape[0] > 1 else _table(k, method)
    integers = form.lut.dtype == jnp.int8
    return random_leaf(seed, n, k, form.bits, form.group_size, levels, form.offsets is not None, form.uniform, integers)


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_array(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Small normal numbers; ones for a vector, which scales a norm."""
    if len(shape) == 1:
        return jnp.ones(shape, dtype)
    return jax.random.normal(jax.random.key(seed), shape, dtype) * jnp.asarray(shape[0] ** -0.5, dtype)


def _no_array(seed: int, shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
