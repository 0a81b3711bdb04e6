"""Models of well-known shapes with random weights, created on the device: speed doesn't depend on the values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from any4_jax.methods import Any4
from any4_jax.models.config import LlamaConfig, RopeScaling
from any4_jax.models.llama import Llama
from any4_jax.nn.nnx import Any4Linear
from any4_jax.surgery import Recipe
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
CONFIGS = {"llama-3.2-1b": _LLAMA_32_1B, "llama-3.1-8b": _LLAMA_31_8B}


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def random_leaf(seed: int, n: int, k: int, bits: int, group_size: int, own: bool = True) -> QuantizedTensor:
    """A weight [N, K] with random codes and bfloat16 tables. It has any4's form; without `own` nf4's, which has one
    table and no offsets."""
    keys = jax.random.split(jax.random.key(seed), 4)
    groups = (n, -(-k // group_size))
    return QuantizedTensor(
        codes=jax.random.bits(keys[0], (n, k * bits // 8), jnp.uint8),
        lut=jnp.sort(jax.random.normal(keys[1], (n if own else 1, 2**bits), jnp.bfloat16)),
        scales=jax.random.uniform(keys[2], groups, jnp.bfloat16, 0.5, 1.5) * k**-0.5,
        offsets=jax.random.normal(keys[3], groups, jnp.bfloat16) * k**-0.5 if own else None,
        bits=bits,
        group_size=group_size,
        padding=0,
        uniform=False,
    )


def dense(shape: str) -> Llama:
    """A bfloat16 model with random weights; `shape` is a key of `CONFIGS`."""
    return Llama(CONFIGS[shape], dtype=jnp.bfloat16, rngs=nnx.Rngs(0))


def few_bits(model: Llama, group_size: int) -> Llama:
    """A copy of the model in which the blocks' linears have random 4-bit codes in any4's form; it shares all other
    arrays."""
    coded = nnx.merge(*nnx.split(model))
    linears: list[tuple[str, Any4, tuple[tuple[str, str], ...]]] = []
    for i, block in enumerate(coded.blocks):
        for path in (path for site in coded.sites(i) for path in site.linears):
            parent, name = path.split(".")
            linear = getattr(getattr(block, parent), name)
            leaf = random_leaf(len(linears), linear.out_features, linear.in_features, 4, group_size)
            setattr(getattr(block, parent), name, Any4Linear.of(leaf, dtype=model.dtype))
            linears.append((f"{coded.block_path(i)}.{path}", Any4(group_size=group_size), ()))
    coded.recipe = Recipe((), tuple(linears))
    return coded
