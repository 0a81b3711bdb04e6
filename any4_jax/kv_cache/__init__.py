"""Key/value caches: what attention remembers of the tokens before."""

from any4_jax.kv_cache.base import Cache, CacheFactory, Rope
from any4_jax.kv_cache.dense import DenseCache

__all__ = ["Cache", "CacheFactory", "DenseCache", "Rope"]
