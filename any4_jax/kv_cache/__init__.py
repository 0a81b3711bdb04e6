"""Key/value caches: what attention keeps of earlier tokens."""

from any4_jax.kv_cache.attention import attention, attention_by_blocks
from any4_jax.kv_cache.base import (
    Cache,
    CacheFactory,
    PairRope,
    Rope,
    append_attend,
    as_decoded,
    rotate_pairs,
    rotated,
    traceable,
)
from any4_jax.kv_cache.blocks import Part, ReadBlock, attention_over
from any4_jax.kv_cache.catalogue import CATALOGUE, DefaultCache, default_cache
from any4_jax.kv_cache.dense import DenseCache
from any4_jax.kv_cache.explain import explain
from any4_jax.kv_cache.kivi import Kivi
from any4_jax.kv_cache.kvquant import KVQuant
from any4_jax.kv_cache.kvquant_levels import CacheSample
from any4_jax.kv_cache.rounded import RoundedAttention
from any4_jax.kv_cache.settings import PLAIN, AttentionSettings

__all__ = [
    "CATALOGUE",
    "PLAIN",
    "AttentionSettings",
    "Cache",
    "CacheFactory",
    "CacheSample",
    "DefaultCache",
    "DenseCache",
    "KVQuant",
    "Kivi",
    "PairRope",
    "Part",
    "ReadBlock",
    "Rope",
    "RoundedAttention",
    "append_attend",
    "as_decoded",
    "attention",
    "attention_by_blocks",
    "attention_over",
    "default_cache",
    "explain",
    "rotate_pairs",
    "rotated",
    "traceable",
]
